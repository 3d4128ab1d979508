"""Connects to Ray: joins a cluster, or starts one inside this process, quietly."""

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
from pathlib import Path
from types import FrameType
from typing import Any

from masklake.jobs.cluster.checks import Place, check_cluster
from masklake.jobs.cluster.watch import watch_cluster, watched_head
from masklake.jobs.terminal.last_words import said_at_a_sudden_end
from masklake.jobs.terminal.signals import OWN_RAY
from masklake.model.errors import MaskLakeError
from masklake.pipeline.errors import ClusterTooSmallError, ClusterUnusableError

RESERVED_CPUS = 2
"""Logical CPUs in addition to those of the workers, for Ray Data's small tasks, which must run while the last workers finish.

They are idle most of the time, so an embedded cluster simply has two logical CPUs more than the machine has cores.
"""

EMBEDDED = "masklake_embedded"
"""Resource that marks a cluster as started inside a process."""


@dataclass(frozen=True)
class Capacity:
    """Total resources of a cluster: logical CPUs, GPUs, and memory for reservations in bytes. embedded: whether it is this
    machine.
    """

    cpus: float
    gpus: float
    memory: float
    embedded: bool = False

    @property
    def spare_cpus(self) -> int:
        """CPUs for model replicas; on an embedded cluster, the machine's cores."""
        return max(0, int(self.cpus) - RESERVED_CPUS)


def connect_ray(address: str | None = None) -> Capacity:
    """Connects this process to Ray, unless it is connected already, and returns the capacity of the cluster.

    `address` or RAY_ADDRESS names a cluster; without them, one is started in this process and ends with it. Raises
    ClusterUnusableError if no cluster answers or this process cannot join it.
    """
    import ray

    if not ray.is_initialized():
        _start(address or os.environ.get("RAY_ADDRESS") or "local")
        watch_cluster()
    _quiet()
    total: dict[str, float] = ray.cluster_resources()
    return Capacity(total.get("CPU", 0.0), total.get("GPU", 0.0), total.get("memory", 0.0), EMBEDDED in total)


def own_capacity() -> Capacity:
    """Returns the capacity of the cluster that `connect_ray` would start in this process."""
    import torch

    return Capacity(float(cores() + RESERVED_CPUS), float(torch.cuda.device_count()), memory=0.0, embedded=True)


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
        with _sigterm_kept(), _interrupt_held_back(), _stderr_held_back() as held:
            place = None if address == "local" else check_cluster(address)
            with _end_noticed(place, held):
                if place is not None:
                    own["_node_ip_address"] = place.node_ip
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        cause = last_line(error.__cause__ or error)
        raise ClusterUnusableError(f"the Ray cluster at {address} cannot be joined: {cause}") from error
    except Exception as error:
        if type(error) is not Exception:  # Ray raises the bare class when its own processes do not come up in time
            raise
        raise ClusterTooSmallError(f"Ray could not start on this machine ({error}). It may be too busy; try again") from error


@contextmanager
def interruptible() -> Iterator[None]:
    """Context manager: Ctrl-C raises KeyboardInterrupt. Ray Train would turn it into SystemExit(1), also afterwards."""
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
    """Delays a first Ctrl-C or SIGTERM until the end of the block, but not a second one: Ray crashes when closed half
    started.
    """
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
    """Keeps an existing handler of SIGTERM (`jobs.terminal.signals`).

    Ray installs one that exits while its core is half started, and finally one in its core, outside of Python, that aborts.
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


@dataclass(frozen=True)
class Held:
    """Redirected output of file descriptor 2: the file that receives it, and a descriptor of its original target."""

    path: str
    terminal: int


@contextmanager
def _stderr_held_back() -> Iterator[Held]:
    """Captures what is written to file descriptor 2 in a file, and prints it only if the block fails with an error that is not
    ours. If the process ends within the block, the file stays.
    """
    sys.stderr.flush()
    file, path = tempfile.mkstemp(prefix="masklake-ray-", suffix=".log")
    terminal = os.dup(2)
    os.dup2(file, 2)
    try:
        yield Held(path, terminal)
    except BaseException as error:
        if not isinstance(error, MaskLakeError):
            os.write(terminal, Path(path).read_bytes())
        raise
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(file)
        os.unlink(path)


@contextmanager
def _end_noticed(place: Place | None, held: Held) -> Iterator[None]:
    """Context manager: if Ray's core ends the process within the block, there is a line that says so. place: of the cluster;
    None for a Ray of our own.
    """
    import ray._common.utils

    doing = "started Ray on this machine" if place is None else f"joined the Ray cluster at {place.address}"
    logs = place.logs if place else os.path.join(ray._common.utils.get_default_ray_temp_dir(), "session_latest", "logs")
    line = (
        f"masklake: error: this process was ended, by Ray's core or from outside, while it {doing}. Nothing is lost; start the "
        f"same command again. What Ray's core wrote: {held.path}. Ray's own logs: {logs}"
    )
    with said_at_a_sudden_end(line, held.terminal), watched_head(place, held.terminal):
        yield


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quiet() -> None:
    """Keeps Ray's messages in its log files; our own report and errors contain what matters."""
    import ray._private.worker

    # The raylet's notices reach the terminal past `log_to_driver=False`, a page for every worker that dies; this switch of
    # Ray's debugger is the only one for them.
    ray._private.worker._worker_logs_enabled = False


def quiet_data() -> None:
    """Keeps Ray Data's messages in its log files. Only for jobs that use it: its import takes a second."""
    import ray.data  # configures the logger when imported
    from ray._private.log import PlainRayHandler

    for handler in logging.getLogger(ray.data.__name__).handlers:
        if isinstance(handler, PlainRayHandler):  # not one that the embedding program has added
            handler.setLevel(logging.CRITICAL)


def beside_the_driver() -> Any:
    """Returns the placement for small actors that serve only the driver: on its node, whose loss ends the driver, too.

    A soft affinity is not enough: Ray 2.60 places actors without CPUs on other nodes all the same.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def data_context() -> Any:
    """Returns a copy of Ray Data's settings for every pipeline here: silent, and without reservations of memory."""
    import ray.data

    quiet_data()
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.default_map_logical_memory_enabled = False  # it would reserve 2.5 GiB per worker, or wait for them forever
    return context


def last_line(error: BaseException) -> str:
    """Returns the last line of Ray's message, which has the reason; if there is none, the class of the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
