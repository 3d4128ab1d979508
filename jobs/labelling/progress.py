"""How far the workers are: a counter that they add to, and a bar on the terminal that shows it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from masklake.jobs.cluster.connection import beside_the_driver

POLL_S = 0.5

TAKES = 2
"""How often a block is begun: one that two workers ended with is left to a round of smaller blocks."""


class Counter:
    """Counts images, starts of workers and begun blocks. Runs as a Ray actor of its own, so it must not need torch."""

    def __init__(self) -> None:
        self._done = 0
        self._failed = 0
        self._unwritten = 0
        self._starts = 0
        self._workers: set[str] = set()
        self._takes: dict[int, int] = {}
        self._lost = 0

    def add(self, images: int, failed: int) -> None:
        """Count ``images`` more, of which ``failed`` did not end ok."""
        self._done += images
        self._failed += failed

    def take_back(self, images: int, failed: int) -> None:
        """So many of these were labelled, and their block could not be written."""
        self._unwritten += images
        self._failed -= failed

    def starting(self, worker: str) -> None:
        """A worker's process begins to load its model. worker: the id of its actor, which outlives the process."""
        self._starts += 1
        self._workers.add(worker)

    def ready(self) -> None:
        """... and has loaded it."""
        self._starts = 0

    def starts(self) -> int:
        """Starts of workers since one last completed."""
        return self._starts

    def workers(self) -> list[str]:
        """Those that have ever started."""
        return sorted(self._workers)

    def take(self, block: int) -> bool:
        """A worker is about to begin with a block; False where it must not, since `TAKES` others never ended it."""
        self._takes[block] = self._takes.get(block, 0) + 1
        allowed = self._takes[block] <= TAKES
        self._lost += not allowed
        return allowed

    def lay_down(self, block: int) -> None:
        """... and has ended it, well or not."""
        self._takes.pop(block, None)

    def lost(self) -> int:
        """Blocks that are left to a later round."""
        return self._lost

    def get(self) -> tuple[int, int, int]:
        """(finished, failed, taken back) so far. A block that ran twice counts twice: a bar's truth, not a report's."""
        return self._done, self._failed, self._unwritten


def start_counter() -> Any:
    """A handle of a new Counter actor. It is no part of the result: where it dies it begins anew, and the bar stands still."""
    import ray

    return ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=beside_the_driver())(Counter).remote()


@contextmanager
def shown(counter: Any, total: int, done: int, watch: Callable[[], None], enabled: bool = True) -> Iterator[None]:
    """Show a bar of ``total`` images on stderr, ``done`` of them from before, and call ``watch`` twice a second.

    ``watch`` runs in a thread of its own and must not raise.
    """
    stop = threading.Event()
    # In a log file every refresh is a line: two a minute are enough there.
    pause = 0.5 if sys.stderr.isatty() else 30.0
    bar = tqdm(
        total=total, initial=done, unit=" images", desc="labelling", file=sys.stderr, disable=not enabled, mininterval=pause
    )
    thread = threading.Thread(target=_follow, args=(counter, bar, done, watch, stop), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        bar.close()


def written_above(line: str) -> None:
    """Write a line to stderr: above the bar, where one is shown."""
    tqdm.write(line, file=sys.stderr)


def _follow(counter: Any, bar: Any, before: int, watch: Callable[[], None], stop: threading.Event) -> None:
    import ray

    last, most = False, 0
    while not last:
        last = stop.wait(POLL_S)
        watch()
        try:
            done, failed, unwritten = ray.get(counter.get.remote(), timeout=5)
        except ray.exceptions.RayError:
            continue  # busy, or the cluster is going away: the bar stands still, the run itself says what is wrong
        bar.set_postfix(failed=failed, refresh=False)
        most = max(most, done)  # of a counter that began anew, too
        there = min(bar.total, before + most) - unwritten
        if there > bar.n:
            bar.update(there - bar.n)
        elif unwritten:
            bar.n = there
            bar.refresh()
