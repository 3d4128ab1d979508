"""The command line as a whole: fast to start, one line an error, no traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.main import get_command

from jobs.cli import app
from jobs.stopped import AFTER_A_STOP, command_of, stopped_line

COMMANDS = set(get_command(app).commands)  # type: ignore[attr-defined]
HEAVY = ("torch", "ray", "duckdb", "pyarrow", "matplotlib", "deltalake")


def run(*arguments: str, code: str = "from jobs.cli import main; main()") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys, jobs.cli; print([name for name in {HEAVY} if name in sys.modules])"
    assert run(code=code).stdout.strip() == "[]"


def test_an_error_is_one_line_and_its_exit_code() -> None:
    done = run("convert", "nowhere.pth", "out.safetensors", "--preset", "no_such_preset")
    assert done.returncode == 10
    assert done.stderr.startswith("masklake: error: ")
    assert "tiny" in done.stderr, "the message lists the known presets"
    assert "Traceback" not in done.stderr


INTERRUPTED_INSIDE = """
from jobs import cli
from model.errors import MaskLakeError

class Interrupts:
    def __set_name__(self, owner, name):
        raise KeyboardInterrupt

class Lost(MaskLakeError):
    exit_code = 77

@cli.app.command("label")
def wrapped():
    class Made:
        attribute = Interrupts()

@cli.app.command("query")
def cleaned_up():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise Lost("while it cleaned up")

@cli.app.command()
def another_reason():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise Lost("the lease") from None

cli.main()
"""


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("label", "The same command goes on where this one stopped."),
        ("query", "The table is as it was, and no file was written."),
    ],
)
def test_ctrl_c_is_one_line_wherever_it_strikes_that_fits_the_command(command: str, line: str) -> None:
    done = run(command, code=INTERRUPTED_INSIDE)
    assert done.returncode == 130
    assert done.stderr == f"masklake: interrupted. {line}\n"


def test_each_command_says_what_a_stop_leaves() -> None:
    assert set(AFTER_A_STOP) == COMMANDS
    assert stopped_line("convert", "stopped by SIGTERM") == "masklake: stopped by SIGTERM. Nothing was written.\n"
    assert stopped_line(None) == "masklake: interrupted.\n"
    assert command_of(["--version", "show", "table"]) == "show"


def test_an_interrupt_that_an_error_replaces_is_that_error() -> None:
    done = run("another-reason", code=INTERRUPTED_INSIDE)
    assert (done.returncode, done.stderr) == (77, "masklake: error: the lease\n")


def test_wrong_usage_is_exit_code_2() -> None:
    assert run("convert").returncode == 2


def test_version() -> None:
    assert run("--version").stdout.startswith("masklake ")
