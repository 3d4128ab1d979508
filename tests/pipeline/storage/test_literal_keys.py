"""Keys that obstore cannot name: what is read is the object of exactly that key, never a neighbour."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from masklake.model.errors import ConfigError
from masklake.pipeline.coco.dataset import image_folder
from masklake.pipeline.coco.image_check import usable_images
from masklake.pipeline.coco.reading import parse_coco
from masklake.pipeline.errors import AccessDeniedError, AnnotationError, InputNotFoundError
from masklake.pipeline.images.fetch import fetch
from masklake.pipeline.images.status import Status
from masklake.pipeline.storage.literal_keys import LiteralObject, is_plain
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import below, canonical, parent, relative_to
from masklake.pipeline.table.table import open_table

LITERAL = [
    "/x.jpg",
    "//x.jpg",
    "a//b.jpg",
    "a/./b.jpg",
    "a/../b.jpg",
    "../b.jpg",
    "tab\t.jpg",
    "cr\r.jpg",
    "nul\0.jpg",
    "del\x7f",
    "d/",
]
PLAIN = [
    "x.jpg",
    "a/b.jpg",
    "b.jpg",
    "%2Fx.jpg",
    "a%2F%2Fb.jpg",
    "...",
    "a/.b",
    " ",
    "c1\x85",
    "\u00e9",
    "e\u0301",
    "a\\b",
    "d",
]


def test_which_keys_are_literal() -> None:
    assert not any(is_plain(key) for key in [*LITERAL, "new\nline.jpg"])
    assert all(is_plain(key) for key in PLAIN)


@pytest.mark.slow
def test_each_object_is_read_by_its_own_key(s3: Any) -> None:
    """Every call that takes a URI; beside each key its plain neighbour, which must not be touched."""
    keys = LITERAL + PLAIN
    for key in keys:
        s3.put(key, repr(key).encode())
    storage = Storage()
    uris = [f"s3://{s3.bucket}/{key}" for key in keys]
    assert [found.data for found in fetch(storage, uris, max_bytes=100)] == [repr(key).encode() for key in keys]
    tags = {item["Key"]: item["ETag"].strip('"') for item in s3.client.list_objects_v2(Bucket=s3.bucket)["Contents"]}
    assert [row["etag"] for row in storage.stat_many(uris).to_pylist()] == [tags[key] for key in keys]
    for key, uri in zip(keys, uris, strict=True):
        assert storage.read_bytes(uri) == repr(key).encode()
        assert storage.exists(uri) == (not key.endswith("/")), "a key that ends in a slash marks a folder"
        assert storage.is_file(uri) == (not key.endswith("/"))


@pytest.mark.slow
def test_each_object_is_written_and_removed_by_its_own_key(s3: Any, tmp_path: Path) -> None:
    storage = Storage()
    s3.put("x.jpg", b"neighbour")
    (tmp_path / "file").write_bytes(b"uploaded")
    storage.write_bytes(f"s3://{s3.bucket}//x.jpg", b"written")
    assert s3.client.get_object(Bucket=s3.bucket, Key="/x.jpg")["Body"].read() == b"written"
    storage.upload(tmp_path / "file", f"s3://{s3.bucket}//x.jpg")
    assert s3.client.get_object(Bucket=s3.bucket, Key="/x.jpg")["Body"].read() == b"uploaded"
    storage.delete(f"s3://{s3.bucket}//x.jpg")
    assert [item["Key"] for item in s3.client.list_objects_v2(Bucket=s3.bucket)["Contents"]] == ["x.jpg"]


@pytest.mark.slow
def test_images_are_those_of_the_folder_that_was_named(s3: Any) -> None:
    """`s3://b//` and `s3://b/a//` are folders of their own; in the one without the slash lies something else."""
    document = {"images": [{"id": 1, "file_name": "x.png", "width": 3, "height": 2}], "annotations": [], "categories": []}
    document["categories"] = [{"id": 1, "name": "cat"}]
    content = io.BytesIO()
    Image.new("RGB", (3, 2)).save(content, "PNG")
    for folder in ("/", "a//"):
        s3.put(f"{folder}x.png", content.getvalue())
        place = image_folder(f"s3://{s3.bucket}/{folder}", "coco.json")
        assert len(usable_images(Storage(), parse_coco(document, "coco.json"), place).images) == 1
        with pytest.raises(AnnotationError, match=r"the only image of coco\.json is not in"):
            usable_images(Storage(), parse_coco(document, "coco.json"), place[:-1])


@pytest.mark.slow
def test_a_literal_fetch_has_the_statuses_of_any_other(s3: Any) -> None:
    s3.put("/large.jpg", b"x" * 11)
    large, absent = fetch(Storage(), [f"s3://{s3.bucket}//large.jpg", f"s3://{s3.bucket}//absent.jpg"], max_bytes=10)
    assert (large.status, large.data, large.bytes) == (Status.TOO_LARGE, None, 11)
    assert large.etag
    assert absent.status is Status.MISSING
    with pytest.raises(InputNotFoundError, match="absent"):
        Storage().stat(f"s3://{s3.bucket}//absent.jpg")


class _Body:
    """A body that nobody may read."""

    closed = False

    def read(self) -> bytes:
        raise AssertionError("the body of an object that is too large was read")

    def close(self) -> None:
        self.closed = True


class _Client:
    """Answers as botocore does, or refuses a HEAD as a policy does."""

    def __init__(self) -> None:
        self.body = _Body()

    def get_object(self, **request: str) -> dict[str, Any]:
        return {"ETag": '"tag"', "ContentLength": 11, "Body": self.body}

    def head_object(self, **request: str) -> None:
        import botocore.exceptions

        raise botocore.exceptions.ClientError({"Error": {"Code": "403", "Message": "Forbidden"}}, "HeadObject")


def test_a_body_that_is_too_large_is_left_unread() -> None:
    client = _Client()
    answer = LiteralObject(client, "b", "/k").get(max_bytes=10)
    assert (answer.etag, answer.size, answer.data) == ('"tag"', 11, None)
    assert client.body.closed


def test_a_refused_head_is_access_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Storage, "_botocore_client", lambda self, bucket: _Client())
    with pytest.raises(AccessDeniedError, match="s3://b//k: access denied"):
        Storage().stat("s3://b//k")


def test_what_obstore_would_take_for_another_key_never_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in ("s3://b//x", "s3://b/a//x", "gs://b/a/../x"):
        with pytest.raises(ConfigError, match="another key"):
            Storage().object_store(uri)
    with pytest.raises(ConfigError, match="no table can be"):
        open_table(Storage(), "s3://b/a//labels")
    with pytest.raises(ConfigError, match="no table can be"):
        open_table(Storage(), "s3://b/labels//")
    for uri in ("gs://b/a//", "gs://b//"):
        with pytest.raises(ConfigError, match="another key"):
            next(Storage().list_objects(uri))


def test_names_of_folders_and_their_content_keep_every_slash() -> None:
    assert [canonical(f"s3://b{rest}") for rest in ("", "/", "/a", "/a/", "/a//", "//")] == [
        "s3://b", "s3://b", "s3://b/a", "s3://b/a", "s3://b/a//", "s3://b//",
    ]  # fmt: skip
    assert [below(f"s3://b{rest}") for rest in ("", "/", "/a", "/a/", "/a//")] == [
        "s3://b/", "s3://b/", "s3://b/a/", "s3://b/a/", "s3://b/a//",
    ]  # fmt: skip
    for folder, name in (("s3://b", "x"), ("s3://b/a", "x"), ("s3://b//", "x"), ("s3://b/a//", "x")):
        uri = relative_to(folder, name)
        assert parent(uri) == folder
        assert uri == (folder if folder.endswith("/") else folder + "/") + name
    assert Storage.join(parent("s3://b//coco.json"), "images") == "s3://b//images"
    for given in ("s3://b//", "s3://b/a//", "s3://b/a/", "s3://b/a", "s3://b"):
        assert relative_to(image_folder(given, "s3://c/coco.json"), "x.jpg") == f"{below(given)}x.jpg"
    assert relative_to("s3://b/lists", ".//../img/./a//b.jpg/") == "s3://b/img/./a//b.jpg/"
    assert relative_to("s3://b", "../../x") == "s3://b/x"


def test_local_names_are_literal_too(tmp_path: Path) -> None:
    for name in (
        "new\nline.jpg",
        "-rf.jpg",
        "tab\t.jpg",
        "a:b.jpg",
        "per%20cent.jpg",
        "back\\slash.jpg",
        "#.jpg",
        "ü.jpg",
        "ü.jpg",
    ):
        path = tmp_path / name
        path.write_bytes(json.dumps(name).encode())
        for uri in (str(path), path.as_uri(), f"/{path}"):
            assert Storage().read_bytes(uri) == json.dumps(name).encode()
        assert fetch(Storage(), [str(path)], max_bytes=100)[0].data == json.dumps(name).encode()
