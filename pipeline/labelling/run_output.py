"""The output of a run: which files count, which images are missing, and that each image appears exactly once.

A worker writes each block atomically as one file, `part-<first image>-<hash of all of them>.parquet`; a block that is labelled
again gets the same name. The driver's own files (`driver-*`) are written atomically, too. Other files in a run's folder do not
count, and neither does a damaged file: its images are labelled again.

Workers of a killed driver run on for up to half a minute, and may finish a block whose images the restarted run has divided
differently. So `settle` checks the id of every image before a commit.
"""

from __future__ import annotations

import hashlib
import io
import logging
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from masklake.model.errors import MaskLakeError
from masklake.pipeline import errors
from masklake.pipeline.errors import InputNotFoundError, LabellingError, StorageError
from masklake.pipeline.images.status import Status
from masklake.pipeline.storage.errors import reason_of, translated
from masklake.pipeline.storage.retry import patiently
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import parse_uri
from masklake.pipeline.table.fields import LIKELY_SCORE
from masklake.pipeline.table.log import DataFile
from masklake.pipeline.table.schema import FILE_SCHEMA, MANIFEST_SCHEMA
from masklake.pipeline.table.table import Table

logger = logging.getLogger(__name__)

BLOCK_PREFIX = "part-"
DRIVER_PREFIX = "driver-"
READERS = 16
TARGET_FILE_BYTES = 256 * 2**20
"""Size of merged files: large enough that a query opens few, small enough that several readers share a table."""
ROW_GROUP_ROWS = 10_000
ROW_GROUP_BYTES = 128 * 2**20
"""Maximum size of a row group of a merged file, in memory: readers and the merging driver need that much."""
_WITH_STATISTICS = [field.name for field in FILE_SCHEMA if not pa.types.is_list(field.type)]  # none for masks: they only cost


REPORT_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("bytes", pa.int64()),
        ("image_ids", pa.list_(pa.int64())),
        ("error", pa.string()),  # the class of an error, with its message; null where the block is written
        ("message", pa.string()),
    ]
)
"""A worker's report on a block: the file that contains it, or an error, which is never caused by an image."""


@dataclass(frozen=True)
class Finished:
    """A data file that counts, and the images in it: int64 image_ids."""

    file: DataFile
    image_ids: NDArray[np.int64]


def checkpoint_uri(table: Table, run_id: str) -> str:
    """Returns the folder in which runs of earlier versions recorded written blocks (by Ray Data, in two phases)."""
    return table.private(run_id, "checkpoint")


def finished(table: Table, run_id: str, known: Sequence[Finished] = ()) -> list[Finished]:
    """Returns the data files of the run that count, by name. Files in `known` are not read again."""
    folder = table.run_folder(run_id)
    counting = _counting(table, run_id, _names(table.storage, folder))
    ids = {file.file.path.rpartition("/")[2]: file.image_ids for file in known}
    unknown = [name for name, _ in counting if name not in ids]
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda name: _image_ids_if_whole(table.storage, table.storage.join(folder, name)), unknown)
        ids |= {name: read for name, read in zip(unknown, found, strict=True) if read is not None}
    return [
        Finished(DataFile(f"{folder[len(table.uri) + 1 :]}/{name}", size, len(ids[name])), ids[name])
        for name, size in counting
        if name in ids
    ]


def _counting(table: Table, run_id: str, names: Mapping[str, int]) -> list[tuple[str, int]]:
    ours = {name for name in names if name.startswith((BLOCK_PREFIX, DRIVER_PREFIX))}
    if len(ours) < len(names):  # written by an earlier version: a file counts when its checkpoint has its final name
        noted = _names(table.storage, checkpoint_uri(table, run_id))
        done = {name.removesuffix(".parquet") for name in noted if not name.endswith(".pending.parquet")}
        ours |= {name for name in names if name.removesuffix(".parquet").rpartition("-")[0] in done}
    return sorted((name, names[name]) for name in ours)


def _names(storage: Storage, folder: str) -> dict[str, int]:
    """Returns the Parquet files below `folder` and their sizes; none if there is no such folder."""
    try:
        batches = list(storage.list_objects(folder))
    except InputNotFoundError:
        return {}
    rows = (row for batch in batches for row in batch.to_pylist())
    return {row["uri"].rpartition("/")[2]: row["bytes"] for row in rows if row["uri"].endswith(".parquet")}


def _image_ids(storage: Storage, uri: str) -> NDArray[np.int64]:
    """Returns the image_ids of a data file. A local file is decoded completely: a power cut may leave zeros anywhere in it."""
    filesystem, path = storage.arrow(uri)
    columns = None if parse_uri(uri).is_local else ["image_id"]
    with storage.reading(uri), pq.ParquetFile(path, filesystem=filesystem) as file:
        return _decoded(file, columns)


def _decoded(file: pq.ParquetFile, columns: list[str] | None) -> NDArray[np.int64]:
    parts = [batch.column("image_id") for batch in file.iter_batches(columns=columns)]
    ids: NDArray[np.int64] = pa.chunked_array(parts, pa.int64()).to_numpy()
    return ids


def _image_ids_if_whole(storage: Storage, uri: str) -> NDArray[np.int64] | None:
    """Returns the image_ids of a file; None if it is not complete Parquet (after a power cut), so that its images count as
    missing.
    """
    try:
        return _image_ids(storage, uri)
    except StorageError:
        if not _is_damaged(storage, uri):
            raise
        logger.warning("%s: is damaged and does not count; its images are labelled again", uri)
        return None


def _is_damaged(storage: Storage, uri: str) -> bool:
    """Returns whether the file can be read and is not complete Parquet. pyarrow raises OSError for either."""
    content = storage.read_bytes(uri)
    try:
        with pq.ParquetFile(pa.BufferReader(content)) as file:
            _decoded(file, None)
    except (pa.ArrowException, OSError):
        return True
    return False


def missing(files: Sequence[Finished], images: int) -> NDArray[np.int64]:
    """Returns the image_ids, of a manifest of `images` rows, that no file contains."""
    absent = np.ones(images, dtype=bool)
    for file in files:
        absent[file.image_ids] = False
    return np.flatnonzero(absent)


def settle(table: Table, run_id: str, files: Sequence[Finished], images: int) -> list[DataFile]:
    """Returns the files to commit, in which each of the manifest's `images` rows appears at most once.

    A file with repeated images is replaced by one without them. The new file is written before the old one is deleted, so a
    crash in between leaves a repetition that the next call removes.
    """
    seen = np.zeros(images, dtype=bool)
    settled: list[DataFile] = []
    for file in files:
        fresh = ~seen[file.image_ids]
        seen[file.image_ids] = True
        if fresh.all():
            settled.append(file.file)
            continue
        if fresh.any():
            settled.append(write_rows(table, run_id, _read(table, file.file).filter(pa.array(fresh))))
        _delete(table, file.file)
    return settled


def _read(table: Table, data: DataFile) -> pa.Table:
    uri = table.storage.join(table.uri, data.path)
    filesystem, path = table.storage.arrow(uri)

    def read() -> pa.Table:
        with table.storage.reading(uri), pq.ParquetFile(path, filesystem=filesystem) as file:
            return file.read()

    return patiently(read)


def _delete(table: Table, data: DataFile) -> None:
    patiently(lambda: table.storage.delete(table.storage.join(table.uri, data.path)))


def write_block(table: Table, run_id: str, rows: pa.Table) -> Finished:
    """Writes a labelled block (FILE_SCHEMA, at least one row) atomically as one file, named by its images."""
    ids: NDArray[np.int64] = rows["image_id"].to_numpy()
    digest = hashlib.sha256(ids.tobytes()).hexdigest()[:16]
    return Finished(_write(table, run_id, f"{BLOCK_PREFIX}{ids[0]:012d}-{digest}.parquet", rows), ids)


def written(block: Finished) -> pa.Table:
    """Returns a REPORT_SCHEMA row for a written block."""
    file = block.file
    return pa.table([[file.path], [file.bytes], [block.image_ids], [None], [None]], schema=REPORT_SCHEMA)


def failed(error: Exception) -> pa.Table:
    """Returns a REPORT_SCHEMA row for a block that was not written because of an error."""
    ours = isinstance(error, MaskLakeError)
    message = (
        str(error) if ours else f"a block could not be labelled ({reason_of(error)}); run the same command again to continue"
    )
    return pa.table([[None], [None], [None], [type(error).__name__ if ours else None], [message]], schema=REPORT_SCHEMA)


def reported(report: pa.Table) -> list[Finished]:
    """Returns the blocks of a report. Raises the error that a worker reported, as the same class."""
    blocks = []
    for row in report.to_pylist():
        if row["image_ids"] is None:
            kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
            raise kinds.get(row["error"] or "", LabellingError)(row["message"])
        ids = np.array(row["image_ids"], dtype=np.int64)
        blocks.append(Finished(DataFile(row["path"], row["bytes"], len(ids)), ids))
    return blocks


def write_rows(table: Table, run_id: str, rows: pa.Table) -> DataFile:
    """Writes FILE_SCHEMA rows atomically as one file of the run, from the driver."""
    return _write(table, run_id, f"{DRIVER_PREFIX}{uuid.uuid4().hex}.parquet", rows)


def _write(table: Table, run_id: str, name: str, rows: pa.Table) -> DataFile:
    buffer = io.BytesIO()
    pq.write_table(rows.cast(FILE_SCHEMA), buffer, compression="zstd", write_statistics=_WITH_STATISTICS)
    uri = table.storage.join(table.run_folder(run_id), name)
    patiently(lambda: table.storage.write_bytes(uri, buffer.getvalue()))
    return DataFile(uri[len(table.uri) + 1 :], buffer.getbuffer().nbytes, rows.num_rows)


def merge(table: Table, run_id: str, files: Sequence[DataFile], target_bytes: int = TARGET_FILE_BYTES) -> list[DataFile]:
    """Merges an uncommitted run's settled files into files of about `target_bytes`; returns the files to commit.

    This happens before the commit, so that no committed file is ever deleted. A merged file is written before its sources are
    deleted: a crash in between leaves repeated rows, which `settle` drops in the next start (merged files come first by name).
    """
    merged: list[DataFile] = []
    for group in _groups([file for file in files if file.rows], target_bytes):
        if len(group) == 1:
            merged += group
            continue
        merged.append(_merge(table, run_id, group))
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda file: _delete(table, file), group))
    return merged


def _groups(files: Sequence[DataFile], target_bytes: int) -> Iterator[list[DataFile]]:
    """Yields consecutive files of at most `target_bytes` together (at least one file)."""
    group: list[DataFile] = []
    total = 0
    for file in files:
        if group and total + file.bytes > target_bytes:
            yield group
            group, total = [], 0
        group.append(file)
        total += file.bytes
    if group:
        yield group


def _merge(table: Table, run_id: str, group: Sequence[DataFile]) -> DataFile:
    uri = table.storage.join(table.run_folder(run_id), f"{DRIVER_PREFIX}{uuid.uuid4().hex}.parquet")
    with translated(tempfile.gettempdir()), tempfile.TemporaryDirectory(prefix="masklake-merge-") as folder:
        path = Path(folder, "merged.parquet")
        settings = {"compression": "zstd", "write_statistics": _WITH_STATISTICS}
        with pq.ParquetWriter(path, FILE_SCHEMA, **settings) as writer:
            for rows in _row_groups(table, group):
                writer.write_table(rows, row_group_size=ROW_GROUP_ROWS)
        patiently(lambda: table.storage.upload(path, uri))
        return DataFile(uri[len(table.uri) + 1 :], path.stat().st_size, sum(file.rows for file in group))


def _row_groups(table: Table, group: Sequence[DataFile]) -> Iterator[pa.Table]:
    """Yields the rows of the files in pieces of at most one row group, but at least one file. Two files are read at a time."""
    held: list[pa.Table] = []
    with ThreadPoolExecutor(2) as pool:
        # Not the whole group at once: the files of blocks are small, but a merged file of an earlier start may be large.
        for start in range(0, len(group), 2):
            for rows in pool.map(lambda file: _read(table, file), group[start : start + 2]):
                full = sum(part.num_rows for part in held) + rows.num_rows > ROW_GROUP_ROWS
                if held and (full or sum(part.nbytes for part in held) + rows.nbytes > ROW_GROUP_BYTES):
                    yield pa.concat_tables(held)
                    held = []
                held.append(rows)
    if held:
        yield pa.concat_tables(held)


def manifest_rows(table: Table, run_id: str, image_ids: NDArray[np.int64], part_rows: int = 262_144) -> Iterator[pa.Table]:
    """Yields MANIFEST_SCHEMA rows of these images, int64 (n,), ascending, in tables of at most `part_rows` rows."""
    if not len(image_ids):
        return
    wanted = np.zeros(int(image_ids[-1]) + 1, dtype=bool)
    wanted[image_ids] = True
    held = MANIFEST_SCHEMA.empty_table()
    for rows in _row_groups_of_manifest(table, patiently(lambda: table.find_manifest(run_id))):
        ids = rows["image_id"].to_numpy()
        chosen = rows.filter(pa.array((ids < len(wanted)) & wanted[np.minimum(ids, len(wanted) - 1)]))
        held = pa.concat_tables([held, chosen])
        while held.num_rows >= part_rows:
            yield held.slice(0, part_rows)
            held = held.slice(part_rows)
    if held.num_rows:
        yield held


def _row_groups_of_manifest(table: Table, uri: str) -> Iterator[pa.Table]:
    filesystem, path = table.storage.arrow(uri)

    def opened() -> pq.ParquetFile:
        with table.storage.reading(uri):
            return pq.ParquetFile(path, filesystem=filesystem)

    def read(file: pq.ParquetFile, number: int) -> pa.Table:
        with table.storage.reading(uri):
            return file.read_row_group(number).cast(MANIFEST_SCHEMA)

    with patiently(opened) as file:
        for number in range(file.num_row_groups):
            yield patiently(partial(read, file, number))


@dataclass(frozen=True)
class Summary:
    """Counts of a run.

    statuses: images by status, including statuses without images. likely: instances with a score of at least LIKELY_SCORE, by
    category name, most frequent first. stored: all instances in the table, likewise.
    """

    statuses: dict[str, int]
    likely: dict[str, int]
    stored: dict[str, int]


def summarise(table: Table, run_id: str, files: Sequence[DataFile] | None = None) -> Summary:
    """Returns the summary of a run; zeros if it has no rows. files: its data files; default, those that the table lists."""
    paths = (
        [path for path, run in table.files() if run == run_id] if files is None else [file.path for file in files if file.rows]
    )
    statuses = Counter({status.value: 0 for status in Status})
    likely: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    if paths:
        for batch in _batches(table, [(path, run_id) for path in paths]):
            statuses.update(_value_counts(batch["status"]))
            instances = batch["instances"].flatten()
            categories = instances.field("category")
            stored.update(_value_counts(categories))
            likely.update(_value_counts(categories.filter(pc.greater_equal(instances.field("score"), LIKELY_SCORE))))
    return Summary(dict(statuses), dict(likely.most_common()), dict(stored.most_common()))


def _batches(table: Table, files: Sequence[tuple[str, str]]) -> Iterator[pa.RecordBatch]:
    with table.storage.reading(table.uri):
        yield from table.dataset_of(files).scanner(columns=["status", "instances"]).to_batches()


def _value_counts(values: pa.Array) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(values).to_pylist()}
