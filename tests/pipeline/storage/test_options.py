"""The options of the storage: the endpoint, from arguments and the environment."""

from __future__ import annotations

import pytest

from masklake.model.errors import ConfigError
from masklake.pipeline.storage.options import StorageOptions
from masklake.pipeline.storage.storage import Storage


def test_the_environment_names_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://general:1")
    assert Storage().options.endpoint_url == "http://general:1"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://special:1")
    assert Storage().options.endpoint_url == "http://special:1"
    assert Storage(StorageOptions(endpoint_url="http://named:1")).options.endpoint_url == "http://named:1"


@pytest.mark.parametrize("endpoint", ["not-a-url", "localhost:9000", "ftp://host", "http://", "http:// host"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client in Rust would panic over it."""
    with pytest.raises(ConfigError, match="is not a URL"):
        Storage(StorageOptions(endpoint_url=endpoint))
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(ConfigError, match="is not a URL"):
        Storage()


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9000", "https://minio.example/path", "http://[::1]:9000"])
def test_an_endpoint_is_a_url(endpoint: str) -> None:
    assert Storage(StorageOptions(endpoint_url=endpoint)).options.endpoint_url == endpoint
