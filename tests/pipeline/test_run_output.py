"""Which of a run's files count, what is missing, and each image once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import run_output
from pipeline.schema import FILE_SCHEMA, MANIFEST_SCHEMA
from pipeline.storage import Storage
from pipeline.table import Table, open_table

RUN = "run-1"


@pytest.fixture
def table(place: str) -> Table:
    return open_table(Storage(), place + "/table")


def put(table: Table, uri: str, rows: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    table.storage.write_bytes(uri, sink.getvalue().to_pybytes())


def write(table: Table, make_row: Any, name: str, ids: list[int], checkpoint: str | None = ".parquet") -> None:
    """A block as Ray Data writes it: the data, and its checkpoint in one of its two phases."""
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
    chosen = run_output.manifest_rows(table, RUN, np.array([3, 40]))
    assert chosen.to_pylist() == [rows[3], rows[40]]


def test_local_listing_ignores_other_files(tmp_path: Path, make_row: Any) -> None:
    table = open_table(Storage(), str(tmp_path / "t"))
    write(table, make_row, "a_000000", [0])
    (tmp_path / "t" / f"run={RUN}" / "notes.txt").write_text("not data")
    assert len(run_output.finished(table, RUN)) == 1
