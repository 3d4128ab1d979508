"""Column names and types of the table, in one place (design: one row per image, always).

The heavy columns (`rles`, `keypoints`) stand beside `instances`, not inside it. Readers do not prune a struct within a list, so
a query that needs no mask would otherwise read every mask (measured: 31 MB against 0.5 MB for a count by category).
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 1
"""Stored in `_masklake/table.json`; a reader refuses a newer version."""

RUN_COLUMN = "run"
"""The partition column: part of the folder's name and the Delta log, not of the files."""


BOX = pa.struct([(side, pa.float32()) for side in ("x1", "y1", "x2", "y2")])
"""xyxy, in pixels of the original image."""

INSTANCE = pa.struct(
    [
        ("category_id", pa.int32()),
        ("category", pa.string()),
        ("score", pa.float32()),
        ("box", BOX),
        ("area", pa.int64()),  # mask pixels; null if no masks were requested
    ]
)

KEYPOINT = pa.struct([(part, pa.float32()) for part in ("x", "y", "score")])

FILE_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),  # row number in the frozen manifest: unique within a run
        ("uri", pa.string()),
        ("etag", pa.string()),  # local files: size + mtime_ns
        ("bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("status", pa.string()),
        ("error", pa.string()),  # null when ok
        ("model_id", pa.string()),
        ("label_id", pa.string()),
        ("labelled_at", pa.timestamp("us", tz="UTC")),
        ("instances", pa.list_(INSTANCE)),
        ("rles", pa.list_(pa.binary())),  # COCO compressed counts, aligned with instances; size is (height, width)
        ("keypoints", pa.list_(pa.list_(KEYPOINT))),  # aligned with instances; empty for categories without keypoints
    ]
)
"""Columns of a data file. `instances`, `rles` and `keypoints` are empty lists, never null, if nothing was found."""

TABLE_SCHEMA = FILE_SCHEMA.append(pa.field(RUN_COLUMN, pa.string()))
"""Columns that a reader of the table sees."""

MANIFEST_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("etag", pa.string()),  # null if there was none when the run was planned: the fetch sets it
        ("bytes", pa.int64()),
    ]
)
"""The frozen manifest of a run, `_masklake/<run_id>/images.manifest` (Parquet)."""
