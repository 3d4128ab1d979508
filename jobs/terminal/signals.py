"""Signals: SIGTERM and SIGHUP end a command as Ctrl-C does, with clean-up, a line and exit code 128 + the signal's number.

A second Ctrl-C ends it at once, and the first one after GRACE_S if the process has not ended by then.

SIGTERM and SIGHUP are passed to whatever handles Ctrl-C at that moment: this module, Ray Train, or the code that starts Ray. If
the process does not end, because native code does not return or waits for a lost cluster, a thread ends it after GRACE_S, and
sooner if Ray's own processes are gone. The signal reaches that thread through a socket, whatever the main thread is doing.
"""

from __future__ import annotations

import atexit
import glob
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from masklake.jobs.terminal.last_words import is_waiting, withdraw
from masklake.jobs.terminal.own_line import own_line

GRACE_S = 12.0
"""Seconds from the signal until the end is forced: with the time that the end itself takes, less than 15 s. Kubernetes kills
after 30 s.
"""

LOST_S = 1.0
"""Seconds from the end of one of Ray's processes that this process started, unless the signal itself ended it."""

OWN_RAY = threading.Event()
"""Set when this process starts a Ray of its own. A service manager, or `timeout`, signals that Ray's processes, too, and its
core then ends or aborts this one silently, within milliseconds or some seconds: the line is written before that."""

ENDING = (signal.SIGTERM, signal.SIGHUP)

Line = Callable[[str], str]
"""Returns the line to show, given what happened ("interrupted", "stopped by SIGTERM")."""


class Stopping:
    """The signal that is ending this process, and its line, which is written once."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._number: int | None = None
        self._interrupted = False
        self._late: float | None = None  # when a thread ends the process, after a Ctrl-C
        self._saying = threading.RLock()  # a signal's handler may interrupt the main thread while that holds it
        self._said = False
        self._stderr = os.dup(2)  # descriptor 2 itself is held back while Ray starts

    @property
    def requested(self) -> bool:
        """Whether SIGTERM or SIGHUP was received."""
        return self._number is not None

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal; that of Ctrl-C if no other arrived."""
        return 128 + (self._number or signal.SIGINT)

    def install(self) -> None:
        """Handles the signals from now on, in the main thread. Signals that the parent ignores (`nohup`) stay ignored."""
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        self._sender = sender  # kept: the signals' numbers are written to its descriptor
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._end_late, args=(receiver,), name="stopping", daemon=True).start()
        for number in ENDING:
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, self._handle)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
        atexit.register(_ignore)  # registered first, so called last, after Ray's own

    def say(self) -> int:
        """Writes the line, unless it was written already; returns the exit code. From now on Ctrl-C ends the process at
        once.
        """
        self._interrupted = True
        if threading.current_thread() is threading.main_thread():
            for number in ENDING if self.requested else ():
                signal.signal(number, signal.SIG_IGN)  # Python's end would give a second one its default effect
            if callable(signal.getsignal(signal.SIGINT)):
                signal.signal(signal.SIGINT, self._interrupt)  # Ray Train's may be there still
        withdraw()
        with self._saying:
            if not self._said:
                by = f"stopped by {signal.Signals(self._number).name}" if self._number else "interrupted"
                sys.stderr.flush()
                os.write(self._stderr, own_line(self._line(by)))
                self._said = True
        return self.exit_code

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handles Ctrl-C. A second one may come anywhere in the clean-up after the first, where an exception could get lost."""
        if self._interrupted:
            os._exit(self.say())
        self._interrupted = True
        raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._number = self._number or number
        if self._interrupted:  # it came again: the first one is at work, and its time is limited
            return
        self._interrupted = True
        interrupt = signal.getsignal(signal.SIGINT)
        if not callable(interrupt) or interrupt == self._interrupt:  # a shell's background job ignores Ctrl-C, not this
            raise KeyboardInterrupt
        interrupt(signal.SIGINT, frame)

    def _end_late(self, receiver: socket.socket) -> None:
        while numbers := self._received(receiver):
            if signal.SIGINT in numbers and self._late is None:
                self._late = time.monotonic() + GRACE_S
            first = next((number for number in numbers if number in ENDING), None)
            if first is not None:
                self._number = self._number or first  # the main thread may not have come to its handler
                if OWN_RAY.is_set():
                    self.say()
                _wait()
                os._exit(self.say())

    def _received(self, receiver: socket.socket) -> bytes:
        """Returns the numbers of the next signals; ends the process if a Ctrl-C has not done so in time."""
        try:
            receiver.settimeout(None if self._late is None else max(0.001, self._late - time.monotonic()))
            return receiver.recv(64)
        except TimeoutError:
            os._exit(self.say())


def _ignore() -> None:
    """Ignores the signals: from here on Python would give them their default effect, which changes the exit code."""
    for number in (signal.SIGINT, *ENDING):
        signal.signal(number, signal.SIG_IGN)


def _wait() -> None:
    """Waits until the end of the process must be forced."""
    start, seen = time.monotonic(), set[int]()
    while (passed := time.monotonic() - start) < GRACE_S:
        children = _children()
        seen |= children.keys()
        if any(children.get(pid, "Z") == "Z" for pid in seen):
            time.sleep(0 if passed < LOST_S else min(LOST_S, GRACE_S - passed))
            return
        time.sleep(0.005 if passed < LOST_S else 0.1)


def _children() -> dict[int, str]:
    """States of Ray's processes that this one has started, by pid, as Linux names them (`Z`: it has ended)."""
    found = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            text = Path(path).read_text()
        except OSError:  # it has just ended
            continue
        pid, (state, parent) = int(text.split()[0]), text.rpartition(") ")[2].split()[:2]
        if int(parent) == os.getpid() and not is_waiting(pid):
            found[pid] = state
    return found
