"""Which of a run's files count, what is missing, and each image once."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from masklake.model.errors import CheckpointError
from masklake.pipeline.errors import AccessDeniedError, LabellingError, StorageError
from masklake.pipeline.labelling import run_output
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.runs import RunRecord
from masklake.pipeline.table.schema import FILE_SCHEMA, MANIFEST_SCHEMA
from masklake.pipeline.table.table import Table, open_table

RUN = "run-1"


@pytest.fixture
def table(place: str) -> Table:
    return open_table(Storage(), place + "/table")


def put(table: Table, uri: str, rows: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    table.storage.write_bytes(uri, sink.getvalue().to_pybytes())


def write(table: Table, make_row: Any, name: str, ids: list[int], checkpoint: str | None = ".parquet") -> None:
    """A block as Ray Data wrote it for earlier versions: the data, and its checkpoint in one of its two phases."""
    rows = pa.Table.from_pylist([make_row(number, f"u{number}") for number in ids], schema=FILE_SCHEMA)
    put(table, table.storage.join(table.run_folder(RUN), f"{name}-0.parquet"), rows)
    if checkpoint:
        uri = table.storage.join(run_output.checkpoint_uri(table, RUN), name + checkpoint)
        put(table, uri, rows.select(["image_id"]))


def ids_in(table: Table, files: list[Any]) -> list[int]:
    filesystem, root = table.storage.arrow(table.uri)
    found = [pq.ParquetFile(f"{root}/{file.path}", filesystem=filesystem).read() for file in files]
    assert [file.rows for file in files] == [rows.num_rows for rows in found]
    return sorted(number for rows in found for number in rows["image_id"].to_pylist())


def test_only_blocks_with_a_committed_checkpoint_count(table: Table, make_row: Any) -> None:
    write(table, make_row, "a_b_000000", [0, 1])
    write(table, make_row, "a_b_000001", [2, 3], checkpoint=".pending.parquet")  # killed between its two phases
    write(table, make_row, "a_b_000002", [4], checkpoint=None)  # written by a worker that outlived its driver
    files = run_output.finished(table, RUN)
    assert [file.image_ids.tolist() for file in files] == [[0, 1]]
    assert run_output.missing(files, 6).tolist() == [2, 3, 4, 5]


def test_a_half_written_file_does_not_disturb(table: Table, make_row: Any) -> None:
    write(table, make_row, "a_b_000000", [0])
    table.storage.write_bytes(table.storage.join(table.run_folder(RUN), "a_b_000001-0.parquet"), b"PAR1 cut off")
    assert len(run_output.finished(table, RUN)) == 1


def test_a_run_that_wrote_nothing_misses_everything(table: Table) -> None:
    assert run_output.missing(run_output.finished(table, RUN), 3).tolist() == [0, 1, 2]


def test_settle_leaves_each_image_once(table: Table, make_row: Any) -> None:
    write(table, make_row, "a_000000", [0, 1, 2])
    write(table, make_row, "b_000000", [2, 3])  # a late worker and the restarted run both labelled 2
    write(table, make_row, "c_000000", [0, 1])
    settled = run_output.settle(table, RUN, run_output.finished(table, RUN), images=4)
    assert ids_in(table, settled) == [0, 1, 2, 3]
    again = run_output.finished(table, RUN)  # what a restart right after finds
    assert ids_in(table, [file.file for file in again]) == [0, 1, 2, 3]
    assert run_output.settle(table, RUN, again, images=4) == [file.file for file in again]


def test_settled_rows_are_committed_whole(table: Table, make_row: Any) -> None:
    write(table, make_row, "a_000000", [0, 1])
    write(table, make_row, "b_000000", [1, 2])
    table.commit_run(RUN, run_output.settle(table, RUN, run_output.finished(table, RUN), images=3))
    found = run_output.summarise(table, RUN)
    assert found.statuses == {"ok": 3} | dict.fromkeys(found.statuses.keys() - {"ok"}, 0)
    assert found.stored == {"cat": 3, "dog": 3}
    assert found.likely == {"cat": 3}, "the dogs' score is 0.375"
    rows = table.dataset().to_table().sort_by("image_id").to_pylist()
    assert [(row["uri"], row["rles"]) for row in rows] == [(f"u{n}", [b"counts-cat", b"counts-dog"]) for n in range(3)]


def test_a_run_that_is_not_committed_has_no_summary(table: Table) -> None:
    found = run_output.summarise(table, RUN)
    assert set(found.statuses.values()) == {0}
    assert (found.likely, found.stored) == ({}, {})


def test_rows_of_the_manifest_by_number(table: Table) -> None:
    rows = [{"image_id": number, "uri": f"u{number}", "etag": None, "bytes": number} for number in range(50)]
    put(table, table.manifest_uri(RUN), pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
    (chosen,) = run_output.manifest_rows(table, RUN, np.array([3, 40]))
    assert chosen.to_pylist() == [rows[3], rows[40]]
    parts = list(run_output.manifest_rows(table, RUN, np.arange(1, 50, 2), part_rows=10))
    assert [part.num_rows for part in parts] == [10, 10, 5]
    assert [number for part in parts for number in part["image_id"].to_pylist()] == list(range(1, 50, 2))
    assert list(run_output.manifest_rows(table, RUN, np.array([], dtype=np.int64))) == []


def test_a_manifest_of_an_earlier_version_is_found(table: Table) -> None:
    rows = [{"image_id": 0, "uri": "u0", "etag": None, "bytes": 1}]
    put(table, table.private(RUN, "manifest.parquet"), pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
    (found,) = run_output.manifest_rows(table, RUN, np.array([0]))
    assert found.to_pylist() == rows


def block(make_row: Any, ids: list[int]) -> pa.Table:
    return pa.Table.from_pylist([make_row(number, f"u{number}") for number in ids], schema=FILE_SCHEMA)


def parquet_rows(table: Table) -> int:
    """What a reader counts that takes every `*.parquet` below the table for data: DuckDB, Polars, Spark and pandas do."""
    found = [row["uri"] for batch in table.storage.list_objects(table.uri) for row in batch.to_pylist()]
    filesystem, _ = table.storage.arrow(table.uri)
    paths = [table.storage.arrow(uri)[1] for uri in found if uri.endswith(".parquet")]
    return sum(pq.ParquetFile(path, filesystem=filesystem).metadata.num_rows for path in paths)


def test_a_block_that_is_written_again_replaces_itself(table: Table, make_row: Any) -> None:
    first = run_output.write_block(table, RUN, block(make_row, [4, 5, 6]))
    again = run_output.write_block(table, RUN, block(make_row, [4, 5, 6]))
    other = run_output.write_block(table, RUN, block(make_row, [4, 5]))
    assert first.file.path == again.file.path != other.file.path
    assert len(run_output.finished(table, RUN)) == 2


def test_a_block_travels_as_a_report(table: Table, make_row: Any) -> None:
    block_written = run_output.write_block(table, RUN, block(make_row, [4, 5, 6]))
    (back,) = run_output.reported(run_output.written(block_written))
    assert back.file == block_written.file
    assert back.image_ids.tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (AccessDeniedError("s3://b/k: access denied"), AccessDeniedError),
        (StorageError("/t: No space left on device"), StorageError),
        (CheckpointError("w: damaged"), LabellingError),
        (RuntimeError("CUDA out of memory"), LabellingError),
    ],
)
def test_a_worker_s_error_is_raised_again_by_its_kind(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=str(error)) as raised:
        run_output.reported(run_output.failed(error))
    assert type(raised.value) is kind


def test_known_files_are_not_read_again(table: Table, make_row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = [run_output.write_block(table, RUN, block(make_row, [0, 1]))]
    run_output.write_block(table, RUN, block(make_row, [2]))
    read: list[str] = []
    real = run_output._image_ids
    monkeypatch.setattr(run_output, "_image_ids", lambda storage, uri: read.append(uri) or real(storage, uri))
    files = run_output.finished(table, RUN, known)
    assert [file.image_ids.tolist() for file in files] == [[0, 1], [2]]
    assert len(read) == 1


def footer_bytes(content: bytes) -> int:
    return int.from_bytes(content[-8:-4], "little")


TORN: dict[str, Any] = {
    "empty": lambda whole: b"",
    "only its first bytes": lambda whole: whole[:4],
    "cut off": lambda whole: whole[: len(whole) // 2],
    "without its last byte": lambda whole: whole[:-1],
    "zeros": lambda whole: bytes(len(whole)),
    "zeros in front": lambda whole: bytes(512) + whole[512:],
    "zeros for the footer": lambda whole: whole[: -8 - footer_bytes(whole)] + bytes(footer_bytes(whole)) + whole[-8:],
}
"""What a power cut may leave of a file's content."""


@pytest.mark.parametrize("earlier", [False, True], ids=["ours", "of an earlier version"])
def test_a_torn_file_does_not_count_and_its_images_are_labelled_again(table: Table, make_row: Any, earlier: bool) -> None:
    images = 2 * len(TORN) + 1
    table.begin_run(RunRecord(run_id=RUN, label_id="l", input={"uri": "i"}, images=images, planned_at=datetime.now(UTC)))
    whole = run_output.write_block(table, RUN, block(make_row, [images - 1]))
    for number, tear in enumerate(TORN.values()):
        ids = [2 * number, 2 * number + 1]
        if earlier:
            write(table, make_row, f"a_b_{number:06d}", ids)  # with the checkpoint that says that they are done
            uri = table.storage.join(table.run_folder(RUN), f"a_b_{number:06d}-0.parquet")
        else:
            uri = table.storage.join(table.uri, run_output.write_block(table, RUN, block(make_row, ids)).file.path)
        table.storage.write_bytes(uri, tear(table.storage.read_bytes(uri)))
    files = run_output.finished(table, RUN)
    assert [file.file for file in files] == [whole.file]
    assert run_output.missing(files, images).tolist() == list(range(images - 1))
    again = run_output.write_block(table, RUN, block(make_row, list(range(images - 1))))
    settled = run_output.settle(table, RUN, run_output.finished(table, RUN, [whole, again]), images)
    table.commit_run(RUN, run_output.merge(table, RUN, settled))
    assert sorted(table.dataset().to_table()["image_id"].to_pylist()) == list(range(images))
    assert parquet_rows(table) == images, "no torn file is left to disturb who reads the folder itself"


def test_zeros_in_the_masks_of_a_local_file_are_found(tmp_path: Path, make_row: Any) -> None:
    table = open_table(Storage(), str(tmp_path / "t"))
    uri = table.storage.join(table.uri, run_output.write_block(table, RUN, block(make_row, [0, 1])).file.path)
    content = table.storage.read_bytes(uri)
    columns = pq.ParquetFile(pa.BufferReader(content)).metadata.row_group(0)
    masks = next(columns.column(i) for i in range(columns.num_columns) if "rle" in columns.column(i).path_in_schema)
    start, size = masks.dictionary_page_offset or masks.data_page_offset, masks.total_compressed_size
    table.storage.write_bytes(uri, content[:start] + bytes(size) + content[start + size :])
    assert run_output.finished(table, RUN) == []


def test_an_unreadable_checkpoint_of_an_earlier_version_repeats_no_row(table: Table, make_row: Any) -> None:
    write(table, make_row, "a_b_000000", [0, 1])
    write(table, make_row, "a_b_000001", [1, 2])
    for name in ("a_b_000000", "a_b_000001"):
        uri = table.storage.join(run_output.checkpoint_uri(table, RUN), f"{name}.parquet")
        table.storage.write_bytes(uri, table.storage.read_bytes(uri)[:20])
    files = run_output.finished(table, RUN)
    assert run_output.missing(files, 3).tolist() == []
    assert ids_in(table, run_output.settle(table, RUN, files, 3)) == [0, 1, 2]


def test_a_store_that_does_not_answer_is_no_damaged_file(table: Table, make_row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_output.write_block(table, RUN, block(make_row, [0]))

    def refuse(storage: Storage, uri: str) -> Any:
        raise StorageError(f"{uri}: the store is out of order")

    monkeypatch.setattr(run_output, "_image_ids", refuse)
    with pytest.raises(StorageError, match="out of order"):
        run_output.finished(table, RUN)


def test_small_files_are_merged_before_the_commit(table: Table, make_row: Any) -> None:
    for start in range(0, 20, 2):
        run_output.write_block(table, RUN, block(make_row, [start, start + 1]))
    settled = run_output.settle(table, RUN, run_output.finished(table, RUN), images=20)
    merged = run_output.merge(table, RUN, settled, target_bytes=4 * settled[0].bytes)
    assert ids_in(table, merged) == list(range(20))
    assert len(merged) == 3
    assert run_output.merge(table, RUN, merged[:1]) == merged[:1], "one file needs no merging"
    table.commit_run(RUN, merged)
    assert parquet_rows(table) == 20
    rows = table.dataset().to_table().sort_by("image_id").to_pylist()
    assert rows == [make_row(number, f"u{number}") | {"run": RUN} for number in range(20)]


@pytest.mark.parametrize("survivors", [0, 1, 3])
def test_a_merge_that_is_cut_off_is_settled_by_the_next_start(
    table: Table, make_row: Any, monkeypatch: pytest.MonkeyPatch, survivors: int
) -> None:
    """Killed after ``survivors`` of the small files went: the merged file and the rest hold the same rows."""
    for number in range(4):
        run_output.write_block(table, RUN, block(make_row, [2 * number, 2 * number + 1]))
    deleted: list[str] = []
    delete = Storage.delete

    def die(self: Storage, uri: str) -> None:
        if len(deleted) == survivors:
            raise KeyboardInterrupt
        deleted.append(uri)
        delete(self, uri)

    settled = run_output.settle(table, RUN, run_output.finished(table, RUN), images=8)
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", die)
        patch.setattr(run_output, "READERS", 1)
        with pytest.raises(KeyboardInterrupt):
            run_output.merge(table, RUN, settled)
    table.commit_run(RUN, run_output.merge(table, RUN, run_output.settle(table, RUN, run_output.finished(table, RUN), 8)))
    assert parquet_rows(table) == 8
    assert sorted(table.dataset().to_table()["image_id"].to_pylist()) == list(range(8))


def test_what_an_earlier_version_or_a_late_worker_left_goes_with_the_commit(table: Table, make_row: Any) -> None:
    write(table, make_row, "a_b_000000", [0, 1])  # Ray Data's names, and its notes in the checkpoint
    write(table, make_row, "a_b_000001", [1, 2], checkpoint=".pending.parquet")
    rows = [{"image_id": number, "uri": f"u{number}", "etag": None, "bytes": 1} for number in range(3)]
    put(table, table.private(RUN, "manifest.parquet"), pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
    run_output.write_block(table, RUN, block(make_row, [2]))
    settled = run_output.settle(table, RUN, run_output.finished(table, RUN), images=3)
    record = RunRecord(run_id=RUN, label_id="l", input={"uri": "i"}, images=3, planned_at=datetime.now(UTC))
    table.begin_run(record)
    table.commit_run(RUN, settled)
    assert parquet_rows(table) == 3
    run_output.write_block(table, RUN, block(make_row, [1]))  # a worker that outlived its driver
    table.begin_run(record)  # ... which died between its commit and its last word
    assert table.find_open_run("l", {"uri": "i"}) is None
    assert parquet_rows(table) == 3


def test_local_listing_ignores_other_files(tmp_path: Path, make_row: Any) -> None:
    table = open_table(Storage(), str(tmp_path / "t"))
    write(table, make_row, "a_000000", [0])
    (tmp_path / "t" / f"run={RUN}" / "notes.txt").write_text("not data")
    assert len(run_output.finished(table, RUN)) == 1
