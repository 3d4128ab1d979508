"""Progress of the workers: a counter that they add to, and a progress bar on the terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from masklake.jobs.cluster.connection import beside_the_driver
from masklake.model.wording import printable

POLL_S = 0.5

TAKES = 2
"""Maximum number of times that a block is started: one that ended two workers is left to a round with smaller blocks."""


class Counter:
    """Counts images, starts of workers and started blocks. Runs as a Ray actor, which must not import torch."""

    def __init__(self) -> None:
        self._done = 0
        self._failed = 0
        self._unwritten = 0
        self._starts = 0
        self._workers: set[str] = set()
        self._takes: dict[int, int] = {}
        self._lost = 0

    def add(self, images: int, failed: int) -> None:
        """Adds finished images, of which `failed` have a status other than ok."""
        self._done += images
        self._failed += failed

    def take_back(self, images: int, failed: int) -> None:
        """Subtracts images that were labelled but whose block could not be written."""
        self._unwritten += images
        self._failed -= failed

    def starting(self, worker: str) -> None:
        """Registers that a worker's process begins to load its model. worker: id of its actor, which outlives the process."""
        self._starts += 1
        self._workers.add(worker)

    def ready(self) -> None:
        """Registers that a worker has loaded its model."""
        self._starts = 0

    def starts(self) -> int:
        """Returns the number of starts since the last one that completed."""
        return self._starts

    def workers(self) -> list[str]:
        """Returns the workers that have ever started."""
        return sorted(self._workers)

    def take(self, block: int) -> int:
        """Registers that a worker is about to start a block. Returns how often that has happened, or 0 if the worker must not,
        because `TAKES` others did not finish it.
        """
        self._takes[block] = self._takes.get(block, 0) + 1
        allowed = self._takes[block] <= TAKES
        self._lost += not allowed
        return self._takes[block] if allowed else 0

    def lay_down(self, block: int) -> None:
        """Registers that a worker has finished a block, successfully or not."""
        self._takes.pop(block, None)

    def lost(self) -> int:
        """Returns the number of blocks that are left to a later round."""
        return self._lost

    def get(self) -> tuple[int, int, int]:
        """Returns (finished, failed, taken back) so far. A block that ran twice counts twice: good for a progress bar, not for
        a report.
        """
        return self._done, self._failed, self._unwritten


def start_counter() -> Any:
    """Returns a handle of a new Counter actor. The result does not depend on it: if it dies, Ray restarts it, and the progress
    bar pauses.
    """
    import ray

    return ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=beside_the_driver())(Counter).remote()


@contextmanager
def progress_bar(counter: Any, total: int, done: int, watch: Callable[[], None], enabled: bool = True) -> Iterator[None]:
    """Context manager that shows a bar of `total` images on stderr, `done` of them earlier, and calls `watch` twice a second.

    `watch` is called in a thread of its own and must not raise.
    """
    stop = threading.Event()
    with _bar(total, done, enabled) as bar:
        thread = threading.Thread(target=_follow, args=(counter, bar, done, watch, stop), name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@contextmanager
def own_progress_bar(total: int, done: int, enabled: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Context manager that shows the same bar for a run without workers. It yields a function that adds finished images, and
    how many of them failed.
    """
    failures = 0
    with _bar(total, done, enabled) as bar:

        def add(images: int, failed: int) -> None:
            nonlocal failures
            failures += failed
            bar.set_postfix(failed=failures, refresh=False)
            bar.update(images)

        yield add


def _bar(total: int, done: int, enabled: bool) -> Any:
    # In a log file every refresh is a line: two per minute are enough there.
    pause = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total, initial=done, unit=" images", desc="labelling", file=sys.stderr, disable=not enabled, mininterval=pause
    )


def written_above(line: str) -> None:
    """Writes a line to stderr, above the progress bar if there is one."""
    tqdm.write(printable(line), file=sys.stderr)


def _follow(counter: Any, bar: Any, before: int, watch: Callable[[], None], stop: threading.Event) -> None:
    import ray

    last, most = False, 0
    while not last:
        last = stop.wait(POLL_S)
        watch()
        try:
            done, failed, unwritten = ray.get(counter.get.remote(), timeout=5)
        except ray.exceptions.RayError:
            continue  # busy, or the cluster is lost: the bar pauses, and the run itself reports what is wrong
        bar.set_postfix(failed=failed, refresh=False)
        most = max(most, done)  # of a counter that began anew, too
        there = min(bar.total, before + most) - unwritten
        if there > bar.n:
            bar.update(there - bar.n)
        elif unwritten:
            bar.n = there
            bar.refresh()
