"""A run's frozen manifest as an independent reader sees it."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.schema import MANIFEST_SCHEMA


def read_manifest(storage: Storage, uri: str) -> pa.Table:
    """All of its rows, in the columns' own types."""
    filesystem, path = storage.arrow(uri)
    return pq.read_table(path, filesystem=filesystem).cast(MANIFEST_SCHEMA)
