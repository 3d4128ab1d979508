"""What a run has written so far: which files count, which images are missing, and each image exactly once.

Ray Data writes a block in two phases: `<name>.pending.parquet` into the checkpoint folder, the data file `<name>-0.parquet`,
then the checkpoint is renamed to `<name>.parquet`. A data file counts when its checkpoint is there under the final name; the
driver's own files (`driver-*`) are written in one piece and count as they are.

Workers of a killed driver live on for up to half a minute and may finish a block that the restarted run has begun again.
So nothing here relies on the checkpoint alone: `settle` looks at every image's number before a commit.
"""

from __future__ import annotations

import io
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import InputNotFoundError
from pipeline.patience import patiently
from pipeline.schema import FILE_SCHEMA, LIKELY_SCORE, MANIFEST_SCHEMA, RUN_COLUMN, Status
from pipeline.storage import Storage
from pipeline.table import DataFile, Table

DRIVER_PREFIX = "driver-"
READERS = 16


@dataclass(frozen=True)
class Finished:
    """A data file that counts, and the images in it: int64 image_ids."""

    file: DataFile
    image_ids: NDArray[np.int64]


def checkpoint_uri(table: Table, run_id: str) -> str:
    """Where Ray Data notes the blocks that are written."""
    return table.private(run_id, "checkpoint")


def finished(table: Table, run_id: str) -> list[Finished]:
    """The run's data files that count, by name."""
    names = _names(table.storage, checkpoint_uri(table, run_id))
    committed = {name.removesuffix(".parquet") for name in names if not name.endswith(".pending.parquet")}
    folder = table.run_folder(run_id)
    counting = [
        (name, size)
        for name, size in sorted(_names(table.storage, folder).items())
        if name.startswith(DRIVER_PREFIX) or name.removesuffix(".parquet").rpartition("-")[0] in committed
    ]
    with ThreadPoolExecutor(READERS) as pool:
        ids = pool.map(lambda named: _image_ids(table.storage, table.storage.join(folder, named[0])), counting)
        return [
            Finished(DataFile(f"{folder[len(table.uri) + 1 :]}/{name}", size, len(found)), found)
            for (name, size), found in zip(counting, ids, strict=True)
        ]


def _names(storage: Storage, folder: str) -> dict[str, int]:
    """Parquet files below ``folder`` and their bytes; empty where there is no such folder."""
    try:
        batches = list(storage.list_objects(folder))
    except InputNotFoundError:
        return {}
    rows = (row for batch in batches for row in batch.to_pylist())
    return {row["uri"].rpartition("/")[2]: row["bytes"] for row in rows if row["uri"].endswith(".parquet")}


def _image_ids(storage: Storage, uri: str) -> NDArray[np.int64]:
    filesystem, path = storage.arrow(uri)
    with storage.reading(uri), pq.ParquetFile(path, filesystem=filesystem) as file:
        ids: NDArray[np.int64] = file.read(columns=["image_id"])["image_id"].to_numpy()
        return ids


def missing(files: Sequence[Finished], images: int) -> NDArray[np.int64]:
    """image_ids of a manifest of ``images`` rows that no file holds."""
    absent = np.ones(images, dtype=bool)
    for file in files:
        absent[file.image_ids] = False
    return np.flatnonzero(absent)


def settle(table: Table, run_id: str, files: Sequence[Finished], images: int) -> list[DataFile]:
    """The files to commit, in which each of the manifest's ``images`` rows stands at most once.

    A file that repeats images is replaced by one without them; the new file is there before the old one goes, so a crash in
    between leaves a repetition that the next call settles.
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


def write_rows(table: Table, run_id: str, rows: pa.Table) -> DataFile:
    """Write FILE_SCHEMA rows as one file of the run, from the driver; readers see all of it or nothing."""
    buffer = io.BytesIO()
    pq.write_table(rows.cast(FILE_SCHEMA), buffer, compression="zstd")
    name = f"{DRIVER_PREFIX}{uuid.uuid4().hex}.parquet"
    uri = table.storage.join(table.run_folder(run_id), name)
    patiently(lambda: table.storage.write_bytes(uri, buffer.getvalue()))
    return DataFile(uri[len(table.uri) + 1 :], buffer.getbuffer().nbytes, rows.num_rows)


def manifest_rows(table: Table, run_id: str, image_ids: NDArray[np.int64]) -> pa.Table:
    """MANIFEST_SCHEMA rows of these images, read in batches: the whole manifest may be large."""
    uri = table.manifest_uri(run_id)
    filesystem, path = table.storage.arrow(uri)
    wanted = pa.array(image_ids)
    with table.storage.reading(uri), pq.ParquetFile(path, filesystem=filesystem) as file:
        chosen = [pa.Table.from_batches([batch]) for batch in file.iter_batches()]
        parts = [part.filter(pc.is_in(part["image_id"], value_set=wanted)) for part in chosen]
    return pa.concat_tables(parts).cast(MANIFEST_SCHEMA) if parts else MANIFEST_SCHEMA.empty_table()


@dataclass(frozen=True)
class Summary:
    """Of a committed run: images by status (every status named), and instances by category name, most frequent first.

    likely: instances of at least LIKELY_SCORE. stored: all that the table holds.
    """

    statuses: dict[str, int]
    likely: dict[str, int]
    stored: dict[str, int]


def summarise(table: Table, run_id: str) -> Summary:
    """The summary of a run; zeros where it is not committed."""
    statuses = Counter({status.value: 0 for status in Status})
    likely: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    if table.is_committed(run_id) and any(run == run_id for _, run in table.files()):
        chosen = pc.field(RUN_COLUMN) == run_id
        for batch in _batches(table, chosen):
            statuses.update(_value_counts(batch["status"]))
            instances = batch["instances"].flatten()
            categories = instances.field("category")
            stored.update(_value_counts(categories))
            likely.update(_value_counts(categories.filter(pc.greater_equal(instances.field("score"), LIKELY_SCORE))))
    return Summary(dict(statuses), dict(likely.most_common()), dict(stored.most_common()))


def _batches(table: Table, chosen: pc.Expression) -> Iterator[pa.RecordBatch]:
    with table.storage.reading(table.uri):
        yield from table.dataset().scanner(columns=["status", "instances"], filter=chosen).to_batches()


def _value_counts(values: pa.Array) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(values).to_pylist()}
