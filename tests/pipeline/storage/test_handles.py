"""Handles of the storage's clients: where their credentials come from, and that pickles hold none."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from masklake.model.errors import ConfigError
from masklake.pipeline.errors import AccessDeniedError
from masklake.pipeline.storage.options import StorageOptions
from masklake.pipeline.storage.storage import Storage


def test_no_credentials_at_all_is_access_denied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _forget_aws(monkeypatch, tmp_path)
    with pytest.raises(AccessDeniedError, match="AWS_ACCESS_KEY_ID"):
        Storage().read_bytes("s3://bucket/key")


def test_an_unknown_profile_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _forget_aws(monkeypatch, tmp_path)
    with pytest.raises(ConfigError, match="night-shift"):
        Storage(StorageOptions(profile="night-shift")).read_bytes("s3://bucket/key")


def _forget_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


@pytest.mark.slow
def test_a_profile_gives_credentials_and_region(s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _forget_aws(monkeypatch, tmp_path)
    (tmp_path / "config").write_text("[profile night-shift]\nregion = eu-central-1\n")
    (tmp_path / "credentials").write_text("[night-shift]\naws_access_key_id = pk\naws_secret_access_key = ps\n")
    storage = Storage(StorageOptions(profile="night-shift", endpoint_url=s3.endpoint))
    storage.write_bytes(s3.uri("a.jpg"), b"image")
    assert storage.read_bytes(s3.uri("a.jpg")) == b"image"
    assert storage.region(s3.bucket) == "eu-central-1"
    assert storage.delta_options(s3.uri())["AWS_ACCESS_KEY_ID"] == "pk"
    arrow, path = storage.arrow(s3.uri("a.jpg"))
    assert arrow.open_input_stream(path).read() == b"image"


@pytest.mark.slow
def test_pickles_without_credentials_and_works_again(s3: Any) -> None:
    storage = Storage()
    storage.write_bytes(s3.uri("a.jpg"), b"image")
    storage.arrow(s3.uri())
    pickled = pickle.dumps(storage)
    assert b"masklake-test" not in pickled
    assert "masklake-test" not in repr(storage) + repr(storage.options) + repr(storage.object_store(s3.uri())[0])
    assert pickle.loads(pickled).read_bytes(s3.uri("a.jpg")) == b"image"
