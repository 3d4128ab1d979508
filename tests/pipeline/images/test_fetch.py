"""Fetching: every object comes back with its bytes and version, or with a status and a reason."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from masklake.pipeline.images.fetch import Fetched, fetch, fetch_patiently
from masklake.pipeline.images.status import Status
from masklake.pipeline.storage.objects import local_etag
from masklake.pipeline.storage.options import StorageOptions
from masklake.pipeline.storage.storage import Storage

LIMIT = 1000


def get(uris: list[str], storage: Storage | None = None) -> list[Fetched]:
    return fetch(storage or Storage(), uris, max_bytes=LIMIT)


def test_local_files_come_in_the_order_asked(tmp_path: Path) -> None:
    names = [f"{number} ä+%25.jpg" for number in range(100)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    found = get([str(tmp_path / name) for name in names])
    assert [one.data for one in found] == [name.encode() for name in names]
    assert found[0].etag == local_etag(os.stat(tmp_path / names[0]))
    assert found[0].bytes == len(names[0].encode())


def test_what_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    good, large, pipe = tmp_path / "good", tmp_path / "large", tmp_path / "pipe"
    good.write_bytes(b"x" * LIMIT)
    large.write_bytes(b"x" * (LIMIT + 1))
    os.mkfifo(pipe)
    found = get([str(path) for path in (good, tmp_path / "absent", large, tmp_path, pipe)] + ["ftp://host/x", "s3:///nothing"])
    assert [one.status for one in found] == [
        Status.OK,
        Status.MISSING,
        Status.TOO_LARGE,
        Status.FETCH_ERROR,
        Status.FETCH_ERROR,
        Status.FETCH_ERROR,
        Status.FETCH_ERROR,
    ]
    assert all(one.error for one in found[1:])
    assert all(one.data is None for one in found[1:])
    assert (found[2].bytes, found[2].etag) == (LIMIT + 1, local_etag(os.stat(large)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_a_fetch_error(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    secret.chmod(0)
    assert get([str(secret)])[0].status is Status.FETCH_ERROR


def test_only_what_may_pass_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, gone = Fetched(Status.FETCH_ERROR, error="503", may_pass=True), Fetched(Status.MISSING, error="not found")
    good = Fetched(Status.OK, b"x")
    answers = iter([[busy, gone, busy], [busy, good], [good]])
    asked: list[list[str]] = []
    waited: list[float] = []

    def answered(_: Any, uris: list[str], **__: Any) -> list[Fetched]:
        asked.append(uris)
        return next(answers)

    monkeypatch.setattr("masklake.pipeline.images.fetch.fetch", answered)
    monkeypatch.setattr("time.sleep", waited.append)
    assert fetch_patiently(Storage(), ["a", "b", "c"], max_bytes=LIMIT) == [good, gone, good]
    assert asked == [["a", "b", "c"], ["a", "c"], ["a"]]
    assert waited == [1.0, 2.0]
    monkeypatch.setattr("masklake.pipeline.images.fetch.fetch", lambda *_, **__: [busy])
    assert fetch_patiently(Storage(), ["a"], max_bytes=LIMIT) == [busy]


def test_nothing_to_fetch() -> None:
    assert get([]) == []


@pytest.mark.slow
def test_s3_objects_with_awkward_keys(s3: Any) -> None:
    keys = ["a b.jpg", "a+b.jpg", "100%25.jpg", "ünï/cödé 図.jpg", "x/" + "k" * 998]
    uris = [s3.put(key, key.encode()) for key in keys]
    found = get([*uris, s3.uri("absent"), "s3://no-such-bucket-here/x", s3.put("large", b"x" * (LIMIT + 1))])
    assert [one.data for one in found[:5]] == [key.encode() for key in keys]
    assert found[0].etag == s3.client.head_object(Bucket=s3.bucket, Key=keys[0])["ETag"].strip('"')
    assert [one.status for one in found[5:]] == [Status.MISSING, Status.MISSING, Status.TOO_LARGE]


@pytest.mark.slow
def test_an_endpoint_that_does_not_answer_is_a_fetch_error(s3: Any) -> None:
    nowhere = Storage(
        StorageOptions(endpoint_url="http://127.0.0.1:9", connect_timeout_s=0.5, request_timeout_s=2, max_retries=1)
    )
    started = time.perf_counter()
    found = get(["s3://bucket/a", "s3://bucket/b"], nowhere)
    assert [one.status for one in found] == [Status.FETCH_ERROR] * 2
    assert "s3://bucket/a" in (found[0].error or "")
    assert found[0].may_pass
    assert time.perf_counter() - started < 30
