"""Checks of a Ray cluster before this process joins it: address, answer, token, version, and a node on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from masklake.jobs.cluster import checks as cluster_checks
from masklake.jobs.cluster.checks import (
    _check_token,
    _is_here,
    _is_own,
    _listens,
    _living_nodes,
    check_cluster,
    check_form,
    check_versions,
    refusal,
)
from masklake.model.errors import ConfigError
from masklake.pipeline.errors import ClusterUnusableError


@pytest.mark.parametrize(
    "address", ["garbage", "host:", ":6379", "host:port", "host:0", "host:65536", "ray://h:10001", "http://h:8265"]
)
def test_what_is_no_address_is_said_at_once(address: str) -> None:
    with pytest.raises(ConfigError, match=address):
        check_form(address)


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "head.example:6379", "[::1]:6379"])
def test_addresses_pass(address: str) -> None:
    check_form(address)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port where something else than Ray listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_a_port_without_ray_is_said(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_checks, "ANSWER_S", 0.2)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    port = listener.getsockname()[1]
    with pytest.raises(ClusterUnusableError, match=f"127.0.0.1:{port} .*not Ray's head.*--address"):
        check_cluster(f"127.0.0.1:{port}")
    listener.close()
    with pytest.raises(ClusterUnusableError, match=f"no Ray cluster answers at 127.0.0.1:{port} .*connection refused"):
        check_cluster(f"127.0.0.1:{port}")


def test_a_refused_token_names_its_place_and_never_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "0123456789abcdef"
    assert "set RAY_AUTH_MODE=token" in refusal("h:1", None)
    assert "set RAY_AUTH_MODE=token" in refusal("h:1", "disabled")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert "refuses the token in ~/.ray/auth_token" in refusal("h:1", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/secrets/ray")
    assert "refuses the token in /secrets/ray;" in refusal("h:1", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secret)
    message = refusal("h:1", "token")
    assert "refuses the token in RAY_AUTH_TOKEN;" in message
    assert secret not in message


def test_a_file_without_a_token_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray._raylet

    monkeypatch.setattr(ray._raylet, "get_authentication_mode", lambda: ray._raylet.AuthenticationMode.TOKEN)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    (tmp_path / "token").write_text("\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ClusterUnusableError, match=r"token, the file named by RAY_AUTH_TOKEN_PATH, is empty"):
        _check_token("h:1")


@pytest.mark.slow
def test_a_file_that_ray_does_not_read_refuses_nothing(tmp_path: Path) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 40, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    program = "from masklake.jobs.cluster.checks import _check_token; _check_token('h:1')"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, **token}, check=True)


def test_versions_must_be_equal_but_for_pythons_last_number() -> None:
    ours = ("2.60.0", "3.11.7")
    check_versions("h:1", ("2.60.0", "3.11.9"), ours)
    check_versions("h:1", (None, None), ours)
    with pytest.raises(ClusterUnusableError, match=r"h:1 runs Ray 2\.59\.0, this command Ray 2\.60\.0"):
        check_versions("h:1", ("2.59.0", "3.11.7"), ours)
    with pytest.raises(ClusterUnusableError, match=r"This masklake needs Ray 2\.60: use the image of this command on"):
        check_versions("h:1", ("2.53.0", "3.11.7"), ours)  # no masklake can be installed with it
    with pytest.raises(ClusterUnusableError, match=r"Install masklake with Ray 2\.60\.1 here"):
        check_versions("h:1", ("2.60.1", "3.11.7"), ours)
    with pytest.raises(ClusterUnusableError, match=r"runs Python 3\.12\.1, this command Python 3\.11\.7"):
        check_versions("h:1", ("2.60.0", "3.12.1"), ours)


def test_a_node_is_here_when_its_socket_answers() -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as node:  # pytest's own paths are too long
        path = str(Path(folder, "raylet"))
        assert not _listens(path)
        node.bind(path)
        assert not _listens(path), "a node that died leaves its socket's file"
        node.listen()
        assert _listens(path)


def test_dead_nodes_do_not_count() -> None:
    class Node(SimpleNamespace):
        ALIVE, DEAD = 0, 1

    nodes: dict[str, Any] = {"a": Node(state=0), "b": Node(state=1)}
    client = SimpleNamespace(get_all_node_info=lambda timeout: nodes)
    assert list(_living_nodes("h:1", client)) == [nodes["a"]]


def test_a_node_is_here_where_its_socket_and_its_address_are() -> None:
    """Containers may share the folder of the sockets, and not the network."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX) as raylet,
        socket.create_server(("127.0.0.1", 0)) as manager,
    ):
        path = str(Path(folder, "raylet"))
        raylet.bind(path)
        raylet.listen()
        port, elsewhere = manager.getsockname()[1], "192.0.2.1"  # RFC 5737: nobody's
        assert _is_own("127.0.0.1")
        assert not _is_own(elsewhere)

        def node(address: str, port: int, socket_name: str = path) -> SimpleNamespace:
            return SimpleNamespace(raylet_socket_name=socket_name, node_manager_address=address, node_manager_port=port)

        assert _is_here(node("127.0.0.1", 1))
        assert _is_here(node(elsewhere, port)), "its address is translated on the way"
        assert not _is_here(node(elsewhere, 1)), "another network"
        assert not _is_here(node("127.0.0.1", port, str(Path(folder, "none"))))
