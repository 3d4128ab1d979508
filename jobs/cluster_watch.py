"""Says when a cluster is lost: Ray's core would wait for the head for a minute and then end the process without a word."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from jobs.cluster_checks import reaches
from pipeline.errors import ClusterLostError

POLL_S = 5.0
PATIENCE_S = 40.0
"""How long the head may be unreachable; Ray's core gives up after 60 s."""


def verdict(address: str, silent_s: float, node_alive: bool) -> str | None:
    """Why the cluster is lost, or None. silent_s: for how long nothing could connect to the head."""
    if silent_s >= PATIENCE_S:
        return f"the head of the Ray cluster at {address} has been gone for {silent_s:.0f} s"
    if not node_alive:
        return f"the Ray cluster at {address} has lost this host's node"
    return None


def watch_cluster() -> None:
    """Watch the cluster that this process is connected to, in a thread, for as long as it is."""
    import ray

    context = ray.get_runtime_context()
    arguments = (context.gcs_address, ray.NodeID.from_hex(context.get_node_id()), _log_folder())
    threading.Thread(target=_watch, args=arguments, name="cluster", daemon=True).start()


def _log_folder() -> str:
    import ray._private.worker

    node: Any = ray._private.worker._global_node
    return str(node.get_logs_dir_path())


def _watch(address: str, node: Any, logs: str) -> None:
    heard = time.monotonic()
    while True:
        time.sleep(POLL_S)
        reachable = reaches(address)
        if reachable:
            heard = time.monotonic()
        alive = not reachable or _knows(node)
        if not _is_connected_to(address):
            return
        if reason := verdict(address, time.monotonic() - heard, alive):
            _end(reason, logs)


def _is_connected_to(address: str) -> bool:
    import ray

    return ray.is_initialized() and ray.get_runtime_context().gcs_address == address


def _knows(node: Any) -> bool:
    """Whether the head counts the node among the living; True as well where it is too busy to say."""
    import ray._private.worker

    worker: Any = ray._private.worker.global_worker
    try:
        return bool(worker.gcs_client.check_alive([node], timeout=POLL_S)[0])
    except ray.exceptions.RayError:
        return True


def _end(reason: str, logs: str) -> None:
    """The process cannot be left to an exception: any call into Ray may wait for the head until the core ends it."""
    line = f"masklake: error: {reason}. What was finished is kept; start the same command again. Ray's own logs: {logs}\n"
    sys.stderr.flush()
    os.write(2, line.encode())
    os._exit(ClusterLostError.exit_code)
