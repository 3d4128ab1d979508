"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.s3_proxy import S3Proxy

# Real data stands beside the checkout where it stands at all; the tests generate what they need and use it as well.
SHARED_DATA = Path(os.environ.get("MASKLAKE_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

# Each of the processes that share the machine in `make test` computes on one core; theirs count on it, too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background job inherits that Ctrl-C is ignored, and so do the commands that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signals_are_handled_as_before() -> Iterator[None]:
    """A command that a test runs in this process handles signals until the process ends; its second Ctrl-C would be the next
    test's first, and end all tests.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers, wakeup = [signal.getsignal(number) for number in numbers], signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        if handler is not None:  # it was not set by Python
            signal.signal(number, handler)
    signal.set_wakeup_fd(wakeup)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and annotations; tests that need it are skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data is not at hand: {SHARED_DATA} (set MASKLAKE_SHARED_DATA)")
    return SHARED_DATA


@dataclass(frozen=True)
class S3Server:
    """An S3 protocol server of this test session, with one empty bucket; AWS_* variables point at it."""

    endpoint: str
    bucket: str
    client: Any  # botocore's: what an independent client sees

    def uri(self, key: str = "") -> str:
        """The object's URI in the session's bucket."""
        return f"s3://{self.bucket}/{key}".rstrip("/")

    def put(self, key: str, data: bytes) -> str:
        """Store an object as another program would; its URI."""
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)
        return self.uri(key)


S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "masklake-test-key",
    "AWS_SECRET_ACCESS_KEY": "masklake-test-secret",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[str]:
    """One moto server for the session, on a free port of this machine only; its endpoint."""
    moto_server = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line a request buries a failed test's own output
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(_s3_server: str, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3 server with a bucket of this test's own; the AWS_* variables of this process (and its children) name it."""
    import botocore.session

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", _s3_server)
    client = botocore.session.Session().create_client("s3", endpoint_url=_s3_server, region_name="us-east-1")
    bucket = f"test-{os.urandom(6).hex()}"
    client.create_bucket(Bucket=bucket)
    return S3Server(_s3_server, bucket, client)


@pytest.fixture
def s3_proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    """A proxy in front of `s3` that fails by rule (tests/s3_proxy.py); the AWS_* variables point at it, `s3` at the server."""
    proxy = S3Proxy(s3.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.stop()
