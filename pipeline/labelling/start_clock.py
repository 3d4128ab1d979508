"""Notes in a run's record how long a start of it has worked, also for a start that is killed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from masklake.model.errors import MaskLakeError
from masklake.pipeline.storage.retry import patiently
from masklake.pipeline.table.runs import Start
from masklake.pipeline.table.table import Table

logger = logging.getLogger(__name__)

NOTE_EVERY_S = 30.0
"""Seconds between notes: what a killed start lacks at most in the sums of GPU hours and cost."""


class StartClock:
    """Context manager that adds a start to a run's record, and updates its seconds until the end. Needs the run's lease.

    check: raises if the run is another driver's by now, whose record this must not touch. In the middle of the work a note that
    fails is only logged: the next one says the same and more.
    """

    def __init__(
        self, table: Table, run_id: str, start: Start, check: Callable[[], None], every_s: float = NOTE_EVERY_S
    ) -> None:
        self._table = table
        self._run_id = run_id
        self._start = start
        self._check = check
        self._every_s = every_s
        self._began = time.monotonic()
        self._earlier: tuple[Start, ...] = ()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._note_for_ever, name=f"clock-{run_id}", daemon=True)

    def __enter__(self) -> Self:
        record = patiently(lambda: self._table.run_record(self._run_id))
        self._earlier = record.starts if record is not None else ()
        patiently(self._note)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if error is None:
            patiently(self._note)
        else:
            self._note_or_log()

    def _note_for_ever(self) -> None:
        while not self._stop.wait(self._every_s):
            self._note_or_log()

    def _note_or_log(self) -> None:
        try:
            self._note()
        except MaskLakeError as error:
            logger.warning("the time of run %s could not be noted: %s", self._run_id, error)

    def _note(self) -> None:
        self._check()
        start = self._start.model_copy(update={"seconds": round(time.monotonic() - self._began, 3)})
        self._table.update_record(self._run_id, starts=[*self._earlier, start])
