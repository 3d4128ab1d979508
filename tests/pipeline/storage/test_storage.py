"""Storage: local paths and S3 behave alike, keys may be odd, and errors say what to do."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import obstore
import pytest

from masklake.model.errors import ConfigError
from masklake.pipeline.errors import AccessDeniedError, InputNotFoundError, StorageError
from masklake.pipeline.storage.errors import translate
from masklake.pipeline.storage.options import StorageOptions
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import canonical, parse_uri
from masklake.pipeline.table.table import Table, open_table

ODD_KEYS = [
    "plain.jpg",
    "a b/c d.jpg",
    "a+b.jpg",
    "a%20b.jpg",
    "100%.jpg",
    "ü/日本 é.jpg",
    "q?x=1&y#z.jpg",
    "~'\"()[]{}*.jpg",
    "deep/" + "n" * 200 + ".jpg",
]
LONG_KEY = "x" * 500 + "/" + "y" * 495 + ".jpg"


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder on this machine, then one in a bucket."""
    if request.param == "local":
        return str(tmp_path / "root")
    return request.getfixturevalue("s3").uri("root")


@pytest.mark.parametrize("key", ODD_KEYS)
def test_a_key_round_trips_through_every_client(root: str, key: str) -> None:
    storage = Storage()
    uri = storage.join(root, key)
    storage.write_bytes(uri, b"image")
    store, path = storage.object_store(uri)
    arrow, arrow_path = storage.arrow(uri)
    assert storage.read_bytes(uri) == b"image"
    assert bytes(obstore.get(store, path).bytes()) == b"image"
    assert arrow.open_input_stream(arrow_path).read() == b"image"
    assert [row["uri"] for batch in storage.list_objects(root) for row in batch.to_pylist()] == [uri]
    assert canonical(uri) == uri


@pytest.mark.slow
def test_a_key_of_a_thousand_characters(s3: Any) -> None:
    assert len(LONG_KEY) == 1000
    uri = s3.put(LONG_KEY, b"image")
    assert Storage().read_bytes(uri) == b"image"
    assert [batch["uri"].to_pylist() for batch in Storage().list_objects(s3.uri())] == [[uri]]


@pytest.mark.slow
def test_one_unreachable_key_does_not_hide_the_others(s3: Any) -> None:
    """obstore cannot name `a//b`, and ends its listing there."""
    for key in ("f/a//b.jpg", "f/./c.jpg", "f/d.jpg", "f/", "g/e.jpg"):
        s3.put(key, b"1")
    listed = {row["uri"] for batch in Storage().list_objects(s3.uri("f")) for row in batch.to_pylist()}
    assert listed == {s3.uri(key) for key in ("f/a//b.jpg", "f/./c.jpg", "f/d.jpg")}


def test_a_listing_names_size_and_version(root: str) -> None:
    storage = Storage()
    for name in ("b.JPG", "a.png", "sub/c.webp"):
        storage.write_bytes(storage.join(root, name), name.encode())
    rows = sorted((row for batch in storage.list_objects(root) for row in batch.to_pylist()), key=lambda row: row["uri"])
    assert [row["uri"].removeprefix(root + "/") for row in rows] == ["a.png", "b.JPG", "sub/c.webp"]
    for row in rows:
        stat = storage.stat(row["uri"])
        assert (row["etag"], row["bytes"]) == (stat.etag, stat.bytes)
        assert '"' not in row["etag"]


def test_a_changed_object_has_another_version(root: str) -> None:
    storage = Storage()
    uri = storage.join(root, "a.jpg")
    storage.write_bytes(uri, b"one")
    before = storage.stat(uri)
    storage.write_bytes(uri, b"two")
    assert storage.stat(uri).etag != before.etag


def test_many_stats_leave_out_what_is_not_there(root: str) -> None:
    storage = Storage()
    uris = [storage.join(root, name) for name in ("a.jpg", "absent.jpg", "b.jpg")]
    for uri in (uris[0], uris[2]):
        storage.write_bytes(uri, b"image")
    rows = storage.stat_many(uris).to_pylist()
    assert [row["uri"] for row in rows] == uris
    assert [row["bytes"] for row in rows] == [5, None, 5]
    assert rows[0]["etag"] == storage.stat(uris[0]).etag
    assert rows[1]["etag"] is None


def test_existence_of_objects_and_folders(root: str) -> None:
    storage = Storage()
    storage.write_bytes(storage.join(root, "sub/a.jpg"), b"image")
    assert storage.exists(root)
    assert storage.exists(storage.join(root, "sub"))
    assert storage.exists(storage.join(root, "sub/a.jpg"))
    assert not storage.exists(storage.join(root, "su"))
    assert storage.is_file(storage.join(root, "sub/a.jpg"))
    assert not storage.is_file(storage.join(root, "sub"))
    storage.delete(storage.join(root, "sub/a.jpg"))
    storage.delete(storage.join(root, "sub/a.jpg"))
    assert not storage.exists(storage.join(root, "sub/a.jpg"))


def test_a_missing_object_says_so(root: str) -> None:
    storage = Storage()
    for call in (storage.read_bytes, storage.stat):
        with pytest.raises(InputNotFoundError, match="absent"):
            call(storage.join(root, "absent.jpg"))


def test_a_missing_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="nowhere"):
        list(Storage().list_objects(str(tmp_path / "nowhere")))


@pytest.mark.slow
def test_a_missing_bucket_says_so(s3: Any) -> None:
    storage = Storage()
    for call in (storage.read_bytes, lambda uri: list(storage.list_objects(uri)), storage.stat):
        with pytest.raises(InputNotFoundError, match="absent-bucket"):
            call("s3://absent-bucket/key")
    assert not storage.exists("s3://absent-bucket/key")


def test_an_unreachable_endpoint_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    storage = Storage(StorageOptions(endpoint_url=f"http://127.0.0.1:{port}", region="us-east-1"))
    start = time.monotonic()
    for call in (storage.read_bytes, lambda uri: list(storage.list_objects(uri))):
        with pytest.raises(StorageError, match=r"s3://bucket/key.*endpoint"):
            call("s3://bucket/key")
    assert time.monotonic() - start < 15


def test_a_refusal_is_access_denied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer = (
        "Generic S3 error: Error performing GET http://h/b/k in 2ms - Server returned non-2xx status code: 403 Forbidden: "
        "<?xml?><Error><Code>InvalidAccessKeyId</Code><AWSAccessKeyId>AKIDSECRET</AWSAccessKeyId></Error>"
    )
    error = translate(obstore.exceptions.GenericError(answer), "s3://b/k")
    assert isinstance(error, AccessDeniedError)
    assert "403 Forbidden InvalidAccessKeyId" in str(error)
    assert "AKIDSECRET" not in str(error)


class _Forbid(BaseHTTPRequestHandler):
    """An S3 server that refuses everything, as a policy does."""

    def _refuse(self) -> None:
        body = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><AWSAccessKeyId>key</AWSAccessKeyId></Error>"
        self.send_response(403)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_DELETE = _refuse

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """A storage whose every bucket is forbidden."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "not-for-messages")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nor-this")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Forbid)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Storage(StorageOptions(endpoint_url=f"http://127.0.0.1:{server.server_port}", region="us-east-1"))
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_forbidden_bucket_says_so(forbidden: Storage) -> None:
    calls: list[Callable[[str], object]] = [
        forbidden.read_bytes,
        forbidden.stat,
        forbidden.exists,
        lambda uri: list(forbidden.list_objects(uri)),
        lambda uri: forbidden.write_bytes(uri, b"x"),
    ]
    for call in calls:
        with pytest.raises(AccessDeniedError, match=r"s3://private/a\.jpg: access denied .*AWS_") as refused:
            call("s3://private/a.jpg")
        assert "not-for-messages" not in str(refused.value)
    assert forbidden.stat_many(["s3://private/a.jpg"]).to_pylist()[0]["etag"] is None
    with pytest.raises(AccessDeniedError, match="s3://private/table"):
        Table(forbidden, "s3://private/table").delta()


def test_local_trouble_has_local_remedies(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="is a folder where a file is needed"):
        Storage().read_bytes(str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises((InputNotFoundError, StorageError), match="file") as raised:
        Storage().write_bytes(str(tmp_path / "file" / "below"), b"")
    assert "endpoint" not in str(raised.value)
    with pytest.raises(ConfigError, match="an empty path"):
        parse_uri("")


@pytest.mark.parametrize("name", ["new%20tab", "back\\slash", "two\nlines"])
def test_a_path_that_delta_misreads_is_refused_before_anything_is_labelled(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="Delta keeps no table"):
        open_table(Storage(), str(tmp_path / name))
