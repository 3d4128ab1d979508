"""When a cluster counts as lost, and how a process ends then."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from typing import Any

import pytest

from masklake.jobs.cluster import watch as cluster_watch
from masklake.jobs.cluster.checks import Place, reaches
from masklake.jobs.cluster.watch import PATIENCE_S, verdict, watched_head


def test_a_cluster_is_lost_with_its_head_or_this_hosts_node() -> None:
    assert verdict("h:1", 0, True) is None
    assert verdict("h:1", PATIENCE_S - 1, True) is None
    assert verdict("h:1", PATIENCE_S, True) == "the head of the Ray cluster at h:1 has been gone for 40 s"
    assert verdict("h:1", 0, False) == "the Ray cluster at h:1 has lost this host's node"


def test_a_head_that_accepts_connections_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert reaches(address)
    assert not reaches(address)


def test_the_watch_ends_with_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray drops its client at once when a process disconnects, also between two looks of this thread."""

    class Client:
        address = "h:1"
        asked = 0

        def check_alive(self, nodes: list[object], timeout: float) -> list[bool]:
            self.asked += 1
            if self.asked < 3:
                return [True]
            monkeypatch.setattr(cluster_watch, "_client", lambda: None)
            return [False]

    client = Client()
    monkeypatch.setattr(cluster_watch, "POLL_S", 0.01)
    monkeypatch.setattr(cluster_watch, "reaches", lambda address: address == "h:1")
    monkeypatch.setattr(cluster_watch, "_client", lambda: client)
    monkeypatch.setattr(cluster_watch, "_end", lambda *_: pytest.fail("it ended a process that has left the cluster"))
    cluster_watch._watch(client, object(), "logs")
    assert client.asked == 3


def test_the_head_is_watched_from_before_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    place, ended = Place("h:1", "127.0.0.1", "logs"), threading.Event()
    said: list[tuple[str, str, int]] = []

    def end(*arguments: Any) -> None:
        said.append(arguments)
        ended.set()

    monkeypatch.setattr(cluster_watch, "POLL_S", 0.01)
    monkeypatch.setattr(cluster_watch, "PATIENCE_S", 0.05)
    monkeypatch.setattr(cluster_watch, "_end", end)
    monkeypatch.setattr(cluster_watch, "reaches", lambda address: address != "h:1")
    with watched_head(place, 7):
        assert ended.wait(30)
    assert said[0] == ("the head of the Ray cluster at h:1 has been gone for 0 s", "logs", 7)


def test_the_end_is_a_line_with_the_logs_and_its_own_code() -> None:
    code = "from masklake.jobs.cluster.watch import _end; _end('the head is gone', '/tmp/ray/session/logs')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 45
    assert done.stderr == (
        "masklake: error: the head is gone. What was finished is kept; start the same command again. "
        "Ray's own logs: /tmp/ray/session/logs\n"
    )
