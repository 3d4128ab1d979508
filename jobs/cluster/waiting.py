"""Notices that say what a run waits for while other jobs hold its CPUs or GPUs, or nodes are lost: Ray waits silently."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from masklake.jobs.cluster.connection import EMBEDDED
from masklake.model.wording import agreeing

POLL_S = 2.0
FIRST_S = 20.0
"""Seconds until the first notice: by then, workers with free CPUs have started or are about to."""
AGAIN_S = 60.0

Resources = Mapping[str, float]


def is_due(waited_s: float, said_s: float | None) -> bool:
    """Returns whether a notice is due. waited_s: seconds since the start; said_s: time of the last notice, on the same
    clock.
    """
    return waited_s >= FIRST_S if said_s is None else waited_s - said_s >= AGAIN_S


def notice(needs: str, waited_s: float, free: Resources, total: Resources) -> str:
    """Returns the line to show. needs: the resources that the run needs, as a clause."""
    kinds = [kind for kind in ("CPU", "GPU") if total.get(kind)]
    parts = ", ".join(f"{free.get(kind, 0):g} of {total[kind]:g} {agreeing(int(total[kind]), kind)}" for kind in kinds)
    return (
        f"waiting for the cluster for {waited_s:.0f} s: {needs}; free now: {parts or 'nothing'}. "
        "The run continues by itself as soon as there is room for it"
    )


@contextmanager
def said_while_waiting(needs: str, working: Callable[[], bool], say: Callable[[str], None]) -> Iterator[None]:
    """Context manager that shows what the run waits for, after 20 s and then every minute, while Ray queues it and `working`
    returns False.

    `working` is called in a thread of its own; it may raise Ray's errors. An embedded cluster has no other jobs.
    """
    import ray

    stopped = threading.Event()
    if EMBEDDED not in ray.cluster_resources():
        threading.Thread(target=_tell, args=(needs, working, say, stopped), name="waiting", daemon=True).start()
    try:
        yield
    finally:
        stopped.set()  # not joined: the head may be gone, and the thread wait for its answer


def _tell(needs: str, working: Callable[[], bool], say: Callable[[str], None], stopped: threading.Event) -> None:
    import ray

    start, said = time.monotonic(), None
    while not stopped.wait(POLL_S):
        waited = time.monotonic() - start
        try:
            if working():
                start, said = time.monotonic(), None
                continue
            if not is_due(waited, said) or not _queued():
                continue
            line = notice(needs, waited, ray.available_resources(), ray.cluster_resources())
        except ray.exceptions.RayError:
            continue  # an actor or the head does not answer: the thread that waits for the run's result gets the error
        if not stopped.is_set():
            say(line)
            said = waited


def has_place(workers: Collection[str]) -> bool:
    """Returns whether one of these actors is on a node, or all have ended. workers: ids of the actors that have ever
    started.
    """
    import ray
    import ray._private.state

    actors = ray._private.state.actors(job_id=ray.JobID.from_hex(ray.get_runtime_context().get_job_id()))
    left = [actors[worker] for worker in workers if worker in actors and actors[worker]["State"] != "DEAD"]
    placed = (actor["Address"]["NodeID"] not in ("", ray.NodeID.nil().hex()) for actor in left)  # loading a model counts, too
    return any(placed) or (bool(workers) and not left)


def _queued() -> bool:
    """Returns whether something waits for resources. Workers that have theirs and load the model do not."""
    import ray._private.worker
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    worker: Any = ray._private.worker.global_worker
    state = get_cluster_resource_state(worker.gcs_client)
    return bool(state.pending_resource_requests or state.pending_gang_resource_requests)
