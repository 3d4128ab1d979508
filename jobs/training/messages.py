"""Where a training run's workers leave word for the driver: lines for people, and the error that ended the run.

An actor of its own, because Ray Train's controller and workers have no other way to the driver's terminal that does not put
Ray's prefixes on every line. It imports nothing heavy: its process starts while the workers load torch.

The result never depends on it: it lives beside the driver, and where it is lost all the same lines are lost, no training.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import ray

from masklake.jobs.cluster.connection import beside_the_driver

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 10.0
"""How long an answer is waited for: of an actor on a lost node Ray itself knows nothing for half a minute."""
LOST = (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError)


class Board:
    """The actor: lines not yet fetched, and the first failure that a user can mend."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._failure: Exception | None = None

    def say(self, line: str) -> None:
        """Adds a line for the driver to show."""
        self._lines.append(line)

    def take(self) -> list[str]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def fail(self, error: Exception) -> None:
        """Keeps the first error; the ones that follow are its consequences."""
        self._failure = self._failure or error

    def failure(self) -> Exception | None:
        """The first error, if any."""
        return self._failure


def start_board() -> Any:
    """The actor's handle; it takes no CPU away from training."""
    return ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=beside_the_driver())(Board).remote()


def failure_on(board: Any) -> Exception | None:
    """The first error that was reported; None, too, where the board is lost."""
    try:
        return ray.get(board.failure.remote(), timeout=PATIENCE_SECONDS)
    except LOST:
        return None


def report_failure(board: Any, error: Exception) -> bool:
    """Whether the error reached the board; where not, raise it: it then reaches the driver through Ray."""
    try:
        ray.get(board.fail.remote(error), timeout=PATIENCE_SECONDS)
    except LOST:
        return False
    return True


class Listener:
    """Shows the board's lines in the driver while its main thread waits for Ray Train."""

    def __init__(self, board: Any, show: Callable[[str], None]) -> None:
        self._board = board
        self._show = show
        self.heard = 0
        """Lines so far."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="board", daemon=True)

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _listen(self) -> None:
        stopped = False
        while not stopped:
            stopped = self._stopped.wait(POLL_SECONDS)
            try:
                lines = ray.get(self._board.take.remote(), timeout=PATIENCE_SECONDS)
            except LOST:
                continue  # it may come back elsewhere; if not, there is nothing to show
            except ray.exceptions.RayError:
                return  # the cluster went away: the main thread has the reason
            self.heard += len(lines)
            for line in lines:
                self._show(line)


def to_stderr(line: str) -> None:
    """One line for a person to read."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
