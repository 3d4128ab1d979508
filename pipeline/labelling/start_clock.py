"""Records how long a start of a run has worked, also if it is killed."""

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
"""Seconds between notes: the most that the sums of GPU hours and cost lack of a start that was killed."""


class StartClock:
    """Context manager that adds a start to a run's record, and updates its seconds until the end. The caller holds the run's
    lease.

    check: raises if another driver has taken the run over, whose record must not be touched. A note that fails in the middle of
    the work is only logged, since the next one replaces it.
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
        self._thread = threading.Thread(target=self._keep_noting, name=f"clock-{run_id}", daemon=True)

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

    def _keep_noting(self) -> None:
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
