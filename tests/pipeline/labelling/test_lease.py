"""One driver writes a run: a second one is refused, and a dead one is replaced."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import obstore
import pytest

from masklake.pipeline.errors import LeaseHeldError, LeaseLostError, StorageError
from masklake.pipeline.labelling import lease as lease_module
from masklake.pipeline.labelling.lease import Holder, Lease
from masklake.pipeline.storage.storage import Storage

REPOSITORY = Path(__file__).resolve().parents[3]

HOLD = """
import sys, time
from masklake.pipeline.labelling.lease import Lease
from masklake.pipeline.storage.storage import Storage
with Lease.acquire(Storage(), sys.argv[1], "night-1", ttl_s=float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def other_driver(place: str) -> Iterator[subprocess.Popen[str]]:
    """A real second process that holds the lease of night-1."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, place, "20"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_second_driver_is_refused_and_told_who_holds_it(place: str, other_driver: subprocess.Popen[str]) -> None:
    start = time.monotonic()
    with pytest.raises(LeaseHeldError, match=rf"night-1.*process {other_driver.pid}.*\d+ s"):
        Lease.acquire(Storage(), place, "night-1")
    assert time.monotonic() - start < 5, "on the same host no expiry needs to be waited for"


@pytest.mark.slow
def test_the_lease_of_a_killed_driver_is_free_at_once(place: str, other_driver: subprocess.Popen[str]) -> None:
    other_driver.send_signal(signal.SIGKILL)
    other_driver.wait()
    start = time.monotonic()
    with Lease.acquire(Storage(), place, "night-1") as lease:
        lease.check()
        lease.confirm()
    assert time.monotonic() - start < 5


def test_a_lease_is_given_back(place: str) -> None:
    for _ in range(3):
        with Lease.acquire(Storage(), place, "night-1") as lease:
            lease.confirm()
            with pytest.raises(LeaseHeldError, match=str(os.getpid())):
                Lease.acquire(Storage(), place, "night-1")
        with pytest.raises(LeaseLostError, match="released"):
            lease.check()


def test_runs_have_leases_of_their_own(place: str) -> None:
    with Lease.acquire(Storage(), place, "night-1"), Lease.acquire(Storage(), place, "night-2") as second:
        second.check()


def test_a_lease_is_given_back_when_its_run_fails(place: str) -> None:
    with pytest.raises(RuntimeError, match="the run failed"), Lease.acquire(Storage(), place, "night-1"):
        raise RuntimeError("the run failed")
    Lease.acquire(Storage(), place, "night-1").release()


def test_a_removed_lock_file_is_a_lost_lease(tmp_path: Path) -> None:
    with Lease.acquire(Storage(), str(tmp_path), "night-1") as lease:
        (tmp_path / "_masklake/night-1/lease").unlink()
        with pytest.raises(LeaseLostError, match="removed"):
            lease.check()


# -- holders on other hosts: object stores only ------------------------------------------------------------------------


@pytest.fixture
def elsewhere(s3: Any) -> Any:
    """Puts a lease as a driver on another host would; gives the function that renews it."""
    storage = Storage()
    store, key = storage.object_store(s3.uri("table/_masklake/night-1/lease"))

    def put(**changes: Any) -> None:
        holder = replace(Holder.this_process(1.5), host="far-away/boot/1", **changes)
        obstore.put(store, key, holder.to_json())

    return put


@pytest.mark.slow
def test_the_lease_of_a_silent_host_is_taken_over_after_its_lifetime(s3: Any, elsewhere: Any) -> None:
    elsewhere()
    said: list[str] = []
    start = time.monotonic()
    with Lease.acquire(Storage(), s3.uri("table"), "night-1", on_wait=said.append) as lease:
        assert 1.4 < time.monotonic() - start < 10
        lease.confirm()
    assert len(said) == 1
    assert "far-away" in said[0]
    assert "2 s" in said[0]


@pytest.mark.slow
def test_the_lease_of_a_host_that_renews_is_respected(s3: Any, elsewhere: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere()
    pause = time.sleep

    def renew_meanwhile(seconds: float) -> None:
        elsewhere(renewed_at="2026-01-01T00:00:01+00:00")
        pause(seconds)

    monkeypatch.setattr(lease_module.time, "sleep", renew_meanwhile)
    with pytest.raises(LeaseHeldError, match="far-away"):
        Lease.acquire(Storage(), s3.uri("table"), "night-1", on_wait=lambda _: None)


@pytest.mark.slow
def test_a_driver_whose_lease_was_taken_over_stops(s3: Any, elsewhere: Any) -> None:
    """Checked by the renewal thread while it works, and by a renewal right before it commits."""
    for ask in ("check", "confirm"):
        with Lease.acquire(Storage(), s3.uri(f"table-{ask}"), "night-1", ttl_s=1.0 if ask == "check" else 60.0) as lease:
            store, key = Storage().object_store(lease.uri)
            obstore.put(store, key, replace(Holder.this_process(30), host="far-away").to_json())
            if ask == "check":
                lease._thread.join(timeout=10)  # type: ignore[attr-defined]
            with pytest.raises(LeaseLostError, match="took it over"):
                getattr(lease, ask)()
        left = Holder.from_json(bytes(obstore.get(store, key).bytes()), lease.uri)
        assert left.host == "far-away", "what another driver holds is left alone"


@pytest.mark.slow
def test_a_store_that_begins_to_refuse_the_right_tag_is_not_taken_for_another_driver(s3: Any, s3_proxy: Any) -> None:
    with Lease.acquire(Storage(), s3.uri("table"), "night-1") as lease:
        s3_proxy.conditions = "ceph"
        with pytest.raises(LeaseLostError, match=r"refused to replace it under its own entity tag"):
            lease.confirm()


@pytest.mark.slow
def test_a_driver_that_could_not_renew_in_time_stops(s3: Any, s3_proxy: Any) -> None:
    with Lease.acquire(Storage(), s3.uri("table"), "night-1", ttl_s=0.6) as lease:
        refused = s3_proxy.answer(403, "ExpiredToken", "PUT", "/lease")
        while lease._trouble is None:  # type: ignore[attr-defined]
            time.sleep(0.05)
        assert refused.hits
        time.sleep(0.8)
        with pytest.raises(LeaseLostError, match=r"could not be renewed for \d+ s .*credentials have expired .403 Forb"):
            lease.check()
    s3_proxy.clear()
    Lease.acquire(Storage(), s3.uri("table"), "night-1").release()


@pytest.mark.slow
def test_a_lease_outlives_its_lifetime_by_renewal(s3: Any) -> None:
    with Lease.acquire(Storage(), s3.uri("table"), "night-1", ttl_s=0.9) as lease:
        time.sleep(1.5)
        lease.check()
        lease.confirm()


def test_a_later_process_of_the_same_number_is_another_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Holder.this_process(30)
    assert mine.is_gone, "this process holds no such lease"
    monkeypatch.setattr(lease_module, "_HELD_HERE", {mine.token})
    assert not mine.is_gone
    if mine.pid_started:
        assert replace(mine, pid_started="1").is_gone
    assert replace(mine, released=True).is_gone
    assert not replace(mine, host="far-away", pid_started="1").is_gone


# -- lost replies ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("status", [None, 502])
def test_no_lost_reply_of_the_lease_costs_the_run(s3: Any, s3_proxy: Any, status: int | None) -> None:
    for _ in range(2):  # created, then taken over from itself
        rule = s3_proxy.drop_reply("PUT", "/lease", status=status)
        with Lease.acquire(Storage(), s3.uri("table"), "night-1") as lease:
            assert rule.hits == 1
            for _ in range(2):
                rule = s3_proxy.drop_reply("PUT", "/lease", status=status)
                lease.confirm()
                assert rule.hits == 1
            rule = s3_proxy.drop_reply("PUT", "/lease", status=status)
        assert rule.hits == 1
        left = Holder.from_json(s3.client.get_object(Bucket=s3.bucket, Key="table/_masklake/night-1/lease")["Body"].read(), "")
        assert left.released


@pytest.mark.slow
def test_a_renewal_without_any_answer_is_made_up_for_by_the_next(s3: Any, s3_proxy: Any) -> None:
    """The put arrives, and neither its reply nor any answer to our question does."""
    with Lease.acquire(Storage(), s3.uri("table"), "night-1") as lease:
        s3_proxy.drop_reply("PUT", "/lease")
        asked = s3_proxy.answer(403, "AccessDenied", "GET", "/lease", times=1)
        with pytest.raises(StorageError):
            lease.confirm()
        assert asked.hits == 1
        lease.confirm()


@pytest.mark.slow
def test_a_failed_start_can_be_repeated_in_the_same_process(s3: Any, s3_proxy: Any) -> None:
    s3_proxy.drop_reply("PUT", "/lease")
    s3_proxy.answer(403, "AccessDenied", "GET", "/lease")
    with pytest.raises(StorageError):
        Lease.acquire(Storage(), s3.uri("table"), "night-1")
    assert "lease" in str(s3.client.list_objects_v2(Bucket=s3.bucket)["Contents"]), "the put had arrived"
    s3_proxy.clear()
    with Lease.acquire(Storage(), s3.uri("table"), "night-1") as lease:
        lease.confirm()


@pytest.mark.slow
def test_a_removed_lease_is_lost(s3: Any) -> None:
    with Lease.acquire(Storage(), s3.uri("table"), "night-1") as lease:
        s3.client.delete_object(Bucket=s3.bucket, Key="table/_masklake/night-1/lease")
        with pytest.raises(LeaseLostError, match="its object was removed"):
            lease.confirm()


@pytest.mark.slow
def test_a_gateway_that_compares_tags_with_their_quotes(s3: Any, s3_proxy: Any) -> None:
    """Ceph's RADOS gateway 16.2."""
    s3_proxy.conditions = "ceph"
    for _ in range(2):
        with Lease.acquire(Storage(), s3.uri("table"), "night-1") as lease:
            lease.confirm()
            with pytest.raises(LeaseHeldError):
                Lease.acquire(Storage(), s3.uri("table"), "night-1")


def test_a_lock_whose_file_cannot_be_emptied_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the run has committed stays committed: the lock decides, not the content."""

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    lease = Lease.acquire(Storage(), str(tmp_path), "night-1")
    with monkeypatch.context() as patch:
        patch.setattr(lease_module.FileLease, "_write", broken)
        lease.release()
    assert "night-1/lease: still names this process" in caplog.text
    Lease.acquire(Storage(), str(tmp_path), "night-1").release()


def test_a_lock_that_could_not_be_written_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lease_module.FileLease, "_write", full)
        with pytest.raises(StorageError, match="no space left on the disk; free some"):
            Lease.acquire(Storage(), str(tmp_path), "night-1")
    Lease.acquire(Storage(), str(tmp_path), "night-1").release()
