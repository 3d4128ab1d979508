"""How far the workers are: a counter that they add to, and a bar on the terminal that shows it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from jobs.cluster import beside_the_driver

POLL_S = 0.5


class Counter:
    """Counts finished and failed images. Runs as a Ray actor of its own, so it must not need torch."""

    def __init__(self) -> None:
        self._done = 0
        self._failed = 0
        self._starts = 0
        self._begun = False

    def add(self, images: int, failed: int) -> None:
        """Count ``images`` more, of which ``failed`` did not end ok."""
        self._done += images
        self._failed += failed

    def starting(self) -> None:
        """A worker's process begins to load its model."""
        self._starts += 1
        self._begun = True

    def ready(self) -> None:
        """... and has loaded it."""
        self._starts = 0

    def starts(self) -> int:
        """Starts of workers since one last completed."""
        return self._starts

    def begun(self) -> bool:
        """Whether any worker has started: the cluster had room for it."""
        return self._begun

    def get(self) -> tuple[int, int]:
        """(finished, failed) so far. A block that ran twice counts twice: a bar's truth, not a report's."""
        return self._done, self._failed


def start_counter() -> Any:
    """A handle of a new Counter actor. The workers only add to it: where it is lost the bar stands still, no more."""
    import ray

    return ray.remote(num_cpus=0, scheduling_strategy=beside_the_driver())(Counter).remote()


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


def _follow(counter: Any, bar: Any, before: int, watch: Callable[[], None], stop: threading.Event) -> None:
    import ray

    last = False
    while not last:
        last = stop.wait(POLL_S)
        watch()
        try:
            done, failed = ray.get(counter.get.remote(), timeout=5)
        except ray.exceptions.RayError:
            continue  # busy, or the cluster is going away: the bar stands still, the run itself says what is wrong
        bar.set_postfix(failed=failed, refresh=False)
        fresh = min(bar.total, before + done) - bar.n
        if fresh > 0:
            bar.update(fresh)
