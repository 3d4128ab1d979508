"""URIs: one spelling for each place, and an error for those that name none."""

from __future__ import annotations

from pathlib import Path

import pytest

from masklake.model.errors import ConfigError
from masklake.pipeline.storage.uri import canonical, parent, parse_uri, relative_to


def test_uris_have_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a b%"
    assert canonical("a b%") == str(folder) == canonical(folder.as_uri()) == canonical(f"{tmp_path}/x/../a b%/")
    assert canonical("s3a://bucket/a%20b/") == "s3://bucket/a%20b"
    assert parse_uri("s3://bucket/a//b").key == "a//b"
    assert parent("s3://bucket/a/b") == "s3://bucket/a"
    assert relative_to("s3://bucket/lists", "img/a.jpg") == "s3://bucket/lists/img/a.jpg"
    assert relative_to(str(tmp_path), "img/a.jpg") == f"{tmp_path}/img/a.jpg"
    assert relative_to("s3://bucket/lists", "/data/a.jpg") == "/data/a.jpg"


@pytest.mark.parametrize("uri", ["ftp://host/x", "s3://", "file://elsewhere/x"])
def test_uris_that_name_nothing_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=uri.partition("://")[0]):
        parse_uri(uri)
