"""Determines, one image at a time, which of the lost images end a worker's process and which were only in the same block.

An image is `crashed` if there is evidence: `DEATHS` workers, each of which had labelled a test picture before, ended while they
processed only that image, and their nodes stayed alive. Any other failure (a worker that cannot start, a block that cannot be
written) stops the run with its own error, and no image is marked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from masklake.jobs.cluster.connection import last_line
from masklake.pipeline.errors import LabellingError
from masklake.pipeline.labelling.run_output import Finished, reported

DEATHS = 3
"""Number of workers that must end on an image before it is `crashed`: a single one may have been killed from outside."""
LOST_NODES = 3
"""Number of nodes lost while they processed one image, after which the run stops: a spot market rarely takes three in a row."""
FAILED_STARTS = 3
"""Number of workers in a row that end before they have labelled anything, after which the run stops: no image is the cause."""
WAIT_S = 20.0
"""Seconds without an answer after which a line says what the run waits for."""


class Trials:
    """Decides which image is tried next, and what the deaths so far mean. An image that ended its worker goes to the end of
    the queue.
    """

    def __init__(self, image_ids: Iterable[int]) -> None:
        self._waiting = deque(image_ids)
        self._deaths: dict[int, int] = {}
        self._nodes: dict[int, int] = {}
        self.crashed: list[int] = []

    def __len__(self) -> int:
        """Returns the number of waiting images."""
        return len(self._waiting)

    def next(self) -> int:
        """Returns the image to try next. Raises IndexError if none waits."""
        return self._waiting.popleft()

    def died(self, image_id: int, *, with_node: bool) -> bool:
        """Registers that a worker ended while it processed this image. with_node: whether its node was lost, too, which is no
        evidence against the image.

        Returns False if `LOST_NODES` nodes were lost with this image: it can be neither labelled nor called `crashed`.
        """
        counts = self._nodes if with_node else self._deaths
        counts[image_id] = counts.get(image_id, 0) + 1
        if self._deaths.get(image_id, 0) >= DEATHS:
            self.crashed.append(image_id)
        else:
            self._waiting.append(image_id)
        return self._nodes.get(image_id, 0) < LOST_NODES


@dataclass(frozen=True)
class _Worker:
    """A worker's actor. node: id of its node, None until it has labelled the test picture. known: ids of the nodes that were
    alive when it was started.
    """

    actor: Any
    known: frozenset[str]
    node: str | None = None


class Alone:
    """Tries images on up to `workers` actors that `start` creates (`LabellingActor`, never restarted by Ray)."""

    def __init__(self, start: Callable[[], Any], rows: pa.Table, workers: int, say: Callable[[str], None]) -> None:
        """rows: the images to try, as MANIFEST_SCHEMA. say: called with a line while the run waits for a worker."""
        ids: list[int] = rows["image_id"].to_pylist()
        self._start = start
        self._rows = {image_id: rows.slice(number, 1) for number, image_id in enumerate(ids)}
        self._most = workers
        self._say = say
        self._trials = Trials(ids)
        self._idle: list[_Worker] = []
        self._calls: dict[Any, tuple[_Worker, int | None]] = {}  # pending: the block of an image, or a start (None)
        self._failed_starts = 0
        self._written: list[Finished] = []

    def run(self) -> tuple[list[Finished], list[int]]:
        """Returns the blocks of one image that were written, and the images that are `crashed`."""
        try:
            while len(self._trials) or self._in_progress():
                self._give_out()
                for call in self._answered():
                    self._take(call)
            return self._written, sorted(self._trials.crashed)
        finally:
            for worker in [*self._idle, *(worker for worker, _ in self._calls.values())]:
                _end(worker)

    def _in_progress(self) -> int:
        """Returns the number of images that workers are processing."""
        return sum(image is not None for _, image in self._calls.values())

    def _give_out(self) -> None:
        """Gives images to idle workers, and starts more workers, up to one for each remaining image."""
        while self._idle and len(self._trials):
            worker, image = self._idle.pop(), self._trials.next()
            self._calls[worker.actor.alone.remote(self._rows[image])] = (worker, image)
        starting = len(self._calls) - self._in_progress()
        for _ in range(min(self._most - len(self._calls), len(self._trials) - starting)):
            worker = _Worker(self._start(), known=_living_nodes())
            self._calls[worker.actor.prove.remote()] = (worker, None)

    def _answered(self) -> list[Any]:
        import ray

        ready: list[Any] = []
        while not ready:
            ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=WAIT_S)
            if not ready and not self._in_progress():
                self._say(f"waiting for a worker to start; free in the cluster: {_free(ray.available_resources())}")
        return ready

    def _take(self, call: Any) -> None:
        import ray

        worker, image = self._calls.pop(call)
        try:
            answer = ray.get(call)
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError) as error:
            _end(worker)  # Ray may only have lost sight of it
            self._ended(worker, image, error)
            return
        except ray.exceptions.RayError as error:
            raise LabellingError(
                f"a worker cannot label: {last_line(error)}; run the same command again to continue"
            ) from error
        self._failed_starts = 0
        if image is None:
            self._idle.append(replace(worker, node=answer))
        else:
            self._idle.append(worker)
            self._written += reported(answer)

    def _ended(self, worker: _Worker, image: int | None, error: Exception) -> None:
        living = _living_nodes()
        if image is not None:
            if not self._trials.died(image, with_node=worker.node not in living):
                uri = self._rows[image]["uri"][0].as_py()
                raise LabellingError(
                    f"{LOST_NODES} nodes were lost in a row while a worker processed {uri} alone. It may need more "
                    "memory than a node has: use larger nodes, or leave it out. The same command continues the run"
                )
            return
        # On which node it was starting is not known: if one was lost, that explains its end and does not count as a failure.
        self._failed_starts += worker.known <= living
        if getattr(error, "actor_init_failed", False) or self._failed_starts >= FAILED_STARTS:
            raise LabellingError(
                f"workers end before they receive an image: {last_line(error)}; the same command continues the run"
            ) from error


def _end(worker: _Worker) -> None:
    import ray

    ray.kill(worker.actor)


def _living_nodes() -> frozenset[str]:
    import ray

    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def _free(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
