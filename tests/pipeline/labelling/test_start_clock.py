"""The time of each start of a run is in its record, also of a start that was killed."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from masklake.pipeline.errors import LeaseLostError, StorageError
from masklake.pipeline.labelling.start_clock import StartClock
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.runs import RunRecord, Start
from masklake.pipeline.table.table import Table, open_table

START = Start(started_at=datetime(2026, 1, 1, tzinfo=UTC), by="ann@host", workers=2, gpus=2, device="cuda", price_per_hour=3.6)


@pytest.fixture
def table(tmp_path: Path) -> Table:
    table = open_table(Storage(), str(tmp_path / "table"))
    record = {"run_id": "n1", "label_id": "l", "input": {"uri": "i"}, "images": 10, "planned_at": datetime.now(UTC)}
    table.begin_run(RunRecord.model_validate(record | {"left_out": {"other_files": 1}}))
    return table


def record_of(table: Table) -> RunRecord:
    record = table.run_record("n1")
    assert record is not None
    return record


def test_starts_add_up(table: Table) -> None:
    assert (record_of(table).seconds, record_of(table).gpu_hours, record_of(table).cost) == (None, None, None)
    for number in (1, 2):
        with StartClock(table, "n1", START, lambda: None):
            assert len(record_of(table).starts) == number, "from the beginning"
            time.sleep(0.05)
    record = record_of(table)
    assert [start.seconds >= 0.05 for start in record.starts] == [True, True]
    seconds = sum(start.seconds for start in record.starts)
    assert record.seconds == pytest.approx(seconds)
    assert record.gpu_hours == pytest.approx(2 * seconds / 3600)
    assert record.cost == pytest.approx(seconds * 3.6 / 3600)
    assert record.model_extra == {"left_out": {"other_files": 1}}, "the rest of the record stays"


def test_the_cost_is_unknown_unless_each_start_had_a_price(table: Table) -> None:
    for start in (START, START.model_copy(update={"price_per_hour": None})):
        with StartClock(table, "n1", start, lambda: None):
            pass
    assert record_of(table).cost is None
    assert record_of(table).seconds is not None


def test_a_start_that_is_killed_has_left_notes(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = threading.Event()
    real = Table.update_record

    def update(self: Table, run_id: str, **changes: object) -> None:
        real(self, run_id, **changes)
        if record_of(table).starts[0].seconds > 0.01:
            noted.set()

    monkeypatch.setattr(Table, "update_record", update)
    with StartClock(table, "n1", START, lambda: None, every_s=0.02):
        assert noted.wait(timeout=60), "while it runs"


def test_an_error_of_the_work_is_the_one_that_is_raised(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise StorageError("no space")

    def work() -> None:
        with StartClock(table, "n1", START, lambda: None):
            monkeypatch.setattr(Table, "update_record", refused)
            raise ValueError("of the work")

    with pytest.raises(ValueError, match="of the work"):
        work()


def test_a_driver_that_lost_its_lease_leaves_the_record_alone(table: Table) -> None:
    lost: list[LeaseLostError] = []

    def check() -> None:
        if lost:
            raise lost[0]

    def work() -> None:
        with StartClock(table, "n1", START, check):
            lost.append(LeaseLostError("another driver took it over"))
            table.update_record("n1", starts=[])

    with pytest.raises(LeaseLostError):
        work()
    assert record_of(table).starts == ()
