"""The command line as a whole: fast to start, one line an error, no traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

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

@cli.app.command()
def wrapped():
    class Made:
        attribute = Interrupts()

@cli.app.command()
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


@pytest.mark.parametrize("command", ["wrapped", "cleaned-up"])
def test_ctrl_c_is_one_line_wherever_it_strikes(command: str) -> None:
    done = run(command, code=INTERRUPTED_INSIDE)
    assert done.returncode == 130
    assert done.stderr == "masklake: interrupted. The same command goes on where this one stopped.\n"


def test_an_interrupt_that_an_error_replaces_is_that_error() -> None:
    done = run("another-reason", code=INTERRUPTED_INSIDE)
    assert (done.returncode, done.stderr) == (77, "masklake: error: the lease\n")


def test_wrong_usage_is_exit_code_2() -> None:
    assert run("convert").returncode == 2


def test_version() -> None:
    assert run("--version").stdout.startswith("masklake ")
