"""The last line of a process that is ended from outside of Python."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ENDS = """
import os, signal
from masklake.jobs.terminal.last_words import is_waiting, said_at_a_sudden_end, withdraw
from masklake.jobs.terminal.signals import _children
with said_at_a_sudden_end("it's %s, \\"so\\" $HOME", os.dup(2)):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    assert not _children(), "it is not one of Ray's"
    {end}
{after}
"""


def ended(end: str, after: str = "") -> tuple[int, str]:
    """Exit code and stderr of a process that ends within the block, or `after` it."""
    done = subprocess.run([sys.executable, "-c", ENDS.format(end=end, after=after)], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code"), [("os._exit(1)", 1), ("os.abort()", -6), ("os.kill(os.getpid(), signal.SIGKILL)", -9)]
)
def test_the_line_is_written_whatever_ends_the_process(end: str, code: int) -> None:
    assert ended(end) == (code, 'it\'s %s, "so" $HOME\n')


@pytest.mark.slow
def test_the_line_is_not_written_without_need() -> None:
    assert ended("pass", "withdraw(); os._exit(3)") == (3, "")
    assert ended("withdraw(); os._exit(4)") == (4, "")
    assert ended("raise SystemExit(5)") == (5, "")


def test_a_process_that_somebody_ended_is_no_error() -> None:
    from masklake.jobs.terminal import last_words

    with last_words.said_at_a_sudden_end("never", 2):
        assert last_words._waiting is not None
        os.kill(last_words._waiting.pid, 9)
        last_words._waiting.wait()
