"""A line for the case that native code or another process ends this one, when no Python code runs any more."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

WAITS = 'read -r _ || printf "%s\\n" "$1" >&2'
"""A shell's program that writes its argument if its input ends without a line."""

_waiting: subprocess.Popen[bytes] | None = None
_needed = False


@contextmanager
def said_at_a_sudden_end(line: str, terminal: int) -> Iterator[None]:
    """Context manager: if this process ends within the block, whatever ends it, `line` is written to the descriptor `terminal`.

    A second process writes it, since this one can do nothing after SIGKILL or after `exit` or `abort` from C++. The exit code
    stays as it is. There is no line if this process is the first of a container (pid 1): the second one ends with it.
    """
    global _waiting, _needed
    _waiting = subprocess.Popen(  # noqa: S603 - its program is WAITS, and the line an argument of it
        ["/bin/sh", "-c", WAITS, "masklake", line],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        start_new_session=True,  # Ctrl-C in a terminal is not for it
    )
    _needed = True
    try:
        yield
    finally:
        withdraw()


def withdraw() -> None:
    """Takes the line back: the process goes on, or ends with another line. Does nothing outside of the block."""
    global _needed
    needed, _needed = _needed, False
    if needed and _waiting is not None and _waiting.stdin is not None:
        with suppress(BrokenPipeError):  # somebody ended it
            os.write(_waiting.stdin.fileno(), b"\n")
        _waiting.stdin.close()
        _waiting.wait()


def is_waiting(pid: int) -> bool:
    """Returns whether a process is the second one of `said_at_a_sudden_end`."""
    return _waiting is not None and _waiting.pid == pid
