"""The list of runs: states from the log and the leases, numbers from the records, and nothing from the rows."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from masklake.pipeline.errors import TableError
from masklake.pipeline.labelling.lease import Lease
from masklake.pipeline.labelling.run_list import RunInfo, list_runs
from masklake.pipeline.labelling.upkeep import drop, vacuum
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.runs import RunRecord
from masklake.pipeline.table.table import Table, open_table

DAY = datetime(2026, 1, 1, tzinfo=UTC)
START = {"started_at": DAY, "by": "ann@host", "seconds": 1800.0, "workers": 2, "gpus": 2, "device": "cuda", "price_per_hour": 4}


def begin(table: Table, run_id: str, number: int = 0, **changes: Any) -> None:
    known = {"run_id": run_id, "label_id": "l", "input": {"uri": f"/{run_id}"}, "images": 90}
    table.begin_run(RunRecord.model_validate(known | {"planned_at": DAY + timedelta(days=number)} | changes))


def states(table: Table) -> dict[str, str]:
    return {run.run_id: str(run.state) for run in list_runs(table)}


def test_each_state_is_told(place: str, write_run: Any, make_row: Any) -> None:
    table = open_table(Storage(), place + "/table")
    for number, name in enumerate(("z-first", "dropped", "open", "new", "working")):
        begin(table, name, number)
    for name in ("z-first", "dropped"):
        write_run(table.uri, name, [make_row(0, f"{name}.jpg")])
    write_run(table.uri, "open", [make_row(0, "open.jpg")], commit=False)
    drop(table, "dropped")
    with Lease.acquire(table.storage, table.uri, "working"), Lease.acquire(table.storage, table.uri, "z-first"):
        found = list_runs(table)
    assert [(run.run_id, str(run.state)) for run in found] == [
        ("z-first", "committed"),
        ("dropped", "dropped"),
        ("open", "interrupted"),
        ("new", "interrupted"),
        ("working", "running"),
    ]
    assert [bool(run.held_by) for run in found] == [False, False, False, False, True]
    assert found[1].dropped_at is not None
    assert states(table)["working"] == "interrupted"


def test_the_numbers_are_those_of_the_record(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    table = open_table(Storage(), str(tmp_path / "table"))
    later = START | {"started_at": DAY + timedelta(hours=5), "by": "bob@host", "gpus": 0, "seconds": 1800.0}
    begin(table, "n1", model_id="tiny-0", statuses={"ok": 88, "missing": 2}, starts=[START, later])
    write_run(table.uri, "n1", [make_row(0, "a.jpg")])
    for file, _ in table.files():
        table.storage.delete(table.storage.join(table.uri, file))  # the rows are not looked at
    (run,) = list_runs(table)
    record = table.run_record("n1")
    assert record is not None
    assert run == RunInfo.model_validate(
        {
            "run_id": "n1",
            "state": "committed",
            "images": 90,
            "statuses": {"ok": 88, "missing": 2},
            "seconds": 3600,
            "images_per_s": 90 / 3600,
            "gpu_hours": 1.0,
            "cost": 4.0,
            "starts": 2,
            "model_id": "tiny-0",
            "label_id": "l",
            "input": "/n1",
            "by": "bob@host",
            "planned_at": DAY,
            "started_at": DAY,
            "committed_at": record.committed_at,
        }
    )


def test_an_unfinished_run_has_no_results(tmp_path: Path) -> None:
    """Its driver may have died between its summary and its commit."""
    table = open_table(Storage(), str(tmp_path / "table"))
    table.initialise()
    begin(table, "n1", statuses={"ok": 90}, starts=[START])
    (run,) = list_runs(table)
    assert (run.statuses, run.images_per_s, run.seconds) == (None, None, 1800)


OF_THE_FIRST_VERSION = {
    "run_id": "old",
    "label_id": "l",
    "input": {"uri": "/photos", "column": None},
    "images": 3,
    "status": "committed",
    "planned_at": "2026-11-21T10:00:00Z",
    "committed_at": "2026-11-21T10:05:00Z",
    "model_id": "tiny-0123456789ab",
    "weights": "w.safetensors",
    "listed": 4,
    "left_out": {},
    "left_out_names": {},
}


def test_a_record_of_an_earlier_version_is_listed_with_blanks(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    table = open_table(Storage(), str(tmp_path / "table"))
    table.storage.write_bytes(table.private("old", "run.json"), json.dumps(OF_THE_FIRST_VERSION).encode())
    write_run(table.uri, "old", [make_row(0, "a.jpg")])
    (run,) = list_runs(table)
    assert (run.state, run.images, run.model_id, run.input) == ("committed", 3, "tiny-0123456789ab", "/photos")
    assert (run.statuses, run.seconds, run.images_per_s, run.gpu_hours, run.cost, run.by) == (None,) * 6
    table.update_record("old", statuses={"ok": 3})
    kept = json.loads(table.storage.read_bytes(table.private("old", "run.json")))
    assert kept["listed"] == 4, "nothing of it is lost"


def test_a_run_whose_record_is_lost_is_listed_all_the_same(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    table = write_run(str(tmp_path / "table"), "n1", [make_row(0, "a.jpg")])
    assert list_runs(table) == [RunInfo.model_validate({"run_id": "n1", "state": "committed"})]


def test_a_driver_that_died_right_after_its_commit_left_a_committed_run(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    table = write_run(str(tmp_path / "table"), "n1", [make_row(0, "a.jpg")])
    begin(table, "n1", statuses={"ok": 1})  # the record as it stood before it was closed
    (run,) = list_runs(table)
    assert (run.state, run.statuses, run.committed_at) == ("committed", {"ok": 1}, None)


def test_the_log_knows_of_a_drop_that_did_not_reach_the_record(
    tmp_path: Path, write_run: Any, make_row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = open_table(Storage(), str(tmp_path / "table"))
    begin(table, "n1")
    write_run(table.uri, "n1", [make_row(0, "a.jpg")])
    with monkeypatch.context() as killed:
        killed.setattr(Table, "update_record", lambda *_, **__: None)
        drop(table, "n1")
    (run,) = list_runs(table)
    assert run.state == "dropped"
    assert run.dropped_at is not None
    assert run.dropped_by is not None


def test_a_dropped_run_is_listed_after_its_files_are_gone(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    table = open_table(Storage(), str(tmp_path / "table"))
    begin(table, "n1")
    write_run(table.uri, "n1", [make_row(0, "a.jpg")])
    drop(table, "n1")
    vacuum(table, timedelta(0))
    assert states(table) == {"n1": "dropped"}


def test_where_there_is_no_table_there_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="does not exist"):
        list_runs(open_table(Storage(), str(tmp_path / "table")))
    table = open_table(Storage(), str(tmp_path / "empty"))
    table.initialise()
    assert list_runs(table) == []


def test_a_record_that_is_damaged_is_told(tmp_path: Path) -> None:
    table = open_table(Storage(), str(tmp_path / "table"))
    table.initialise()
    table.storage.write_bytes(table.private("n1", "run.json"), b"{")
    with pytest.raises(TableError, match=r"n1/run.json: is not a run's record"):
        list_runs(table)
