"""Ticks of a scheduler, and drivers that meet at one run: what is labelled, under which name, and what is said. Without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from masklake.jobs import label
from masklake.jobs.label import LabelReport
from masklake.model.config import PredictOptions
from masklake.model.detector import load_detector
from masklake.pipeline.errors import LeaseHeldError
from masklake.pipeline.labelling import run_output
from masklake.pipeline.labelling.labeller import Labeller, LabelSpec
from masklake.pipeline.labelling.lease import Lease
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.table import open_table


class Killed(BaseException):
    """The driver is gone."""


class Drivers:
    """Starts of `label` that label in this process; one can be killed before it labels."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, table: Path, weights: Path) -> None:
        self.said: list[str] = []
        self.kill = False
        self._patch, self._folder, self._table, self._weights = patch, folder, table, weights
        patch.setattr(label, "_check_can_run", lambda *_: None)
        patch.setattr(label, "_stream_and_complete", self._label)
        self._model = load_detector(weights.read_bytes(), device="cpu")

    def _label(self, run: Any, files: Any, say: Any) -> Any:
        if self.kill:
            raise Killed
        spec = LabelSpec(Storage(), run.model_id, run.label_id, PredictOptions(), torch_threads=1)
        for rows in run_output.manifest_rows(run.table, run.plan.run_id, np.arange(run.plan.images)):
            run_output.write_block(run.table, run.plan.run_id, Labeller(spec, self._model)(rows))
        return run_output.finished(run.table, run.plan.run_id)

    def start(self, tick: str | None = None, **options: Any) -> LabelReport:
        values = {"input": {"uri": str(self._folder)}, "table": str(self._table), "weights": str(self._weights), "tick": tick}
        return label.run(label.options(**values | options), self.said.append)

    def die(self, tick: str) -> None:
        self.kill = True
        with pytest.raises(Killed):
            self.start(tick)
        self.kill = False

    def runs(self) -> dict[str, int]:
        """Rows by run."""
        rows = open_table(Storage(), str(self._table)).dataset().to_table(columns=["run"])["run"].to_pylist()
        return {run: rows.count(run) for run in dict.fromkeys(sorted(rows))}


@pytest.fixture
def drivers(tmp_path: Path, pictures: Callable[..., Path], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Drivers:
    return Drivers(monkeypatch, pictures(2), tmp_path / "table", tiny_checkpoint)


def test_a_tick_finishes_an_unfinished_one_under_its_own_name_and_then_does_its_work(
    drivers: Drivers, pictures: Callable[..., Path]
) -> None:
    drivers.die("monday")
    pictures(3, first=2)  # came since
    report = drivers.start("tuesday")
    assert drivers.runs() == {"monday": 2, "tuesday": 3}
    assert (report.run_id, report.images) == ("tuesday", 3)
    assert [(run.run_id, run.images, run.resumed) for run in report.earlier] == [("monday", 2, True)]
    assert "run monday, which was unfinished, is committed; tick tuesday follows" in drivers.said
    text = label.describe(report)
    assert text.index("run        monday (resumed)") < text.index("run        tuesday\n")
    assert drivers.start("tuesday").run_id is None


def test_a_tick_without_new_images_still_finishes_an_unfinished_one(drivers: Drivers) -> None:
    drivers.die("monday")
    report = drivers.start("tuesday")
    assert drivers.runs() == {"monday": 2}
    assert report.run_id is None
    assert [run.run_id for run in report.earlier] == ["monday"]
    assert label.describe(report).endswith("table: nothing new")


def test_a_start_without_a_tick_continues_and_stops_there(drivers: Drivers, pictures: Callable[..., Path]) -> None:
    drivers.die("monday")
    pictures(1, first=2)
    report = drivers.start()
    assert (report.run_id, report.earlier) == ("monday", ())


@pytest.fixture
def held(drivers: Drivers, tmp_path: Path) -> Lease:
    """The lease of the unfinished run `monday`, in the hands of a driver that works on it."""
    drivers.die("monday")
    return Lease.acquire(Storage(), str(tmp_path / "table"), "monday")


def test_another_driver_on_the_run_is_an_error_by_default(drivers: Drivers, held: Lease) -> None:
    with held, pytest.raises(LeaseHeldError, match="run monday is being written by"):
        drivers.start("tuesday")


def test_a_run_that_another_driver_works_on_can_be_skipped(drivers: Drivers, held: Lease) -> None:
    with held:
        report = drivers.start("tuesday", if_running="skip")
    assert (report.run_id, report.skipped, report.statuses) == (None, True, {})
    assert drivers.said[-1].startswith("skipped: run monday is being written by ")
    assert label.describe(report).endswith("table: skipped")


def test_a_driver_can_wait_for_another_one(drivers: Drivers, held: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            held.release()

    monkeypatch.setattr(label.time, "sleep", sleep)
    report = drivers.start("monday", if_running="wait")
    assert (report.run_id, report.resumed) == ("monday", True)
    assert len(naps) == 3
    assert [line for line in drivers.said if line.startswith("waiting: ")] == [
        line for line in drivers.said if "run monday is being written by" in line
    ]
