"""DuckDB connections that Ctrl-C and SIGTERM can interrupt."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import duckdb

STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
AGAIN_S = 0.05
"""Seconds between interrupts: DuckDB forgets one that comes just before a statement starts."""


@contextmanager
def connected() -> Iterator[duckdb.DuckDBPyConnection]:
    """Context manager for a connection to an in-memory database.

    Python handles no signals while DuckDB computes, so a long query would continue after Ctrl-C. A second thread receives the
    number of the signal through a socket, whatever the main thread does, and interrupts DuckDB. The error that then leaves the
    block is raised as KeyboardInterrupt.
    """
    with duckdb.connect() as connection:
        if threading.current_thread() is threading.main_thread():
            with _interrupted(connection):
                yield connection
        else:  # signals are handled in the main thread
            yield connection


@contextmanager
def _interrupted(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    pressed, ended = threading.Event(), threading.Event()
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def watch() -> None:
        while numbers := receiver.recv(64):
            if before != -1:  # pass them on to the previous receiver (`jobs.terminal.signals`)
                os.write(before, numbers)
            if STOPS.intersection(numbers):
                pressed.set()
                break
        while pressed.is_set() and not ended.wait(AGAIN_S):
            connection.interrupt()

    watcher = threading.Thread(target=watch, name="ctrl-c", daemon=True)
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    watcher.start()
    try:
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            ended.set()
            sender.close()
            watcher.join()  # once it has read all signals: DuckDB may notice one and raise before that
            receiver.close()
    except Exception as error:
        if pressed.is_set():
            raise KeyboardInterrupt from error
        raise
