"""Ray: attach to a cluster, or start one inside this process, quietly."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from masklake.jobs.cluster.checks import check_cluster
from masklake.jobs.cluster.watch import watch_cluster
from masklake.jobs.terminal.signals import OWN_RAY
from masklake.model.errors import MaskLakeError
from masklake.pipeline.errors import ClusterTooSmallError, ClusterUnusableError

RESERVED_CPUS = 2
"""Logical CPUs beside the workers', for Ray Data's small tasks: a run's parts must find a place while the last workers end.

They wait most of the time, so an embedded cluster simply counts two more CPUs than the machine has.
"""


EMBEDDED = "masklake_embedded"
"""A resource that marks a cluster as started by `connect` inside a process."""


@dataclass(frozen=True)
class Capacity:
    """What a cluster has in all: logical CPUs, GPUs, and memory for reservations in bytes. embedded: it is this machine."""

    cpus: float
    gpus: float
    memory: float
    embedded: bool = False

    @property
    def spare_cpus(self) -> int:
        """CPUs for model replicas; on an embedded cluster, the machine's cores."""
        return max(0, int(self.cpus) - RESERVED_CPUS)


def connect(address: str | None = None) -> Capacity:
    """Make sure that this process is connected to Ray, and say what the cluster has.

    A connection that exists is used. Otherwise ``address`` or RAY_ADDRESS names a cluster; without them one is started in
    this process and ends with it. ClusterUnusableError where none answers, or this process cannot join it.
    """
    import ray

    if not ray.is_initialized():
        _start(address or os.environ.get("RAY_ADDRESS") or "local")
        watch_cluster()
    _quiet()
    total: dict[str, float] = ray.cluster_resources()
    return Capacity(total.get("CPU", 0.0), total.get("GPU", 0.0), total.get("memory", 0.0), EMBEDDED in total)


def _start(address: str) -> None:
    import ray

    own: dict[str, Any] = {}
    if address == "local":
        OWN_RAY.set()
        own = {"num_cpus": cores() + RESERVED_CPUS, "resources": {EMBEDDED: 1}, "include_dashboard": False}
    # Ray's C++ prints advice for its own developers; what these variables leave of it goes to the session's log files.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")  # a manifest is one file; 32 processes would start for it
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(8, cores())))  # it warns of 8 processes on 2 cores
    try:
        # ... apart from a line that says that the variable was read.
        with _sigterm_kept(), _interrupt_held_back(), _stderr_held_back():
            if address != "local":
                own["_node_ip_address"] = check_cluster(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        cause = last_line(error.__cause__ or error)
        raise ClusterUnusableError(f"the Ray cluster at {address} cannot be joined: {cause}") from error
    except Exception as error:
        if type(error) is not Exception:  # Ray raises the bare class when its own processes do not come up in time
            raise
        raise ClusterTooSmallError(f"Ray could not start on this machine ({error}). It may be too busy: try again") from error


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the block with KeyboardInterrupt: Ray Train handles it by SystemExit(1), and keeps doing so afterwards."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        raise KeyboardInterrupt from stop
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Let a first Ctrl-C or SIGTERM wait for the end of the block, a second one not: half started, Ray crashed when closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting = False

    def hold_back(number: int, frame: FrameType | None) -> None:
        nonlocal waiting
        if waiting:
            raise KeyboardInterrupt
        waiting = True

    before = signal.signal(signal.SIGINT, hold_back)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if waiting:
        raise KeyboardInterrupt


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep a handler of SIGTERM that is there (`jobs.terminal.signals`).

    Ray sets one that exits while its core is half started, and at the end its core another one, past Python, that aborts.
    """
    import ray._private.utils

    ours = signal.getsignal(signal.SIGTERM)
    if not callable(ours) or threading.current_thread() is not threading.main_thread():
        yield
        return
    set_by_ray = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = set_by_ray
        signal.signal(signal.SIGTERM, ours)


@contextmanager
def _stderr_held_back() -> Iterator[None]:
    """Keep what is written to file descriptor 2, and let it out only when the block fails without an error of ours."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if not isinstance(error, MaskLakeError):
                held.seek(0)
                os.write(terminal, held.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quiet() -> None:
    """Keep Ray's messages in its log files; what matters of them stands in our own report and errors."""
    import ray._private.worker
    import ray.data  # configures the logger when imported
    from ray._private.log import PlainRayHandler

    # The raylet's notices reach the terminal past `log_to_driver=False`, a page for every worker that dies; this switch of
    # Ray's debugger is the only one for them.
    ray._private.worker._worker_logs_enabled = False
    for handler in logging.getLogger(ray.data.__name__).handlers:
        if isinstance(handler, PlainRayHandler):  # not one that the embedding program has added
            handler.setLevel(logging.CRITICAL)


def beside_the_driver() -> Any:
    """Where small actors that only serve the driver belong: on its node, whose loss ends the driver, too.

    A soft affinity would not do: Ray 2.60 puts actors without CPUs on other nodes all the same.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def data_context() -> Any:
    """A copy of Ray Data's settings as every pipeline here starts from: silent, and without reservations of memory."""
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.default_map_logical_memory_enabled = False  # it would reserve 2.5 GiB a worker and wait for ever without them
    return context


def last_line(error: BaseException) -> str:
    """What Ray's many lines end with: the reason; the error's kind where there are none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
