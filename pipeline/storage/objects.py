"""The description of an object in a listing: URI, version and size."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

OBJECT_SCHEMA = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("bytes", pa.int64())])
"""One row per object. etag: the store's, without quotes; for local files, size and mtime_ns."""

LISTING_BATCH = 10_000  # rows per batch of a listing: 1-2 MB of Arrow


@dataclass(frozen=True)
class ObjectStat:
    """Version (`etag`) and size of one object."""

    etag: str | None
    bytes: int


def local_etag(stat: os.stat_result) -> str:
    """Returns the version of a local file: its size and its modification time in nanoseconds."""
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def unquoted(etag: str | None) -> str | None:
    """Returns an HTTP entity tag without its quotes, as tables store it."""
    return etag.removeprefix("W/").strip('"') if etag is not None else None


def concat(batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """Returns all batches of a listing as one table."""
    return pa.Table.from_batches(batches, schema=OBJECT_SCHEMA)
