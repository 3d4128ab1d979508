"""The tests' S3 proxy: it forwards everything else unchanged, and each rule does what it says."""

from __future__ import annotations

import io
from typing import Any

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, PreconditionError
from obstore.store import S3Store

from masklake.pipeline.storage.storage import Storage

pytestmark = pytest.mark.slow


@pytest.fixture
def store(s3: Any, s3_proxy: Any) -> S3Store:
    """The bucket behind the proxy, by a client that repeats nothing."""
    return S3Store(
        s3.bucket,
        endpoint=s3_proxy.endpoint,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )


def test_every_client_passes_through(s3: Any, s3_proxy: Any) -> None:
    storage = Storage()
    uri = s3.uri("folder/ü a+b.jpg")
    storage.write_bytes(uri, b"one")
    assert s3.client.get_object(Bucket=s3.bucket, Key="folder/ü a+b.jpg")["Body"].read() == b"one"
    assert storage.read_bytes(uri) == b"one"
    assert storage.stat(uri).bytes == 3
    filesystem, path = storage.arrow(uri)
    with filesystem.open_output_stream(path) as out:
        out.write(b"x" * 11_000_000)  # more than one part
    assert storage.stat(uri).bytes == 11_000_000
    assert [batch["bytes"].to_pylist() for batch in storage.list_objects(s3.uri("folder"))] == [[11_000_000]]
    assert s3_proxy.count("POST", "?uploads") == 1


def test_a_dropped_reply_leaves_the_object(s3: Any, s3_proxy: Any, store: S3Store) -> None:
    s3_proxy.drop_reply("PUT", "/a", skip=1)
    for body in (b"1", b"2", b"3"):
        if body == b"2":
            with pytest.raises(BaseError):
                obstore.put(store, "a", body)
        else:
            obstore.put(store, "a", body)
        assert s3.client.get_object(Bucket=s3.bucket, Key="a")["Body"].read() == body


def test_an_answer_by_rule(s3_proxy: Any, store: S3Store) -> None:
    rule = s3_proxy.answer(403, "ExpiredToken", "PUT", "/a", times=1)
    with pytest.raises(PermissionDeniedError, match="ExpiredToken"):
        obstore.put(store, "a", b"1")
    obstore.put(store, "a", b"1")
    assert rule.hits == 1
    s3_proxy.answer(403, "AccessDenied", "POST", "?uploads")
    with pytest.raises(PermissionDeniedError, match="AccessDenied"):
        obstore.put(store, "b", io.BytesIO(b"1" * 6_000_000), use_multipart=True)


def test_kinds_of_conditions(s3_proxy: Any, store: S3Store) -> None:
    def put(body: bytes, tag: str) -> str:
        return obstore.put(store, "a", body, mode={"e_tag": tag})["e_tag"] or ""

    quoted = obstore.put(store, "a", b"1", mode="create")["e_tag"] or ""
    assert quoted.startswith('"')
    quoted = put(b"2", quoted)

    s3_proxy.conditions = "ceph"
    with pytest.raises(AlreadyExistsError):
        obstore.put(store, "a", b"3", mode="create")
    for tag in (quoted, "0" * 32):
        with pytest.raises(PreconditionError):
            put(b"3", tag)
    quoted = put(b"3", quoted.strip('"'))

    s3_proxy.conditions = "no-if-match"
    with pytest.raises(AlreadyExistsError):
        obstore.put(store, "a", b"4", mode="create")
    put(b"4", "0" * 32)

    s3_proxy.conditions = "ignored"
    obstore.put(store, "a", b"5", mode="create")

    s3_proxy.conditions = "unimplemented"
    with pytest.raises(BaseError, match="501"):
        put(b"6", quoted)
