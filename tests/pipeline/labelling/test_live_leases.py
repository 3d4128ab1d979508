"""Which leases are held, as seen by a process that holds none of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from masklake.pipeline.errors import StorageError
from masklake.pipeline.labelling.lease import Holder, Lease
from masklake.pipeline.labelling.live_leases import held, living
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.table import Table, open_table
from tests.pipeline.labelling.test_lease import HOLD, REPOSITORY


@pytest.fixture
def table(place: str) -> Table:
    return open_table(Storage(), place)


@pytest.fixture
def other_driver(table: Table) -> Iterator[subprocess.Popen[str]]:
    """A second process that holds the lease of night-1."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, table.uri, "20"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def no_wait(line: str) -> None:
    pytest.fail(f"waited: {line}")


def foreign(ttl_s: float, **changes: Any) -> Holder:
    """A holder on another host."""
    return replace(Holder.this_process(ttl_s), host="elsewhere/boot/1", **changes)


def test_what_is_held_here_lives_until_it_is_given_back(table: Table) -> None:
    assert held(table, ["night-1"]) == {}
    with Lease.acquire(table.storage, table.uri, "night-1"), Lease.acquire(table.storage, table.uri, "night-2"):
        found = living(table, ["night-1", "night-2", "night-3"], no_wait)
        assert [(lease.name, lease.holder.pid, lease.certain, lease.seems_alive) for lease in found] == [
            (name, os.getpid(), True, True) for name in ("night-1", "night-2")
        ]
        Lease.acquire(table.storage, table.uri, "night-3").release()
    assert living(table, ["night-1", "night-2", "night-3"], no_wait) == []


def test_a_look_does_not_disturb_the_holder(table: Table) -> None:
    with Lease.acquire(table.storage, table.uri, "night-1") as lease:
        for _ in range(3):
            assert living(table, ["night-1"], no_wait)
        lease.confirm()


@pytest.mark.slow
def test_the_lease_of_another_process_lives_as_long_as_that(table: Table, other_driver: subprocess.Popen[str]) -> None:
    (lease,) = living(table, ["night-1"], no_wait)
    assert lease.holder.pid == other_driver.pid
    other_driver.send_signal(signal.SIGKILL)
    other_driver.wait()
    assert living(table, ["night-1"], no_wait) == []
    assert held(table, ["night-1"]) == {}


def test_a_file_that_nobody_locks_is_free_whatever_it_says(tmp_path: Path) -> None:
    table = open_table(Storage(), str(tmp_path))
    table.storage.write_bytes(table.lease_uri("night-1"), foreign(30).to_json())
    assert living(table, ["night-1"], no_wait) == []


@pytest.mark.slow
def test_an_expired_lease_of_another_host_is_watched_before_it_counts_as_free(s3: Any) -> None:
    table = open_table(Storage(), s3.uri("table"))
    for name in ("night-1", "night-2"):
        table.storage.write_bytes(table.lease_uri(name), foreign(0.6).to_json())
    lines: list[str] = []
    start = time.monotonic()
    assert living(table, ["night-1", "night-2"], lines.append) == []
    assert time.monotonic() - start >= 0.6
    assert len(lines) == 1, "both are watched at the same time"
    assert "night-1 is leased to elsewhere" in lines[0]


@pytest.mark.slow
def test_a_lease_of_another_host_that_is_renewed_lives(s3: Any) -> None:
    table = open_table(Storage(), s3.uri("table"))
    table.storage.write_bytes(table.lease_uri("night-1"), foreign(60).to_json())
    renew = threading.Timer(0.5, lambda: table.storage.write_bytes(table.lease_uri("night-1"), foreign(60).to_json()))
    renew.start()
    (lease,) = living(table, ["night-1"], lambda line: None)
    renew.join()
    assert lease.name == "night-1"


@pytest.mark.slow
def test_a_list_goes_by_the_last_renewal(s3: Any) -> None:
    table = open_table(Storage(), s3.uri("table"))
    hour_ago = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    table.storage.write_bytes(table.lease_uri("old"), foreign(30, renewed_at=hour_ago).to_json())
    table.storage.write_bytes(table.lease_uri("new"), foreign(30).to_json())
    table.storage.write_bytes(table.lease_uri("back"), foreign(30, released=True).to_json())
    found = held(table, ["old", "new", "back"])
    assert {name: (lease.certain, lease.seems_alive) for name, lease in found.items()} == {
        "old": (False, False),
        "new": (False, True),
    }


@pytest.mark.slow
def test_what_is_no_lease_is_told(s3: Any) -> None:
    table = open_table(Storage(), s3.uri("table"))
    table.storage.write_bytes(table.lease_uri("night-1"), b"{}")
    with pytest.raises(StorageError, match="night-1/lease: not a lease"):
        held(table, ["night-1"])
