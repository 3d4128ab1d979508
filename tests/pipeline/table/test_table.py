"""A run enters the table in one transaction, once; nothing else does."""

from __future__ import annotations

import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from masklake.model.errors import ConfigError
from masklake.pipeline.errors import AccessDeniedError, InputNotFoundError, LeaseLostError, StorageError, TableError
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.log import DeltaLog
from masklake.pipeline.table.runs import RunRecord, input_key
from masklake.pipeline.table.schema import SCHEMA_VERSION, TABLE_SCHEMA
from masklake.pipeline.table.table import Table, open_table

SPEC = {"uri": "/data", "column": None}


def record(run_id: str, label_id: str = "label-a") -> RunRecord:
    return RunRecord(run_id=run_id, label_id=label_id, input=SPEC, images=3, planned_at=datetime.now(UTC))


def test_a_committed_run_reads_back_with_every_type(place: str, write_run: Any, make_row: Any) -> None:
    rows = [make_row(index, f"{index}.jpg") for index in range(7)] + [make_row(7, "bad.jpg", status="decode_error")]
    table = write_run(place, "night-1", rows, rows_per_file=3)
    read = table.dataset().to_table().sort_by("image_id")
    assert read.schema.equals(TABLE_SCHEMA)
    assert read.to_pylist() == [row | {"run": "night-1"} for row in rows]


def test_the_log_is_plain_delta(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    """Any Delta reader sees the same rows."""
    uri = str(tmp_path / "table")
    write_run(uri, "night-1", [make_row(index, f"{index}.jpg") for index in range(5)], rows_per_file=2)
    other = pa.table(DeltaTable(uri).to_pyarrow_table())
    assert other.num_rows == 5
    assert set(other["run"].to_pylist()) == {"night-1"}


def copy_commits(log: Path, first: int, last: int) -> None:
    """Copies of commit 1 under other runs' names: a log as long as that many runs make it."""
    commit = (log / f"{1:020}.json").read_text()
    for version in range(first, last + 1):
        (log / f"{version:020}.json").write_text(commit.replace("night-1", f"copy-{version}"))


@pytest.mark.parametrize("interval", [2**31 - 1, 100], ids=["ours", "an earlier version's"])
def test_a_long_log_puts_no_parquet_beside_the_data(tmp_path: Path, write_run: Any, make_row: Any, interval: int) -> None:
    """By Delta's default version 99 brings a checkpoint, which `**/*.parquet` would count."""
    table = write_run(str(tmp_path / "table"), "night-1", [make_row(0, "a.jpg")])
    log = Path(table.uri, "_delta_log")
    created = log / f"{0:020}.json"
    created.write_text(created.read_text().replace(str(2**31 - 1), str(interval)))
    assert DeltaTable(table.uri).metadata().configuration == {"delta.checkpointInterval": str(interval)}
    copy_commits(log, 2, 97)
    for number in range(98, 103):
        write_run(table.uri, f"night-{number}", [make_row(0, f"{number}.jpg")])
    assert table.version() == 102
    assert sorted(path.parent.name for path in Path(table.uri).rglob("*.parquet")) == sorted(
        ["run=night-1", *(f"run=night-{number}" for number in range(98, 103))]
    )


def test_a_log_of_a_thousand_transactions_gets_a_checkpoint(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    table = write_run(str(tmp_path / "table"), "night-1", [make_row(0, "a.jpg")])
    log = Path(table.uri, "_delta_log")
    copy_commits(log, 2, 999)
    write_run(table.uri, "night-2", [make_row(0, "b.jpg")])
    assert table.version() == 1000
    assert [path.name for path in log.glob("*.parquet")] == [f"{1000:020}.checkpoint.parquet"]
    assert len(list(log.glob("*.json"))) == 1001, "no entry is cleaned up"
    assert table.is_committed("copy-5")
    assert table.is_committed("night-2")
    write_run(table.uri, "night-3", [make_row(0, "c.jpg")])
    data = sorted(str(path.parent.name) for path in Path(table.uri).glob("run=*/*.parquet"))
    assert data == ["run=night-1", "run=night-2", "run=night-3"]


def test_a_checkpoint_that_cannot_be_written_fails_no_commit(
    tmp_path: Path, write_run: Any, make_row: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: DeltaTable) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("masklake.pipeline.table.log.CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(DeltaTable, "create_checkpoint", full)
    table = write_run(str(tmp_path / "table"), "night-1", [make_row(0, "a.jpg")])
    assert table.is_committed("night-1")
    assert "the checkpoint of the log was not written" in caplog.text


def test_other_writers_of_the_log_write_no_checkpoint_either(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    table = write_run(str(tmp_path / "table"), "night-1", [make_row(0, "a.jpg")])
    copy_commits(Path(table.uri, "_delta_log"), 2, 97)
    for _ in range(3):
        DeltaTable(table.uri).alter.set_table_properties({"delta.appendOnly": "false"})
    assert table.version() == 100
    assert [path.parent.name for path in Path(table.uri).rglob("*.parquet")] == ["run=night-1"]


def test_an_uncommitted_run_is_invisible(place: str, write_run: Any, make_row: Any) -> None:
    table = write_run(place, "night-1", [make_row(0, "a.jpg")])
    write_run(place, "night-2", [make_row(0, "b.jpg")], commit=False)
    assert table.dataset().to_table()["uri"].to_pylist() == ["a.jpg"]
    assert not table.is_committed("night-2")
    assert table.commit_run("night-2")
    assert sorted(table.dataset().to_table()["uri"].to_pylist()) == ["a.jpg", "b.jpg"]


def test_a_run_is_committed_once(place: str, write_run: Any, make_row: Any) -> None:
    table = write_run(place, "night-1", [make_row(0, "a.jpg")])
    version = table.version()
    assert not table.commit_run("night-1")
    assert table.version() == version
    assert table.dataset().count_rows() == 1


@pytest.mark.slow
def test_two_drivers_that_commit_one_run_at_once_add_it_once(place: str, write_run: Any, make_row: Any) -> None:
    """The log's version decides, whatever became of the lease."""
    write_run(place, "night-0", [make_row(0, "z.jpg")])
    table = write_run(place, "night-1", [make_row(index, f"{index}.jpg") for index in range(4)], commit=False)
    results: list[bool] = []
    start = threading.Barrier(6)

    def commit() -> None:
        start.wait()
        results.append(open_table(Storage(), place).commit_run("night-1"))

    threads = [threading.Thread(target=commit) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 5 + [True]
    assert table.dataset().count_rows() == 5


@pytest.mark.slow
def test_runs_that_commit_at_once_all_enter(place: str, write_run: Any, make_row: Any) -> None:
    names = [f"night-{index}" for index in range(5)]
    for name in names:
        table = write_run(place, name, [make_row(0, f"{name}.jpg")], commit=False)
    threads = [threading.Thread(target=Table(Storage(), table.uri).commit_run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(table.dataset().to_table()["run"].to_pylist()) == names


def test_writers_that_create_the_table_at_once_all_get_it(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several creations at one moment Delta lets one win; the others open what it made."""
    tables = [Table(Storage(), place) for _ in range(6)]
    for table in tables:
        table.initialise()
    start = threading.Barrier(len(tables))
    absent = DeltaLog.snapshot

    def none_at_first(self: DeltaLog) -> DeltaTable | None:
        found = absent(self)
        if not hasattr(self, "asked"):
            self.asked = True  # type: ignore[attr-defined]
            start.wait(timeout=60)  # nobody creates before everybody has seen that there is none
        return found

    monkeypatch.setattr(DeltaLog, "snapshot", none_at_first)
    with ThreadPoolExecutor(len(tables)) as pool:
        deltas = list(pool.map(lambda table: table.log.snapshot_or_created(), tables))
    assert [delta.version() for delta in deltas] == [0] * len(tables)


def test_filters_hold(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    """Partial statistics once made filters return nothing: the log carries row counts only."""
    rows = [make_row(index, f"{index}.jpg", status="ok" if index % 2 else "missing") for index in range(10)]
    table = write_run(str(tmp_path / "table"), "night-1", rows, rows_per_file=2)
    for dataset in (table.dataset(), DeltaTable(table.uri).to_pyarrow_dataset()):
        assert dataset.count_rows(filter=pc.field("status") == "missing") == 5
        assert dataset.count_rows(filter=pc.field("uri") == "3.jpg") == 1
        assert dataset.count_rows(filter=pc.field("image_id") >= 8) == 2


def test_tidying_touches_no_committed_file_and_no_other_run(place: str, write_run: Any, make_row: Any) -> None:
    table = write_run(place, "night-1", [make_row(index, f"{index}.jpg") for index in range(4)], rows_per_file=2)
    write_run(place, "night-2", [make_row(0, "other.jpg")], commit=False)
    stray = table.storage.join(table.run_folder("night-1"), "part-late.parquet")
    table.storage.write_bytes(stray, b"a worker that outlived its driver")
    table.tidy("night-1")
    assert [file.rows for file in table.run_files("night-1")] == [2, 2]
    table.tidy("night-2")
    assert [file.rows for file in table.run_files("night-2")] == [1], "nothing is known of what was not committed"


def test_files_without_rows_stay_out(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    table = write_run(str(tmp_path / "table"), "night-1", [make_row(0, "a.jpg")], commit=False)
    empty = Path(table.run_folder("night-1"), "empty.parquet")
    pq.write_table(
        pq.read_table(Path(table.run_folder("night-1"), "part-000000.parquet"), partitioning=None).slice(0, 0), empty
    )
    assert [file.rows for file in table.run_files("night-1")] == [0, 1]
    table.commit_run("night-1")
    assert len(table.files()) == 1


def test_a_run_of_nothing_commits(tmp_path: Path) -> None:
    table = open_table(Storage(), str(tmp_path / "table"))
    assert table.run_files("night-1") == []
    assert table.commit_run("night-1")
    assert table.is_committed("night-1")
    with pytest.raises(TableError, match="no committed run"):
        table.dataset()


def test_an_open_run_is_found_until_it_is_committed(place: str, write_run: Any, make_row: Any) -> None:
    table = open_table(Storage(), place)
    assert table.find_open_run("label-a", SPEC) is None
    table.begin_run(record("night-1"))
    found = table.find_open_run("label-a", SPEC)
    assert found is not None
    assert found.run_id == "night-1"
    assert table.find_open_run("label-b", SPEC) is None
    assert table.find_open_run("label-a", SPEC | {"uri": "/other"}) is None
    write_run(place, "night-1", [make_row(0, "a.jpg")])
    assert table.find_open_run("label-a", SPEC) is None
    closed = table.run_record("night-1")
    assert closed is not None
    assert closed.status == "committed"
    assert closed.committed_at is not None


def test_a_driver_that_died_right_after_its_commit_leaves_no_open_run(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    table = write_run(str(tmp_path / "table"), "night-1", [make_row(0, "a.jpg")])
    table.begin_run(record("night-1"))  # as it stood before the record was closed
    assert table.find_open_run("label-a", SPEC) is None
    closed = table.run_record("night-1")
    assert closed is not None
    assert closed.status == "committed"


def test_an_input_is_the_same_whatever_the_order_of_its_fields() -> None:
    assert input_key("a", {"uri": "x", "column": "y"}) == input_key("a", {"column": "y", "uri": "x"})
    assert input_key("a", SPEC) != input_key("b", SPEC)


@pytest.mark.parametrize("run_id", ["", "a/b", "..", "tick 1", "ü", "x" * 101, "a=b"])
def test_run_ids_that_are_no_folder_names_are_refused(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(ConfigError, match="run id"):
        open_table(Storage(), str(tmp_path)).run_folder(run_id)


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table").write_text("not a folder")
    with pytest.raises(TableError, match="is a file"):
        open_table(Storage(), str(tmp_path / "table"))


def test_a_newer_schema_is_refused(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    table = write_run(str(tmp_path / "table"), "night-1", [make_row(0, "a.jpg")])
    description = tmp_path / "table/_masklake/table.json"
    assert json.loads(description.read_text())["schema_version"] == SCHEMA_VERSION
    description.write_text(json.dumps({"schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(TableError, match="newer MaskLake"):
        open_table(Storage(), table.uri)


def test_someone_elses_delta_table_is_refused(tmp_path: Path) -> None:
    write_deltalake(str(tmp_path / "table"), pa.table({"x": [1]}))
    with pytest.raises(TableError, match="did not write"):
        open_table(Storage(), str(tmp_path / "table"))


def test_a_broken_description_is_told(tmp_path: Path) -> None:
    (tmp_path / "_masklake").mkdir()
    (tmp_path / "_masklake/table.json").write_text("{")
    with pytest.raises(TableError, match=r"table\.json"):
        open_table(Storage(), str(tmp_path))


def test_a_broken_log_is_told(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    table = write_run(str(tmp_path / "table"), "night-1", [make_row(0, "a.jpg")])
    for entry in Path(table.uri, "_delta_log").glob("*.json"):
        entry.write_text("not json\n")
    with pytest.raises(TableError, match="Delta log"):
        table.files()


@pytest.mark.slow
@pytest.mark.parametrize("status", [None, 502])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_commit_whose_reply_is_lost_is_made_once(
    s3: Any, s3_proxy: Any, write_run: Any, make_row: Any, version: int, status: int | None
) -> None:
    """Version 0 is the log's creation, 1 and 2 are the runs."""
    rule = s3_proxy.drop_reply("PUT", f"_delta_log/{version:020}.json", status=status)
    for run in range(2):
        table = write_run(s3.uri("table"), f"run-{run}", [make_row(0, "a.jpg")], commit=False)
        assert table.commit_run(f"run-{run}"), "it is our own"
    assert rule.hits == 1
    assert (table.version(), table.dataset().count_rows()) == (2, 2)


@pytest.mark.slow
def test_a_commit_that_is_refused_says_so(s3: Any, s3_proxy: Any, write_run: Any, make_row: Any) -> None:
    table = write_run(s3.uri("table"), "night-1", [make_row(0, "a.jpg")], commit=False)
    s3_proxy.answer(403, "AccessDenied", "PUT", "_delta_log/")
    with pytest.raises(AccessDeniedError, match=r"access denied .403 Forbidden AccessDenied"):
        table.commit_run("night-1")
    assert s3_proxy.count("PUT", "_delta_log/") == 1


@pytest.mark.parametrize("lost_at", [1, 2])
def test_each_attempt_to_commit_is_confirmed(
    tmp_path: Path, write_run: Any, make_row: Any, monkeypatch: pytest.MonkeyPatch, lost_at: int
) -> None:
    """The store is out of order for the first attempt, and meanwhile the lease is lost, or was before."""
    table = write_run(str(tmp_path / "table"), "night-1", [make_row(0, "a.jpg")], commit=False)
    real, tries = DeltaLog.try_append, []

    def busy_once(self: DeltaLog, delta: Any, run_id: str, actions: Any) -> bool:
        tries.append(run_id)
        if len(tries) == 1:
            error = StorageError("the store is overloaded")
            error.may_pass = True
            raise error
        return real(self, delta, run_id, actions)

    confirmed: list[int] = []

    def confirm() -> None:
        confirmed.append(len(tries))
        if len(confirmed) == lost_at:
            raise LeaseLostError("another driver took it over")

    monkeypatch.setattr(DeltaLog, "try_append", busy_once)
    with pytest.raises(LeaseLostError):
        table.commit_run("night-1", confirm=confirm)
    assert confirmed == list(range(lost_at))
    assert not table.is_committed("night-1")
    assert table.commit_run("night-1", confirm=lambda: None)


def test_a_log_that_cannot_be_created_says_why(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    table = write_run(str(tmp_path / "table"), "night-1", [make_row(0, "a.jpg")], commit=False)
    (tmp_path / "table/_delta_log").write_text("a file in the way")
    with pytest.raises(InputNotFoundError, match="table: is a file where a folder is needed"):
        table.commit_run("night-1")


def test_a_pointer_that_names_no_run_is_told(tmp_path: Path) -> None:
    """Cut off by a power cut, or edited by hand."""
    table = open_table(Storage(), str(tmp_path / "table"))
    table.begin_run(record("night-1"))
    (pointer,) = (tmp_path / "table/_masklake").glob("open-*.json")
    for content in ("", "{}", '{"run_id": "../r"}', "[]"):
        pointer.write_text(content)
        with pytest.raises(TableError, match=r"open-.*does not name a run .*remove it"):
            table.find_open_run("label-a", SPEC)
