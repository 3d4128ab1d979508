"""Labelling from and to an S3 server: awkward keys, missing objects, and a kill in the middle."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.table import open_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

AWKWARD = ["a b.jpg", "a+b.jpg", "100%25 & more.jpg", "ünï/cödé 図.jpg", "x=1/y.jpg", "deep/" + "k" * 990 + ".jpg"]


def written_blocks(s3: Any) -> int:
    return len(s3.client.list_objects_v2(Bucket=s3.bucket, Prefix="table/run=").get("Contents", []))


def test_a_bucket_is_labelled_once_through_a_kill(
    s3: Any, tiny_checkpoint: Path, pictures: Callable[..., Path], start: Callable[..., Any]
) -> None:
    files = sorted(pictures(40).iterdir())
    keys = AWKWARD + [f"plain/{number}.jpg" for number in range(40 - len(AWKWARD))]
    uris = [s3.put(f"images/{key}", file.read_bytes()) for key, file in zip(keys, files, strict=True)]
    listing = "\n".join([*uris, s3.uri("images/gone.jpg"), s3.put("images/notes.txt", b"text")])
    source = s3.put("list.txt", listing.encode())
    weights = s3.put("models/tiny.safetensors", tiny_checkpoint.read_bytes())
    command = ("label", source, s3.uri("table"), "--weights", weights, "--json", "--max-failed", "0.04", "--workers", 1)

    first = start(*command)
    first.wait_until(lambda: written_blocks(s3) >= 1)
    code, _ = first.stop(signal.SIGKILL)
    assert code == -signal.SIGKILL

    second = start(*command)
    code, out, err = second.finish()
    assert code == 41, err  # 2 of 42 failed: more than 4 %, and the table is there all the same
    assert "1 decode_error, 1 missing" in err
    report = json.loads(out)
    assert report["resumed"]
    assert {status: count for status, count in report["statuses"].items() if count} == {
        "ok": 40,
        "decode_error": 1,
        "missing": 1,
    }
    rows = open_table(Storage(), s3.uri("table")).dataset().to_table(columns=["uri", "etag", "status"]).to_pylist()
    assert sorted(row["uri"] for row in rows) == sorted(listing.split("\n"))
    etag = s3.client.head_object(Bucket=s3.bucket, Key="images/a+b.jpg")["ETag"].strip('"')
    assert next(row["etag"] for row in rows if row["uri"].endswith("a+b.jpg")) == etag
