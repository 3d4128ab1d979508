"""Clients for storage, all built from one set of options: obstore, pyarrow, botocore and deltalake.

`docs/decisions/0003-storage-clients.md` says which client does what, and why. No public function returns or prints a credential
except `Handles.delta_options`, whose result is passed to `deltalake` and nowhere else.
"""

from __future__ import annotations

import os
import threading
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import botocore
import botocore.config
import botocore.exceptions
import botocore.session
import pyarrow.fs
from obstore.store import AzureStore, GCSStore, LocalStore, ObjectStore, S3Store

from masklake.model.errors import ConfigError
from masklake.pipeline.errors import AccessDeniedError
from masklake.pipeline.storage.errors import translate, translated
from masklake.pipeline.storage.literal_keys import LiteralObject, is_plain
from masklake.pipeline.storage.options import StorageOptions
from masklake.pipeline.storage.uri import Location, parse_uri

if TYPE_CHECKING:  # defined in obstore's stubs only
    from obstore.store import ClientConfig, RetryConfig

DEFAULT_REGION = "us-east-1"
CONCURRENT_HEADS = 64


class _BotocoreCredentials:
    """Credential provider for obstore on top of botocore's chain (variables, profiles, SSO, containers, instances), with
    refresh.
    """

    def __init__(self, credentials: Any) -> None:
        self._credentials = credentials

    def __call__(self) -> dict[str, Any]:
        frozen = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + timedelta(minutes=5),  # ask again: botocore refreshes what is about to expire
        }


class Handles:
    """Clients of each library, built from one set of options. They are cached, and built anew in a process that unpickles this
    object.
    """

    def __init__(self, options: StorageOptions | None = None) -> None:
        self.options = (options or StorageOptions()).resolved()
        self._stores: dict[tuple[str, str], ObjectStore] = {}
        self._filesystems: dict[tuple[str, str], pyarrow.fs.FileSystem] = {}
        self._regions: dict[str, str] = {}
        self._clients: dict[str, Any] = {}
        self._client_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.options!r})"

    def __reduce__(self) -> tuple[type[Handles], tuple[StorageOptions]]:
        return (type(self), (self.options,))

    def object_store(self, uri: str) -> tuple[ObjectStore, str]:
        """Returns an obstore store and the key of `uri` in it. There is one store per bucket, and one for all local files.

        Raises ConfigError for a key that obstore would change into another one; see `literal_object`.
        """
        at = parse_uri(uri)
        if at.key and not at.is_local and not is_plain(at.key.removesuffix("/")):
            raise ConfigError(f"{uri!r}: holds an empty or a dot segment or a control character; choose another key")
        where = (at.scheme, at.bucket)
        if where not in self._stores:
            with translated(uri):
                self._stores[where] = self._build_store(at)
        return self._stores[where], at.key.lstrip("/") if at.is_local else at.key

    def literal_object(self, uri: str) -> LiteralObject | None:
        """Returns the object of an S3 URI whose key obstore cannot address, or None if obstore can (and for other schemes)."""
        at = parse_uri(uri)
        if at.scheme != "s3" or not at.key or is_plain(at.key):
            return None
        with translated(uri):
            return LiteralObject(self._botocore_client(at.bucket), at.bucket, at.key)

    def arrow(self, uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
        """Returns a pyarrow file system and the path of `uri` in it (S3: bucket/key). It can be pickled, and then contains the
        credentials.
        """
        at = parse_uri(uri)
        where = (at.scheme, at.bucket)
        if where not in self._filesystems:
            with translated(uri):
                self._filesystems[where] = self._build_filesystem(at)
        return self._filesystems[where], at.key if at.is_local else f"{at.bucket}/{at.key}"

    def delta_options(self, uri: str | None = None) -> dict[str, str]:
        """Returns `storage_options` for deltalake. They CONTAIN CREDENTIALS: never print, log or store them."""
        if uri is not None and parse_uri(uri).scheme != "s3":
            return {}
        bucket = parse_uri(uri).bucket if uri is not None else ""
        options = {
            "AWS_REGION": self.region(bucket),
            "AWS_CONDITIONAL_PUT": "etag",
            "connect_timeout": f"{self.options.connect_timeout_s}s",
            "timeout": f"{self.options.request_timeout_s}s",
            "max_retries": str(self.options.max_retries),
        }
        if self.options.endpoint_url:
            options["AWS_ENDPOINT_URL"] = self.options.endpoint_url
            options["AWS_ALLOW_HTTP"] = str(self._plain_http).lower()
        if self.options.anonymous:
            return options | {"AWS_SKIP_SIGNATURE": "true"}
        secrets = self._botocore_credentials.get_frozen_credentials()
        options |= {"AWS_ACCESS_KEY_ID": secrets.access_key, "AWS_SECRET_ACCESS_KEY": secrets.secret_key}
        return options | ({"AWS_SESSION_TOKEN": secrets.token} if secrets.token else {})

    def region(self, bucket: str) -> str:
        """Returns the region for signing requests: the configured one, else the profile's, else the one that AWS reports.
        Custom endpoints rarely check it.
        """
        if self.options.region:
            return self.options.region
        if not self.options.anonymous:
            _ = self._botocore_credentials  # raises if there are none, before the network is asked for the bucket's region
        if bucket not in self._regions:
            self._regions[bucket] = self._session.get_config_variable("region") or self._discover_region(bucket)
        return self._regions[bucket]

    def _discover_region(self, bucket: str) -> str:
        if self.options.endpoint_url or not bucket:
            return DEFAULT_REGION
        try:
            return str(pyarrow.fs.resolve_s3_region(bucket))
        except OSError as error:
            raise translate(error, f"s3://{bucket}") from error

    @property
    def _plain_http(self) -> bool:
        return (self.options.endpoint_url or "").startswith("http://")

    @cached_property
    def _session(self) -> Any:
        session = botocore.session.Session(profile=self.options.profile)
        known = session.available_profiles
        if self.options.profile and self.options.profile not in known:
            raise ConfigError(f"no AWS profile {self.options.profile!r}; the config files have: {', '.join(known) or 'none'}")
        return session

    @cached_property
    def _botocore_credentials(self) -> Any:
        try:
            credentials = self._session.get_credentials()
        except botocore.exceptions.BotoCoreError as error:
            raise AccessDeniedError(f"the AWS credentials cannot be read: {error}") from error
        if credentials is None:
            raise AccessDeniedError(
                "no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
                "or run where a role gives them"
            )
        return credentials

    def _build_store(self, at: Location) -> ObjectStore:
        if at.is_local:
            return LocalStore("/")
        client: ClientConfig = {
            "connect_timeout": timedelta(seconds=self.options.connect_timeout_s),
            "timeout": timedelta(seconds=self.options.request_timeout_s),
        }
        retry: RetryConfig = {
            "max_retries": self.options.max_retries,
            "retry_timeout": timedelta(seconds=self.options.request_timeout_s),
            "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2), "base": 2},
        }
        if at.scheme == "gs":
            return GCSStore(at.bucket, client_options=client, retry_config=retry)
        if at.scheme == "az":
            return AzureStore(at.bucket, client_options=client, retry_config=retry)
        return self._build_s3_store(at, client, retry)

    def _build_s3_store(self, at: Location, client: ClientConfig, retry: RetryConfig) -> S3Store:
        config: dict[str, Any] = {"region": self.region(at.bucket), "virtual_hosted_style_request": False}
        if self.options.endpoint_url:
            config["endpoint"] = self.options.endpoint_url
        if certificate := os.environ.get("AWS_CA_BUNDLE"):
            client["root_certificate"] = Path(certificate).read_bytes()
        client["allow_http"] = self._plain_http
        if self.options.anonymous:
            config["skip_signature"] = True
        else:
            config["credential_provider"] = _BotocoreCredentials(self._botocore_credentials)
        return S3Store(at.bucket, client_options=client, retry_config=retry, **config)

    def _build_filesystem(self, at: Location) -> pyarrow.fs.FileSystem:
        if at.is_local:
            return pyarrow.fs.LocalFileSystem()
        if at.scheme == "gs":
            return pyarrow.fs.GcsFileSystem()
        if at.scheme == "az":
            return pyarrow.fs.AzureFileSystem(account_name=os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", ""))
        arguments: dict[str, Any] = {
            "region": self.region(at.bucket),
            "connect_timeout": self.options.connect_timeout_s,
            "request_timeout": self.options.request_timeout_s,
            "retry_strategy": pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=self.options.max_retries + 1),
        }
        if self.options.endpoint_url:
            endpoint = urlsplit(self.options.endpoint_url)
            arguments |= {"endpoint_override": endpoint.netloc + endpoint.path.rstrip("/"), "scheme": endpoint.scheme}
        if certificate := os.environ.get("AWS_CA_BUNDLE"):
            arguments["tls_ca_file_path"] = certificate
        return pyarrow.fs.S3FileSystem(**arguments, **self._arrow_credentials())

    def _arrow_credentials(self) -> dict[str, Any]:
        """Returns static keys; nothing if a role renews them: pyarrow then uses its own chain, since it outlives one key."""
        if self.options.anonymous:
            return {"anonymous": True}
        credentials = self._botocore_credentials
        if credentials.method in ("iam-role", "container-role", "assume-role-with-web-identity") and not self.options.profile:
            return {}
        frozen = credentials.get_frozen_credentials()
        return {"access_key": frozen.access_key, "secret_key": frozen.secret_key, "session_token": frozen.token}

    def _botocore_client(self, bucket: str) -> Any:
        """Returns the client of a bucket. Creating one takes a tenth of a second, and threads may share it."""
        with self._client_lock:
            if bucket not in self._clients:
                self._clients[bucket] = self._build_botocore_client(bucket)
            return self._clients[bucket]

    def _build_botocore_client(self, bucket: str) -> Any:
        config: dict[str, Any] = {
            "connect_timeout": self.options.connect_timeout_s,
            "read_timeout": self.options.request_timeout_s,
            "retries": {"mode": "standard", "total_max_attempts": self.options.max_retries + 1},
            "max_pool_connections": CONCURRENT_HEADS,
            "request_checksum_calculation": "when_required",  # other stores than AWS's refuse the newer checksums
        }
        if self.options.endpoint_url:
            config["s3"] = {"addressing_style": "path"}
        if self.options.anonymous:
            config["signature_version"] = botocore.UNSIGNED
        else:
            _ = self._botocore_credentials  # raises if there are none, before a request fails
        return self._session.create_client(
            "s3",
            region_name=self.region(bucket),
            endpoint_url=self.options.endpoint_url,
            config=botocore.config.Config(**config),
        )
