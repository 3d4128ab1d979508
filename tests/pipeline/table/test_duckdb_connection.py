"""Ctrl-C while DuckDB computes."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import duckdb
import pytest

from masklake.pipeline.table.duckdb_connection import connected

pytestmark = pytest.mark.timeout(120)

# Minutes of work, before the first row and between rows.
COUNTING = "SELECT count(*) FROM range(100000000000) WHERE range % 7 = hash(range) % 3"
SEARCHING = "SELECT * FROM range(100000000000) WHERE hash(range) % 100000000000 < 2"

RUNS: dict[str, Callable[[Any], object]] = {
    "execute": lambda connection: connection.execute(COUNTING),
    "reader": lambda connection: connection.sql(COUNTING).to_arrow_reader(1000),
    "batches": lambda connection: connection.sql(SEARCHING).to_arrow_reader(1000).read_all(),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
@pytest.mark.parametrize("delay_s", [0.0, 0.5])
def test_a_long_query_ends(run: Callable[[Any], object], delay_s: float) -> None:
    press = threading.Timer(delay_s, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), connected() as connection:  # noqa: PT012 - pressed when it is open
        press.start()
        run(connection)
    press.join()


def test_a_signal_that_duckdb_notices_first_is_an_interrupt() -> None:
    """DuckDB asks for signals itself at times and raises its own error, before the watching thread has had a turn."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # no turn but where this thread waits
    try:
        with pytest.raises(KeyboardInterrupt), connected():  # noqa: PT012 - as DuckDB does, in one go
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            raise RuntimeError("Query interrupted")
    finally:
        sys.setswitchinterval(interval)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(duckdb.CatalogException), connected() as connection:
        connection.execute("SELECT * FROM nowhere")


def test_what_received_signals_before_does_so_again() -> None:
    def current() -> int:
        number = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(number)
        return number

    before = current()
    with connected() as connection:
        assert current() != before
        assert connection.execute("SELECT 1").fetchall() == [(1,)]
    assert current() == before


def test_other_threads_connect_too() -> None:
    rows: list[Any] = []

    def work() -> None:
        with connected() as connection:
            rows.extend(connection.execute("SELECT 1").fetchall())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert rows == [(1,)]
