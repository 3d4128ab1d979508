"""Checks before joining a Ray cluster: whether it answers, accepts us, has our versions, and has a node on this host.

Without these checks Ray answers with a minute of silence, a traceback, or a process that its core ends without a message.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from masklake.model.errors import ConfigError
from masklake.pipeline.errors import ClusterUnusableError

ANSWER_S = 10.0
"""Seconds within which a cluster must answer; a busy head takes a second or two."""

START_S = 5.0
"""Seconds within which this host's node must appear: `ray start` returns slightly before it does."""

ON_A_NODE = "Run the command on one of the cluster's nodes, or hand it over with `ray job submit -- masklake ...`"

PLACES = "RAY_AUTH_TOKEN, the file named by RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token"


class Place(NamedTuple):
    """Where this process joins a cluster: host:port of the head, IP address and folder of the logs of this host's node."""

    address: str
    node_ip: str
    logs: str


def check_cluster(address: str) -> Place:
    """Returns the head's address and this host's node. Raises ConfigError or ClusterUnusableError if `ray.init(address)` could
    not succeed.

    address: host:port, or "auto". Ray itself uses any node whose process it sees, which may belong to another network; the
    cluster would then know the driver by an address that nobody can reach.
    """
    from ray._private import services
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    check_form(address)
    if address == "auto":  # as ray.init does for this address alone
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    found = services.canonicalize_bootstrap_address(address) if address == "auto" else address
    if found is None:
        raise ClusterUnusableError("no Ray cluster runs on this host (address auto); start one here, or name one as HOST:PORT")
    _check_token(found)
    _check_answer(found)
    client = _client(found)
    _check_version(found, client)
    deadline = time.monotonic() + START_S
    while True:
        if here := [node for node in _living_nodes(found, client) if _is_here(node)]:
            node = next((node for node in here if _is_own(node.node_manager_address)), here[0])
            return Place(found, str(node.node_manager_address), f"{node.session_dir}/logs")
        if time.monotonic() >= deadline:
            raise ClusterUnusableError(f"this host has no node of the Ray cluster at {found}, and Ray needs one. {ON_A_NODE}")
        time.sleep(0.5)


def check_form(address: str) -> None:
    """Raises ConfigError for an invalid address."""
    if address == "auto":
        return
    if "://" in address:
        raise ConfigError(
            f"{address} is the address of Ray's client or its dashboard, which supports neither Ray Data nor Ray Train. "
            f"{ON_A_NODE}; --address auto finds the cluster there"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"{address!r} is not the address of a Ray cluster; write HOST:PORT (of the head, usually :6379) or auto"
        )


def _check_answer(address: str) -> None:
    import grpc

    channel = grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),))  # Ray does not use a proxy either
    try:
        grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
    except grpc.FutureTimeoutError:
        reason = _reachable(address)
        raise ClusterUnusableError(f"no Ray cluster answers at {address} ({reason}); check --address or RAY_ADDRESS") from None
    finally:
        channel.close()


def _reachable(address: str) -> str:
    """Returns why no Ray cluster answers at the address."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError as error:
        return str(error.strerror or error).lower()
    return "what listens there is not Ray's head"


def _check_token(address: str) -> None:
    """Checks the token: with token authentication but without a token, Ray's core would end the process."""
    import ray._raylet
    from ray.exceptions import AuthenticationError

    core: Any = ray._raylet  # its stubs leave these out
    if core.get_authentication_mode() != core.AuthenticationMode.TOKEN:
        return
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path and not os.environ.get("RAY_AUTH_TOKEN"):  # Ray reads the file only without that variable
        try:
            token = Path(path).read_bytes().strip()
        except OSError as error:
            raise ClusterUnusableError(
                f"cannot read {path}, the file named by RAY_AUTH_TOKEN_PATH: {error.strerror}"
            ) from error
        if not token:
            raise ClusterUnusableError(
                f"{path}, the file named by RAY_AUTH_TOKEN_PATH, is empty; put the cluster's token there"
            )
    try:
        known = core.AuthenticationTokenLoader.instance().has_token()
    except AuthenticationError:
        known = False
    if not known:
        raise ClusterUnusableError(
            f"RAY_AUTH_MODE is token, and there is no token for the Ray cluster at {address}; "
            f"put the cluster's own into {PLACES}"
        )


def _client(address: str) -> Any:
    import ray._raylet
    from ray.exceptions import AuthenticationError, RpcError

    core: Any = ray._raylet
    try:
        return core.GcsClient(address=address)
    except AuthenticationError as error:
        raise ClusterUnusableError(refusal(address, os.environ.get("RAY_AUTH_MODE"))) from error
    except RpcError as error:
        raise ClusterUnusableError(f"the Ray cluster at {address} did not answer ({error}); check its head") from error


def refusal(address: str, mode: str | None) -> str:
    """Returns the message for a token that the cluster rejects. It names places, never a token."""
    if (mode or "").lower() != "token":
        return f"the Ray cluster at {address} requires a token: set RAY_AUTH_MODE=token, with the cluster's token in {PLACES}"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    used = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else path or "~/.ray/auth_token"
    return f"the Ray cluster at {address} refuses the token in {used}; put the cluster's own there (`ray get-auth-token`)"


def _check_version(address: str, client: Any) -> None:
    import ray
    from ray._common.usage.usage_lib import get_cluster_metadata

    theirs = get_cluster_metadata(client) or {}
    check_versions(
        address,
        (theirs.get("ray_version"), theirs.get("python_version")),
        (ray.__version__, platform.python_version()),
    )


def check_versions(address: str, theirs: tuple[str | None, str | None], ours: tuple[str, str]) -> None:
    """Raises ClusterUnusableError if the versions of Ray, or the first two numbers of Python's, differ. Pairs: (Ray,
    Python).
    """
    for name, there, here, parts in (("Ray", theirs[0], ours[0], 9), ("Python", theirs[1], ours[1], 2)):
        if there is not None and there.split(".")[:parts] != here.split(".")[:parts]:
            raise ClusterUnusableError(
                f"the Ray cluster at {address} runs {name} {there}, this command {name} {here}; the versions must be "
                f"equal. {_remedy(name, there, here)}"
            )


def _remedy(name: str, there: str, here: str) -> str:
    """Returns how the versions can be made equal: masklake works with one minor version of Ray (`pyproject.toml`)."""
    on_the_cluster = "the image of this command on the cluster"
    if name == "Ray" and there.split(".")[:2] != here.split(".")[:2]:
        return f"This masklake needs Ray {'.'.join(here.split('.')[:2])}: use {on_the_cluster}, or Ray {here}"
    return f"Install masklake with {name} {there} here, or use {on_the_cluster}"


def _living_nodes(address: str, client: Any) -> Iterable[Any]:
    from ray.exceptions import RpcError

    try:
        nodes = list(client.get_all_node_info(timeout=ANSWER_S).values())
    except RpcError as error:
        raise ClusterUnusableError(f"the Ray cluster at {address} did not answer ({error}); check its head") from error
    return [node for node in nodes if node.state == type(node).ALIVE]


def reaches(address: str, timeout_s: float = 3.0) -> bool:
    """Returns whether something accepts connections at host:port; a busy head does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except OSError:
        return False
    return True


def _is_here(node: Any) -> bool:
    """Returns whether a node runs on this host and in its network; its address may be a translated one, not this host's."""
    if not _listens(node.raylet_socket_name):
        return False
    return _is_own(node.node_manager_address) or reaches(f"127.0.0.1:{node.node_manager_port}", timeout_s=1)


def _is_own(address: str) -> bool:
    """Returns whether an IP address belongs to this host."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as any_port:
        try:
            any_port.bind((address, 0))
        except OSError:
            return False
    return True


def _listens(path: str) -> bool:
    """Returns whether a process of this host listens on the socket."""
    with socket.socket(socket.AF_UNIX) as node:
        try:
            node.connect(path)
        except OSError:
            return False
    return True
