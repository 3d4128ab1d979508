"""Messages from the workers of a training run to the driver: lines to show, and the error that ended the run.

They go through an actor of their own, because Ray Train's controller and workers have no other way to the driver's terminal
without Ray's prefixes on every line. It imports nothing heavy: its process starts while the workers import torch.

The result never depends on it. It runs on the driver's node; if it is lost, lines are lost, but no training.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import ray

from masklake.jobs.cluster.connection import beside_the_driver
from masklake.model.wording import printable

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 10.0
"""Seconds to wait for an answer: Ray itself notices only after half a minute that an actor's node is lost."""
LOST = (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError)


class Messages:
    """The actor: lines that were not fetched yet, and the first error that a user can fix."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._failure: Exception | None = None

    def say(self, line: str) -> None:
        """Adds a line for the driver to show."""
        self._lines.append(line)

    def take(self) -> list[str]:
        """Returns the lines since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def fail(self, error: Exception) -> None:
        """Stores the first error; those that follow are its consequences."""
        self._failure = self._failure or error

    def failure(self) -> Exception | None:
        """Returns the first error, or None."""
        return self._failure


def start_messages() -> Any:
    """Starts the actor and returns its handle; it takes no CPU away from training."""
    return ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=beside_the_driver())(Messages).remote()


def reported_failure(messages: Any) -> Exception | None:
    """Returns the first error that was reported, or None; also None if the actor is lost."""
    try:
        return ray.get(messages.failure.remote(), timeout=PATIENCE_SECONDS)
    except LOST:
        return None


def report_failure(messages: Any, error: Exception) -> bool:
    """Returns whether the error reached the actor. If not, raise it: it then reaches the driver through Ray."""
    try:
        ray.get(messages.fail.remote(error), timeout=PATIENCE_SECONDS)
    except LOST:
        return False
    return True


class Listener:
    """Shows the workers' lines in the driver while its main thread waits for Ray Train."""

    def __init__(self, messages: Any, show: Callable[[str], None]) -> None:
        self._messages = messages
        self._show = show
        self.heard = 0
        """Number of lines so far."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="messages", daemon=True)

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
                lines = ray.get(self._messages.take.remote(), timeout=PATIENCE_SECONDS)
            except LOST:
                continue  # it may come back elsewhere; if not, there is nothing to show
            except ray.exceptions.RayError:
                return  # the cluster went away: the main thread has the reason
            self.heard += len(lines)
            for line in lines:
                self._show(line)


def to_stderr(line: str) -> None:
    """Writes one line to stderr."""
    sys.stderr.write(printable(line) + "\n")
    sys.stderr.flush()
