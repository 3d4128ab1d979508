"""SIGTERM and SIGHUP end a process as Ctrl-C does; what does not end by itself is ended."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Under nohup SIGHUP is ignored, also by what pytest starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


PROGRAM = """
import os, signal, subprocess, sys, time
from masklake.jobs import cli, commands
from masklake.jobs.terminal import signals as stopping

def ready():
    print("ready", flush=True)

@commands.app.command("label")
def waits():
    ready()
    time.sleep(60)

@commands.app.command("train")
def swallows():
    stopping.GRACE_S = 0.2
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # as while Ray starts
    while True:
        try:
            ready()
            time.sleep(60)
        except KeyboardInterrupt:
            pass

@commands.app.command("show")
def fails_while_it_cleans_up():
    try:
        ready()
        time.sleep(60)
    finally:
        raise OSError("the cluster went away with the same signal")

@commands.app.command("query")
def computes():
    from masklake.pipeline.table.duckdb_connection import connected
    with connected() as connection:
        ready()
        connection.execute("SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE a.range * b.range % 7 = 3").fetchall()

@commands.app.command("evaluate")
def loses_its_ray():
    stopping.GRACE_S = 600
    raylet = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    while True:
        try:
            ready()
            time.sleep(60)
        except KeyboardInterrupt:
            raylet.kill()

@commands.app.command("demo")
def ends_well():
    try:
        ready()
        time.sleep(60)
    except KeyboardInterrupt:
        print("done")

cli.main()
"""


STILL_IMPORTING = """
import sys, time
from masklake.jobs import cli

class Slow:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "typer":
            print("ready", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Slow)
cli.main()
"""

CLEANS_UP_SLOWLY = """
import time
from masklake.jobs import cli, commands

@commands.app.command("train")
def cleans_up():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("ready", flush=True)
        time.sleep(60)

cli.main()
"""


def stopped(
    command: str, number: int, times: int = 1, ignored: int | None = None, program: str = PROGRAM
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that gets a signal as soon as it is at work."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        preexec_fn=None if ignored is None else lambda: signal.signal(ignored, signal.SIG_IGN),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(times):
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("command", "number", "code", "line"),
    [
        ("label", signal.SIGTERM, 143, "stopped by SIGTERM. Run the same command again to continue."),
        ("label", signal.SIGHUP, 129, "stopped by SIGHUP. Run the same command again to continue."),
        ("label", signal.SIGINT, 130, "interrupted. Run the same command again to continue."),
        (
            "train",
            signal.SIGTERM,
            143,
            "stopped by SIGTERM. Run the same command again to continue after the last complete epoch.",
        ),
        ("train", signal.SIGINT, 130, "interrupted. Run the same command again to continue after the last complete epoch."),
        ("show", signal.SIGTERM, 143, "stopped by SIGTERM. Nothing was written."),
        ("query", signal.SIGTERM, 143, "stopped by SIGTERM. The table is as it was, and no file was written."),
    ],
    ids=["sigterm", "sighup", "ctrl-c", "swallowed-and-held-back", "swallowed-ctrl-c", "error-meanwhile", "in-duckdb"],
)
def test_a_signal_ends_in_its_line_and_its_code(command: str, number: int, code: int, line: str) -> None:
    assert stopped(command, number)[::2] == (code, f"masklake: {line}\n")


def test_a_signal_that_comes_again_changes_nothing() -> None:
    assert stopped("label", signal.SIGTERM, times=3)[::2] == (
        143,
        "masklake: stopped by SIGTERM. Run the same command again to continue.\n",
    )


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    ("number", "code", "by"), [(signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted")]
)
def test_signals_are_handled_before_the_commands_are_imported(number: int, code: int, by: str, times: int) -> None:
    assert stopped("train", number, times, program=STILL_IMPORTING)[::2] == (
        code,
        f"masklake: {by}. Run the same command again to continue after the last complete epoch.\n",
    )


@pytest.mark.parametrize(
    ("first", "code", "by"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped by SIGTERM")]
)
def test_ctrl_c_after_a_signal_ends_the_clean_up(first: int, code: int, by: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CLEANS_UP_SLOWLY, "train"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for number in (first, signal.SIGINT):
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
    _, err = process.communicate(timeout=10)  # less than GRACE_S
    assert (process.returncode, err) == (
        code,
        f"masklake: {by}. Run the same command again to continue after the last complete epoch.\n",
    )


def test_ctrl_c_while_python_ends_changes_nothing() -> None:
    end = """
import threading, time
from masklake.jobs import cli, commands

class Slow:
    def __del__(self):  # called after the handlers of exits
        print("ready", flush=True)
        time.sleep(0.5)

@commands.app.command("label")
def interrupted():
    builtins.slow = Slow()
    raise KeyboardInterrupt

import builtins
cli.main()
"""
    assert stopped("label", signal.SIGINT, program=end)[::2] == (
        130,
        "masklake: interrupted. Run the same command again to continue.\n",
    )


def test_sigterm_ends_a_background_job_that_ignores_ctrl_c() -> None:
    assert stopped("label", signal.SIGTERM, ignored=signal.SIGINT)[0] == 143


def test_a_command_that_ends_well_all_the_same_is_a_success() -> None:
    assert stopped("demo", signal.SIGTERM) == (0, "done\n", "")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux tells what has become of a process's children")
def test_a_process_whose_ray_ended_with_the_same_signal_does_not_wait_for_it() -> None:
    code, _, err = stopped("evaluate", signal.SIGTERM)
    assert (code, err) == (143, "masklake: stopped by SIGTERM. Nothing was written.\n")


def test_an_ignored_signal_stays_ignored() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "label"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=REPOSITORY,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),  # as nohup does
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGHUP)
        ended, _, _ = select.select([process.stdout], [], [], 0.5)
        assert not ended
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
