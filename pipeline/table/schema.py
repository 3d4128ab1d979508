"""The table's column names, and types: the one place that spells them (design: one row an image, always).

The heavy columns (`rles`, `keypoints`) stand beside `instances` and not inside it: readers do not prune a struct within a
list, so a query that needs no mask would otherwise read every mask (measured: 31 MB against 0.5 MB for a count by category).
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 1
"""Stands in `_masklake/table.json`; a reader refuses a newer one."""

RUN_COLUMN = "run"
"""The partition column: in the folder's name and the Delta log, not in the files."""


LIKELY_SCORE = 0.5
"""From here on an instance counts in summaries and is drawn. Weaker ones, down to the model's threshold (0.05), are stored
because average precision needs them; there are several times as many as there are things in the pictures."""


BOX = pa.struct([(side, pa.float32()) for side in ("x1", "y1", "x2", "y2")])
"""xyxy, in the original image's pixels."""

INSTANCE = pa.struct(
    [
        ("category_id", pa.int32()),
        ("category", pa.string()),
        ("score", pa.float32()),
        ("box", BOX),
        ("area", pa.int64()),  # mask pixels; null where no mask was asked for
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
"""What a data file holds. `instances`, `rles` and `keypoints` are empty lists, never null, when nothing was found."""

TABLE_SCHEMA = FILE_SCHEMA.append(pa.field(RUN_COLUMN, pa.string()))
"""What a reader of the table sees."""

MANIFEST_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("etag", pa.string()),  # null when the manifest's author gave none: the fetch fills it in
        ("bytes", pa.int64()),
    ]
)
"""The frozen manifest of a run, `_masklake/<run_id>/images.manifest` (Parquet)."""
