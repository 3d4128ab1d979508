"""Ctrl-C while Ray starts and while Ray Train runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from masklake.jobs.cluster.connection import _interrupt_held_back, interruptible


def test_an_interrupt_waits_until_ray_has_started() -> None:
    before = signal.getsignal(signal.SIGINT)
    reached = False
    with pytest.raises(KeyboardInterrupt), _interrupt_held_back():  # noqa: PT012 - the block is what is tested
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)
    reached = False
    with pytest.raises(KeyboardInterrupt), _interrupt_held_back():  # noqa: PT012 - the block is what is tested
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert not reached
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_start_ray_too() -> None:
    done: list[bool] = []

    def work() -> None:
        with _interrupt_held_back():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


def test_an_exit_within_is_an_interrupt_and_the_handler_is_ours_again() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible():  # noqa: PT012 - the block is what is tested
        signal.signal(signal.SIGINT, lambda *_: None)  # as Ray Train does
        raise SystemExit(1)
    assert signal.getsignal(signal.SIGINT) is before


CORE_ENDS = """
import os, ray
from masklake.jobs.cluster import connection

def init(**_):
    os.write(2, b"Check failed: the core's own words")
    {end}

ray.init = init
connection.connect_ray("local")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code"), [("os._exit(1)", 1), ("os.abort()", -signal.SIGABRT)])
def test_ray_s_core_may_end_the_process_but_not_without_a_line(end: str, code: int, tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path), "RAY_TMPDIR": "/somewhere"}
    done = subprocess.run(
        [sys.executable, "-c", CORE_ENDS.format(end=end)], capture_output=True, text=True, timeout=60, env=environment
    )
    (log,) = tmp_path.glob("masklake-ray-*.log")
    assert log.read_text() == "Check failed: the core's own words"
    assert (done.returncode, done.stderr) == (
        code,
        "masklake: error: this process was ended, by Ray's core or from outside, while it started Ray on this machine. Nothing "
        f"is lost; start the same command again. What Ray's core wrote: {log}. "
        "Ray's own logs: /somewhere/ray/session_latest/logs\n",
    )


@pytest.mark.slow
def test_what_was_held_back_is_shown_with_an_error_and_no_file_stays(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CORE_ENDS.format(end="raise RuntimeError('broken')")],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert (done.returncode, list(tmp_path.iterdir())) == (1, [])
    assert done.stderr.startswith("Check failed: the core's own words")
    assert "RuntimeError: broken" in done.stderr


LOSES = """
import os, signal, sys
import ray._private.worker as worker
from masklake.jobs.cluster.connection import connect_ray
connect = worker.connect

def after_the_checks(*arguments, **options):
    os.kill(int(sys.argv[2]), signal.SIGKILL)
    return connect(*arguments, **options)

worker.connect = after_the_checks
connect_ray(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("lost", "code", "words"),
    [
        ("raylet", 1, "this process was ended, by Ray's core or from outside, while it joined the Ray cluster at {address}. "),
        ("gcs_server", 45, "the head of the Ray cluster at {address} has been gone for "),
    ],
)
def test_a_cluster_that_is_lost_while_it_is_joined(lost: str, code: int, words: str, tmp_path: Path) -> None:
    """Ray's core ends the process: 9 s after its node is gone, in a call that keeps Python's other threads out; a minute after
    the head is."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        pid = cluster.head_node.all_processes[lost][0].process.pid
        command = [sys.executable, "-c", LOSES, cluster.address, str(pid)]
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
        logs = f"{cluster.head_node.get_session_dir_path()}/logs"
        address = cluster.address
    finally:
        cluster.shutdown()
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"masklake: error: {words.format(address=address)}"), done.stderr
    assert "start the same command again" in done.stderr
    assert done.stderr.endswith(f" Ray's own logs: {logs}\n")
    assert done.stderr.count("masklake: error") == 1
    assert list(tmp_path.glob("masklake-ray-*.log")), "what Ray's core wrote"
