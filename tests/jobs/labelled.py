"""A labelled table of small images, for the tests of commands that read one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.schema import FILE_SCHEMA
from masklake.pipeline.table.table import open_table

ORIENTATION = 0x0112


def label(
    folder: str, names: list[str], status: str = "ok", scores: Sequence[float] = (0.9,), rles: Sequence[bytes] = ()
) -> str:
    """A committed table that says each image holds a cat a score in its middle; the images are 60 x 40 pixels, upright."""
    storage = Storage()
    table = open_table(storage, storage.join(folder, "table"))
    rows: list[dict[str, Any]] = []
    for index, name in enumerate(names):
        uri = storage.join(folder, name)
        storage.write_bytes(uri, jpeg())
        box = {"x1": 10.0, "y1": 10.0, "x2": 50.0, "y2": 30.0}
        rows.append(
            dict.fromkeys(FILE_SCHEMA.names) | {"image_id": index, "uri": uri, "status": status, "width": 60, "height": 40}
        )
        rows[-1] |= {
            "instances": [{"category_id": 1, "category": "cat", "score": score, "box": box} for score in scores],
            "bytes": len(jpeg()),
            "rles": list(rles),
            "keypoints": [],
        }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=FILE_SCHEMA), sink)
    storage.write_bytes(storage.join(table.run_folder("night-1"), "a.parquet"), sink.getvalue().to_pybytes())
    table.commit_run("night-1")
    return table.uri


def jpeg() -> bytes:
    """Stored lying on its side, 40 x 60, with the EXIF note to turn it: dark on the left once upright."""
    pixels = np.full((40, 60, 3), 200, np.uint8)
    pixels[:, :5] = 10
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    out = io.BytesIO()
    Image.fromarray(pixels).rotate(90, expand=True).save(out, "JPEG", exif=exif, quality=95)
    return out.getvalue()
