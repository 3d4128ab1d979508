"""Runs leave the table in one transaction, whoever else writes; files are deleted when they are no longer needed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from masklake.model.errors import ConfigError
from masklake.pipeline.errors import LeaseHeldError, RunNotFoundError, StorageError, TableError
from masklake.pipeline.labelling import upkeep
from masklake.pipeline.labelling.lease import UPKEEP, Lease
from masklake.pipeline.labelling.upkeep import drop, rollback, vacuum
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.log import COMMITTED, DROPPED, DeltaLog
from masklake.pipeline.table.query import query
from masklake.pipeline.table.runs import RunRecord
from masklake.pipeline.table.table import Table, open_table

NOW = timedelta(0)
WEEK = timedelta(days=7)

Night = Callable[..., Table]


def begin(table: Table, run_id: str, label_id: str = "label-a", **changes: Any) -> None:
    """The record of a planned run, as `label` writes it, of an input of its own."""
    known = {"run_id": run_id, "label_id": label_id, "input": {"uri": run_id}, "images": 1, "planned_at": datetime.now(UTC)}
    table.begin_run(RunRecord.model_validate(known | changes))


def writer(uri: str, write_run: Any, make_row: Any) -> Night:
    """Returns a function that writes one run of a table: its record and, unless told otherwise, its commit."""

    def write(run_id: str, uris: str = "a", commit: bool = True, record: bool = True) -> Table:
        if record:
            begin(open_table(Storage(), uri), run_id)
        rows = [make_row(index, image, labelled_at=datetime.now(UTC)) for index, image in enumerate(uris)]
        return write_run(uri, run_id, rows, rows_per_file=2, commit=commit)

    return write


@pytest.fixture
def night(tmp_path: Path, write_run: Any, make_row: Any) -> Night:
    """Write one run of a local table."""
    return writer(str(tmp_path / "table"), write_run, make_row)


@pytest.fixture
def night_anywhere(place: str, write_run: Any, make_row: Any) -> Night:
    """Write one run of a local table, then of one in a bucket."""
    return writer(place + "/table", write_run, make_row)


def rows_of(table: Table) -> dict[str, str]:
    """The uris of each run, as a reader of the log sees them."""
    found: dict[str, str] = {}
    for row in table.dataset().to_table().sort_by("uri").select(["run", "uri"]).to_pylist():
        found[row["run"]] = found.get(row["run"], "") + row["uri"]
    return found


def on_disk(table: Table) -> dict[str, int]:
    """Data files in each run's folder."""
    found: dict[str, int] = {}
    for batch in table.storage.list_objects(table.uri):
        for uri in batch["uri"].to_pylist():
            if uri.endswith(".parquet"):
                folder = uri[len(table.uri) + 1 :].partition("/")[0]
                found[folder] = found.get(folder, 0) + 1
    return found


# -- drop --------------------------------------------------------------------------------------------------------------


def test_a_dropped_run_is_gone_in_one_transaction_and_its_files_stay(night_anywhere: Night) -> None:
    night_anywhere("n1", "ab")
    table = night_anywhere("n2", "bcd")
    version, reader = table.version(), table.dataset()
    assert drop(table, "n2") == ["n2"]
    assert table.version() == version + 1
    assert rows_of(table) == {"n1": "ab"}
    assert (table.state("n1"), table.state("n2"), table.is_committed("n2")) == (COMMITTED, DROPPED, False)
    assert sorted(reader.to_table()["uri"].to_pylist()) == list("abbcd"), "who opened the table before reads on"
    record = table.run_record("n2")
    assert record is not None
    assert record.dropped_at is not None
    assert record.dropped_by is not None
    assert "@" in record.dropped_by
    assert record.status == "committed", "what an earlier version reads"


def test_the_earlier_row_of_an_image_is_current_again(night: Night) -> None:
    night("n1", "ab")
    table = night("n2", "b")
    sql = "SELECT uri, run FROM current_images ORDER BY uri"
    assert query(table.storage, table.uri, sql).to_pylist() == [{"uri": "a", "run": "n1"}, {"uri": "b", "run": "n2"}]
    drop(table, "n2")
    assert query(table.storage, table.uri, sql).to_pylist() == [{"uri": "a", "run": "n1"}, {"uri": "b", "run": "n1"}]


def test_any_delta_reader_sees_the_same_and_may_read_the_table(night: Night) -> None:
    """Spark, Trino and Athena read reader version 1; no command of ours may raise it."""
    for name in ("n1", "n2", "n3"):
        table = night(name)
    drop(table, "n1")
    rollback(table, "n2")
    vacuum(table, NOW)
    other = DeltaTable(table.uri)
    assert set(other.to_pyarrow_table()["run"].to_pylist()) == {"n2"}
    protocol = other.protocol()
    assert (protocol.min_reader_version, protocol.min_writer_version) == (1, 2)
    assert (protocol.reader_features, protocol.writer_features) == (None, None)


def test_what_is_not_in_the_table_cannot_be_dropped(night: Night) -> None:
    night("n1")
    table = night("open", commit=False)
    drop(table, "n1")
    version = table.version()
    for remove in (drop, rollback):
        with pytest.raises(RunNotFoundError, match=r"run n1 was dropped .* before; see masklake runs"):
            remove(table, "n1")
        with pytest.raises(RunNotFoundError, match=r"run open is not committed, so .* holds nothing of it"):
            remove(table, "open")
        with pytest.raises(RunNotFoundError, match="has no run never"):
            remove(table, "never")
        with pytest.raises(ConfigError, match=r"run id '\.\./n1'"):
            remove(table, "../n1")
    assert table.version() == version


def test_a_table_without_a_log_has_no_run_to_drop(tmp_path: Path) -> None:
    table = open_table(Storage(), str(tmp_path / "table"))
    table.initialise()
    with pytest.raises(RunNotFoundError, match="holds no committed run"):
        drop(table, "n1")
    assert vacuum(table, NOW).files == 0


def test_a_dry_run_changes_nothing(night: Night) -> None:
    for name in ("n1", "n2", "n3"):
        table = night(name)
    drop(table, "n3")
    version, files = table.version(), on_disk(table)
    assert drop(table, "n2", dry_run=True) == ["n2"]
    assert rollback(table, "n1", dry_run=True) == ["n2"]
    assert vacuum(table, NOW, dry_run=True).files == 1
    assert (table.version(), on_disk(table)) == (version, files)


def test_a_run_whose_record_is_lost_can_be_dropped(night: Night) -> None:
    table = night("n1", record=False)
    night("n2")
    assert drop(table, "n1") == ["n1"]
    assert rows_of(table) == {"n2": "a"}


def test_a_run_that_was_dropped_before_anybody_closed_it_is_no_open_run(night: Night) -> None:
    """Its driver died right after the commit: the pointer to it is still there."""
    table = night("n1")
    begin(table, "n1")
    drop(table, "n1")
    for _ in range(2):
        assert table.find_open_run("label-a", {"uri": "n1"}) is None
    record = table.run_record("n1")
    assert record is not None
    assert record.dropped_at is not None


def test_a_driver_that_comes_late_cannot_bring_a_dropped_run_back(night: Night) -> None:
    table = night("n1")
    drop(table, "n1")
    with pytest.raises(TableError, match="run n1 was dropped"):
        table.commit_run("n1")
    assert table.files() == []


# -- rollback ----------------------------------------------------------------------------------------------------------


def test_a_rollback_leaves_the_table_as_it_was_right_after_the_run(night_anywhere: Night) -> None:
    for name in ("n1", "n3", "n2", "n4"):  # by commit, not by name
        table = night_anywhere(name, name[1])
    version = table.version()
    assert rollback(table, "n3") == ["n2", "n4"]
    assert table.version() == version + 1
    assert rows_of(table) == {"n1": "1", "n3": "3"}
    assert rollback(table, "n3") == []
    assert table.version() == version + 1, "nothing to do is no transaction"
    night_anywhere("n5", "5")
    assert rollback(table, "n1") == ["n3", "n5"], "what was dropped before is not dropped again"


def test_a_rollback_over_many_transactions(night: Night) -> None:
    """More than are read at a time."""
    names = [f"n{number}" for number in range(20)]
    for name in names:
        table = night(name)
    assert rollback(table, "n1") == names[2:]


def test_a_log_that_forgot_the_order_is_told(night: Night) -> None:
    night("n1")
    night("n2")
    table = night("n3")
    table.storage.delete(table.storage.join(table.uri, "_delta_log", f"{2:020}.json"))
    delta = DeltaLog(table.storage, table.uri)
    with pytest.raises(TableError, match=r"0002.json: is gone"):
        list(delta.entries(3))


# -- vacuum ------------------------------------------------------------------------------------------------------------


def test_vacuum_deletes_what_was_dropped_long_enough_ago(night_anywhere: Night) -> None:
    night_anywhere("n1", "abc")
    night_anywhere("n2", "d")
    table = night_anywhere("open", "e", commit=False)
    drop(table, "n1")
    kept = vacuum(table, WEEK)
    assert (kept.files, kept.kept_files, kept.unfinished_files) == (0, 2, 1)
    assert kept.kept_bytes > 0
    version = table.version()
    done = vacuum(table, NOW)
    assert (done.files, done.bytes, done.kept_files, done.unfinished_files) == (2, kept.kept_bytes, 0, 1)
    assert on_disk(table) == {"run=n2": 1, "run=open": 1}
    assert table.version() == version
    assert rows_of(table) == {"n2": "d"}
    assert vacuum(table, NOW).files == 0
    assert table.commit_run("open"), "the work of an unfinished run is whole"
    assert rows_of(table) == {"n2": "d", "open": "e"}


def test_the_age_of_a_dropped_run_is_that_of_its_drop(night: Night) -> None:
    night("n1")
    table = night("n2")
    drop(table, "n1")
    table.update_record("n1", dropped_at=datetime.now(UTC) - WEEK)
    assert vacuum(table, WEEK).files == 1


def test_the_log_knows_of_a_drop_that_did_not_reach_the_record(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    night("n1")
    table = night("n2")
    monkeypatch.setattr(Table, "update_record", lambda *_, **__: None)  # killed right after the transaction
    drop(table, "n1")
    assert (vacuum(table, WEEK).kept_files, vacuum(table, timedelta(microseconds=1)).files) == (1, 1)


def test_vacuum_removes_what_a_late_worker_left_in_a_committed_run(night: Night) -> None:
    table = night("n1")
    stray = table.storage.join(table.run_folder("n1"), "part-late.parquet")
    table.storage.write_bytes(stray, b"late")
    assert vacuum(table, WEEK).kept_files == 1
    assert vacuum(table, NOW).bytes == 4
    assert rows_of(table) == {"n1": "a"}


def test_vacuum_touches_nothing_else(night_anywhere: Night) -> None:
    """Other people's files, our private ones, and runs that the log does not know, with or without a record."""
    table = night_anywhere("n1")
    night_anywhere("lost", commit=False, record=False)
    others = ["notes.parquet", "other/run=n1/x.parquet", "_masklake/n1/x.parquet", "run=n1/readme.txt"]
    for name in others:
        table.storage.write_bytes(table.storage.join(table.uri, name), b"x")
    drop(table, "n1")
    assert vacuum(table, NOW).files == 1
    assert all(table.storage.is_file(table.storage.join(table.uri, name)) for name in others)
    assert on_disk(table)["run=lost"] == 1


def test_vacuum_leaves_a_run_alone_whose_folder_lacks_a_file_of_the_log(night: Night) -> None:
    """A store that lists late, or names files otherwise than the log: what is not in the list may be what is in the log."""
    table = night("n1", "abc")
    first, _ = table.files()
    table.storage.write_bytes(table.storage.join(table.run_folder("n1"), "other-name.parquet"), b"x")
    table.storage.delete(table.storage.join(table.uri, first[0]))
    assert vacuum(table, NOW).files == 0
    assert on_disk(table) == {"run=n1": 2}


def test_vacuum_keeps_the_files_of_a_run_that_is_committed_meanwhile(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its list of files and its look into the log."""
    night("n1")
    table = night("late", "bcd", commit=False)
    real = DeltaLog.snapshot

    def commits_first(self: DeltaLog) -> Any:
        monkeypatch.setattr(DeltaLog, "snapshot", real)
        assert table.commit_run("late")
        return real(self)

    listed = upkeep._data_files

    def lists(of: Table) -> Any:
        found = list(listed(of))
        monkeypatch.setattr(DeltaLog, "snapshot", commits_first)
        return found

    monkeypatch.setattr(upkeep, "_data_files", lists)
    assert vacuum(table, NOW).files == 0
    assert rows_of(table) == {"n1": "a", "late": "bcd"}


# -- others ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["n1", "open", "plan-0123", UPKEEP])
def test_all_is_refused_while_a_lease_lives(night: Night, name: str) -> None:
    table = night("n1")
    night("open", commit=False)
    version = table.version()
    with Lease.acquire(table.storage, table.uri, name):
        for act in (lambda: drop(table, "n1"), lambda: vacuum(table, NOW)):
            with pytest.raises(LeaseHeldError, match=rf"by .*\(process {os.getpid()}\)"):
                act()
    assert (table.version(), on_disk(table)) == (version, {"run=n1": 1, "run=open": 1})
    drop(table, "n1")
    assert vacuum(table, NOW).files == 1


def test_a_rollback_is_refused_while_a_lease_lives(night_anywhere: Night) -> None:
    night_anywhere("n1")
    table = night_anywhere("n2")
    with Lease.acquire(table.storage, table.uri, "other"), pytest.raises(LeaseHeldError, match="run other is being written"):
        rollback(table, "n1")
    assert rollback(table, "n1") == ["n2"]


def test_a_commit_that_wins_is_not_dropped_with_it(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run takes the version that the drop was about to write."""
    night("n1")
    table = night("n2", "b", commit=False)
    real = DeltaLog.try_drop
    tried: list[int] = []

    def loses_once(self: DeltaLog, snapshot: Any, run_ids: Any, note: Any) -> bool:
        tried.append(snapshot.version())
        if len(tried) == 1:
            assert table.commit_run("n2")
        return real(self, snapshot, run_ids, note)

    monkeypatch.setattr(DeltaLog, "try_drop", loses_once)
    assert drop(table, "n1") == ["n1"]
    assert tried == [1, 2]
    assert rows_of(table) == {"n2": "b"}


def test_a_rollback_that_loses_looks_again_at_what_came_after(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    night("n1")
    night("n2")
    table = night("n3", commit=False)
    real = DeltaLog.try_drop
    tried: list[list[str]] = []

    def loses_once(self: DeltaLog, snapshot: Any, run_ids: Any, note: Any) -> bool:
        tried.append(list(run_ids))
        if len(tried) == 1:
            assert table.commit_run("n3")
        return real(self, snapshot, run_ids, note)

    monkeypatch.setattr(DeltaLog, "try_drop", loses_once)
    assert rollback(table, "n1") == ["n2", "n3"]
    assert tried == [["n2"], ["n2", "n3"]]
    assert rows_of(table) == {"n1": "a"}


@pytest.mark.slow
def test_drops_and_commits_at_once_all_take_effect(night_anywhere: Night) -> None:
    names = [f"n{index}" for index in range(4)]
    for name in names:
        table = night_anywhere(name, name[1])
    for index in range(3):
        night_anywhere(f"new-{index}", "x", commit=False)

    def commit(index: int) -> bool:
        return Table(Storage(), table.uri).commit_run(f"new-{index}")

    with ThreadPoolExecutor(5) as pool:
        commits = [pool.submit(commit, index) for index in range(3)]
        assert rollback(Table(Storage(), table.uri), "n1")[:2] == ["n2", "n3"]
        assert all(done.result() for done in commits)
    left = rows_of(table)
    assert {name: left[name] for name in ("n0", "n1")} == {"n0": "0", "n1": "1"}
    assert not {"n2", "n3"} & set(left)
    states = {f"new-{index}": table.state(f"new-{index}") for index in range(3)}
    assert {name for name, state in states.items() if state == COMMITTED} == set(left) - {"n0", "n1"}


@pytest.mark.slow
@pytest.mark.parametrize("status", [None, 502])
def test_a_drop_whose_reply_is_lost_is_made_once(
    s3: Any, s3_proxy: Any, write_run: Any, make_row: Any, status: int | None
) -> None:
    for name in ("n1", "n2", "n3"):
        table = write_run(s3.uri("table"), name, [make_row(0, "a.jpg")])
    rule = s3_proxy.drop_reply("PUT", f"_delta_log/{4:020}.json", status=status)
    assert rollback(table, "n1") == ["n2", "n3"]
    assert rule.hits == 1
    assert (table.version(), rows_of(table)) == (4, {"n1": "a.jpg"})


def test_a_store_that_is_busy_is_asked_again(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    table = night("n1")
    real, tries = DeltaLog.try_drop, []

    def busy_once(self: DeltaLog, snapshot: Any, run_ids: Any, note: Any) -> bool:
        tries.append(run_ids)
        if len(tries) == 1:
            error = StorageError("the store is overloaded")
            error.may_pass = True
            raise error
        return real(self, snapshot, run_ids, note)

    monkeypatch.setattr(DeltaLog, "try_drop", busy_once)
    assert drop(table, "n1") == ["n1"]
    assert len(tries) == 2
    assert table.files() == []


# -- any order ---------------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """The table as it should be: a list of commits, and what is on the disk."""

    commits: list[str] = field(default_factory=list)
    uris: dict[str, str] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    on_disk: set[str] = field(default_factory=set)
    open: set[str] = field(default_factory=set)
    versions: int = 0

    @property
    def live(self) -> list[str]:
        return [run for run in self.commits if run not in self.dropped]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["commit", "begin", "finish", "drop", "rollback", "vacuum"]),
        st.integers(0, 9),
        st.text("abc", min_size=1),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_any_sequence_leaves_the_table_that_a_list_of_runs_predicts(steps: Any, write_run: Any, make_row: Any) -> None:
    model = Model()
    with tempfile.TemporaryDirectory() as folder:
        table = open_table(Storage(), folder + "/table")
        table.initialise()
        for number, (action, pick, text) in enumerate(steps):
            take(table, model, f"run-{number}", action, pick, "".join(sorted(set(text))), write_run, make_row)
            check(table, model)
        check_views(table, model)


def take(table: Table, model: Model, new: str, action: str, pick: int, uris: str, write_run: Any, make_row: Any) -> None:
    if action in ("commit", "begin"):
        at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=int(new[4:]))
        begin(table, new)
        write_run(table.uri, new, [make_row(i, uri, labelled_at=at) for i, uri in enumerate(uris)], commit=action == "commit")
        model.uris[new] = uris
        model.on_disk.add(new)
        model.commits += [new] if action == "commit" else []
        model.open |= {new} if action == "begin" else set()
        model.versions += action == "commit"
    elif action == "finish" and model.open:
        run = sorted(model.open)[pick % len(model.open)]
        model.open.remove(run)
        assert table.commit_run(run)
        model.commits.append(run)
        model.versions += 1
    elif action in ("drop", "rollback") and model.live:
        run = model.live[pick % len(model.live)]
        later = model.live[model.live.index(run) + 1 :]
        expected = [run] if action == "drop" else later
        assert (drop if action == "drop" else rollback)(table, run) == expected
        model.dropped |= set(expected)
        model.versions += bool(expected)
    elif action == "vacuum":
        old = pick % 2 == 0
        gone = model.on_disk & model.dropped
        done = vacuum(table, NOW if old else WEEK)
        assert (done.files, done.kept_files, done.unfinished_files) == (
            len(gone) if old else 0,
            0 if old else len(gone),
            len(model.open),
        )
        model.on_disk -= gone if old else set()


def check(table: Table, model: Model) -> None:
    assert {path.parent.name for path in Path(table.uri).rglob("*.parquet")} == {f"run={run}" for run in model.on_disk}
    assert table.version() == (model.versions or -1)
    assert {run for _, run in table.files()} == set(model.live)
    if model.live:
        assert rows_of(table) == {run: model.uris[run] for run in model.live}


def check_views(table: Table, model: Model) -> None:
    if not model.live:
        return
    newest: dict[str, str] = {}
    for run in sorted(model.live, key=lambda run: int(run[4:])):  # by the time of labelling
        newest |= dict.fromkeys(model.uris[run], run)
    shown = query(table.storage, table.uri, "SELECT uri, run FROM current_images").to_pylist()
    assert {row["uri"]: row["run"] for row in shown} == newest


def test_the_log_says_who_dropped_what(night: Night) -> None:
    night("n1")
    table = night("n2")
    drop(table, "n1")
    log = table.storage.read_bytes(table.storage.join(table.uri, "_delta_log", f"{3:020}.json"))
    (note,) = [entry["commitInfo"]["masklake"] for entry in map(json.loads, log.splitlines()) if "commitInfo" in entry]
    assert set(note) == {"dropped_at", "dropped_by", "token"}
