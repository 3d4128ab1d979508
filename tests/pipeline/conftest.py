"""Rows and runs for the pipeline's tests, made here and not by the labeller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.schema import FILE_SCHEMA
from masklake.pipeline.table.table import Table, open_table

DAY_ONE = datetime(2026, 1, 1, tzinfo=UTC)


def image_row(image_id: int, uri: str, **changes: Any) -> dict[str, Any]:
    """One row of FILE_SCHEMA: an ok image with two instances, unless changed."""
    box = {"x1": 1.0, "y1": 2.0, "x2": 11.0, "y2": 22.0}
    instances = [
        {"category_id": 1, "category": "cat", "score": 0.875, "box": box, "area": 120},
        {"category_id": 2, "category": "dog", "score": 0.375, "box": box, "area": 80},
    ]
    row = {
        "image_id": image_id,
        "uri": uri,
        "etag": f"tag-{uri}",
        "bytes": 1000,
        "width": 640,
        "height": 480,
        "status": "ok",
        "error": None,
        "model_id": "tiny-0123456789ab",
        "label_id": "label-a",
        "labelled_at": DAY_ONE + timedelta(seconds=image_id),
        "instances": instances,
        "rles": [b"counts-cat", b"counts-dog"],
        "keypoints": [[{"x": 1.5, "y": 2.5, "score": 3.0}], []],
    }
    row |= changes
    if row["status"] != "ok":
        row |= {"error": row["error"] or row["status"], "instances": [], "rles": [], "keypoints": []}
    return row


@pytest.fixture
def make_row() -> Callable[..., dict[str, Any]]:
    """`image_row`, for tests that cannot import a conftest."""
    return image_row


WriteRun = Callable[..., Table]


@pytest.fixture
def write_run() -> WriteRun:
    """Write rows into a run's folder, a few a file, and (unless told otherwise) commit them."""

    def write(uri: str, run_id: str, rows: Sequence[dict[str, Any]], rows_per_file: int = 100, commit: bool = True) -> Table:
        table = open_table(Storage(), uri)
        for start in range(0, len(rows), rows_per_file):
            data = pa.Table.from_pylist(list(rows[start : start + rows_per_file]), schema=FILE_SCHEMA)
            sink = pa.BufferOutputStream()
            pq.write_table(data, sink, compression="zstd")
            path = table.storage.join(table.run_folder(run_id), f"part-{start:06d}.parquet")
            table.storage.write_bytes(path, sink.getvalue().to_pybytes())
        if commit:
            assert table.commit_run(run_id)
        return table

    return write


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Any) -> str:
    """Somewhere to put inputs and tables: a folder whose name is awkward, then one in a bucket."""
    if request.param == "local":
        return str(tmp_path / "a place+100%")
    return str(request.getfixturevalue("s3").uri("a place+100%"))
