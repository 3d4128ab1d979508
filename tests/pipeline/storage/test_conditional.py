"""Conditional puts: a lost reply is no refusal, and a store is trusted only after both conditions were tested on it."""

from __future__ import annotations

from typing import Any

import pytest

from masklake.pipeline.errors import AccessDeniedError, StorageError
from masklake.pipeline.storage.conditional import ConditionalObject, RefusedError, bare_tags
from masklake.pipeline.storage.storage import Storage

pytestmark = pytest.mark.slow


@pytest.fixture
def ours(s3: Any, s3_proxy: Any) -> ConditionalObject:
    """An object behind the proxy, by the writer whose token is `ours`."""
    return ConditionalObject(Storage(), s3.uri("object"), "ours", bare_tags=False)


def body(s3: Any) -> bytes:
    """The object as another client sees it."""
    return bytes(s3.client.get_object(Bucket=s3.bucket, Key="object")["Body"].read())


@pytest.mark.parametrize("status", [None, 502])
def test_a_put_whose_reply_is_lost_is_done(s3: Any, s3_proxy: Any, ours: ConditionalObject, status: int | None) -> None:
    s3_proxy.drop_reply("PUT", "/object", status=status)
    version = ours.create(b"ours 1")
    s3_proxy.drop_reply("PUT", "/object", status=status)
    version = ours.replace(b"ours 2", version)
    assert body(s3) == b"ours 2"
    ours.replace(b"ours 3", version)
    assert body(s3) == b"ours 3"


def test_a_put_that_never_arrived_is_made_again(s3: Any, s3_proxy: Any, ours: ConditionalObject) -> None:
    s3_proxy.answer(None, "", "PUT", "/object", times=2)
    version = ours.create(b"ours 1")
    s3_proxy.answer(None, "", "PUT", "/object", times=1)
    ours.replace(b"ours 2", version)
    assert body(s3) == b"ours 2"


def test_an_earlier_put_of_ours_is_no_other_writer(s3: Any, ours: ConditionalObject) -> None:
    """Its reply was lost and nothing could be asked, so we only know the version before it."""
    version = ours.create(b"ours 1")
    ours.replace(b"ours 2", version)
    ours.replace(b"ours 3", version)
    assert body(s3) == b"ours 3"


def test_another_writer_is_told_from_a_lost_reply(s3: Any, s3_proxy: Any, ours: ConditionalObject) -> None:
    s3.put("object", b"theirs")
    with pytest.raises(RefusedError) as refused:
        ours.create(b"ours 1")
    assert refused.value.found is not None
    assert refused.value.found.content == b"theirs"
    version = refused.value.found.version
    s3.put("object", b"theirs again")
    s3_proxy.drop_reply("PUT", "/object")  # the reply that is lost is a refusal
    with pytest.raises(RefusedError):
        ours.replace(b"ours 2", version)
    assert body(s3) == b"theirs again"
    s3.client.delete_object(Bucket=s3.bucket, Key="object")
    with pytest.raises(RefusedError) as gone:
        ours.replace(b"ours 3", version)
    assert gone.value.found is None


def probes(s3: Any) -> list[str]:
    return [item["Key"] for item in s3.client.list_objects_v2(Bucket=s3.bucket).get("Contents", [])]


@pytest.mark.parametrize(("conditions", "bare"), [("kept", False), ("ceph", True)])
def test_both_conditions_are_proven_once(s3: Any, s3_proxy: Any, conditions: str, bare: bool) -> None:
    s3_proxy.conditions = conditions
    assert bare_tags(Storage(), s3.uri("table/_masklake")) is bare
    asked = len(s3_proxy.requests)
    assert bare_tags(Storage(), s3.uri("table/_masklake")) is bare
    assert len(s3_proxy.requests) == asked
    assert probes(s3) == []


@pytest.mark.parametrize("lost", range(4))
def test_a_lost_reply_proves_nothing_false(s3: Any, s3_proxy: Any, lost: int) -> None:
    s3_proxy.conditions = "ceph" if lost % 2 else "kept"
    rule = s3_proxy.drop_reply("PUT", "/probe-", skip=lost)
    assert bare_tags(Storage(), s3.uri("table/_masklake")) is bool(lost % 2)
    assert rule.hits == 1


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ("ignored", "overwrites what a put was only to create .it ignores If-None-Match"),
        ("no-if-match", "overwrites an object under an entity tag that it no longer has .it ignores If-Match"),
        ("unimplemented", "does not implement conditional puts .501 Not Implemented NotImplemented"),
    ],
)
def test_what_a_store_lacks_is_said_in_one_line(s3: Any, s3_proxy: Any, conditions: str, said: str) -> None:
    s3_proxy.conditions = conditions
    with pytest.raises(StorageError, match=f"this store {said}") as lacks:
        bare_tags(Storage(), s3.uri("table/_masklake"))
    assert "\n" not in str(lacks.value)
    assert "tried" in str(lacks.value)
    assert probes(s3) == []


def test_a_store_that_refuses_its_own_tags(s3: Any, s3_proxy: Any) -> None:
    s3_proxy.answer(412, "PreconditionFailed", "PUT", "/probe-", skip=2)
    with pytest.raises(StorageError, match="refuses a put under the object's own entity tag, with its quotes and without"):
        bare_tags(Storage(), s3.uri("table/_masklake"))


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (400, "ExpiredToken")])
def test_a_refusal_is_no_missing_condition(s3: Any, s3_proxy: Any, status: int, code: str) -> None:
    s3_proxy.answer(status, code, "PUT", "/probe-")
    with pytest.raises(AccessDeniedError, match=code):
        bare_tags(Storage(), s3.uri("table/_masklake"))
