"""Detects a lost cluster: Ray's core would wait for the head for a minute and then end the process without a message."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from masklake.jobs.cluster.checks import Place, reaches
from masklake.jobs.terminal.last_words import withdraw
from masklake.jobs.terminal.own_line import own_line
from masklake.pipeline.errors import ClusterLostError

POLL_S = 5.0
PATIENCE_S = 40.0
"""Seconds for which the head may be unreachable; Ray's core gives up after 60 s."""


def verdict(address: str, silent_s: float, node_alive: bool) -> str | None:
    """Returns why the cluster is lost, or None. silent_s: seconds for which nothing could connect to the head."""
    if silent_s >= PATIENCE_S:
        return f"the head of the Ray cluster at {address} has been gone for {silent_s:.0f} s"
    if not node_alive:
        return f"the Ray cluster at {address} has lost this host's node"
    return None


@contextmanager
def watched_head(place: Place | None, terminal: int) -> Iterator[None]:
    """Context manager that watches the head in a thread while this process joins a cluster. place: None if none is joined.

    terminal: file descriptor for the line.
    """
    joined = threading.Event()
    if place is not None:
        threading.Thread(target=_watch_head, args=(place, terminal, joined), name="head", daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _watch_head(place: Place, terminal: int, joined: threading.Event) -> None:
    heard = time.monotonic()
    while not joined.wait(POLL_S):
        if reaches(place.address):
            heard = time.monotonic()
        reason = verdict(place.address, time.monotonic() - heard, node_alive=True)
        if reason and not joined.is_set():
            _end(reason, place.logs, terminal)


def watch_cluster() -> None:
    """Watches the cluster that this process is connected to, in a thread, until it disconnects."""
    import ray

    node = ray.NodeID.from_hex(ray.get_runtime_context().get_node_id())
    arguments = (_client(), node, _log_folder())
    threading.Thread(target=_watch, args=arguments, name="cluster", daemon=True).start()


def _client() -> Any:
    """Returns this process's client of the head, a new object for every connection; None once it is disconnected."""
    import ray._private.worker

    return getattr(ray._private.worker.global_worker, "gcs_client", None)


def _log_folder() -> str:
    import ray._private.worker

    node: Any = ray._private.worker._global_node
    return str(node.get_logs_dir_path())


def _watch(client: Any, node: Any, logs: str) -> None:
    address = str(client.address)
    heard = time.monotonic()
    while True:
        time.sleep(POLL_S)
        reachable = reaches(address)
        if reachable:
            heard = time.monotonic()
        alive = not reachable or _knows(client, node)
        if _client() is not client:  # the process may disconnect at any moment: nothing else of the worker is touched here
            return
        if reason := verdict(address, time.monotonic() - heard, alive):
            _end(reason, logs)


def _knows(client: Any, node: Any) -> bool:
    """Returns whether the head considers the node alive; also True if it is too busy to answer."""
    import ray

    try:
        return bool(client.check_alive([node], timeout=POLL_S)[0])
    except ray.exceptions.RayError:
        return True


def _end(reason: str, logs: str, terminal: int = 2) -> None:
    """Ends the process, with a line on the descriptor `terminal`.

    An exception would not do: any call into Ray may wait for the head until the core ends the process.
    """
    line = f"masklake: error: {reason}. What was finished is kept; start the same command again. Ray's own logs: {logs}\n"
    withdraw()
    sys.stderr.flush()
    os.write(terminal, own_line(line))
    os._exit(ClusterLostError.exit_code)
