"""Every handle on storage, built from one set of options (design: one module builds every handle).

A URI is a local path (`/data/x`, `photos`, `file:///data/x`) or `scheme://bucket/key`; `s3://` is tested, `gs://` and `az://`
come through the same libraries. Keys are literal: `s3://b/100%25.jpg` names the object `100%25.jpg`, `s3://b//a` is `/a` in b.
Only `file://` URIs are percent-encoded, as their standard says. The canonical form of a local URI is its absolute path.

Which client does what, and why: `docs/decisions/0003-storage-clients.md`. No function here returns or prints a credential
except `Storage.delta_options`, whose result goes to `deltalake` and nowhere else.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes, urlsplit

import botocore
import botocore.config
import botocore.exceptions
import botocore.session
import obstore
import pyarrow as pa
import pyarrow.fs
from obstore.store import AzureStore, GCSStore, LocalStore, ObjectStore, S3Store
from pydantic import BaseModel, ConfigDict, Field

from masklake.model.errors import ConfigError, MaskLakeError
from masklake.pipeline.errors import AccessDeniedError, InputNotFoundError
from masklake.pipeline.storage import local_files
from masklake.pipeline.storage.errors import FOREIGN, is_vague, translate, translated
from masklake.pipeline.storage.left_out import LeftOut, Reason
from masklake.pipeline.storage.literal_keys import LiteralObject, is_plain
from masklake.pipeline.storage.walk import walk

if TYPE_CHECKING:  # they exist in its stubs alone
    from obstore.store import ClientConfig, RetryConfig

logger = logging.getLogger(__name__)

OBJECT_SCHEMA = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("bytes", pa.int64())])
"""One row an object. etag: the store's, without quotes; local files: size and mtime_ns."""

REPLACEMENT = "\ufffd"
DEFAULT_REGION = "us-east-1"
LISTING_BATCH = 10_000  # rows a batch of a listing: 1-2 MB of Arrow
CONCURRENT_HEADS = 64


class StorageOptions(BaseModel):
    """Where storage is and who asks. Credentials are no part of it: they come from the environment or a profile."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint_url: str | None = Field(
        default=None, description="S3 endpoint (MinIO, Ceph, R2); default: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS itself."
    )
    region: str | None = Field(
        default=None, description="Default: AWS_REGION, AWS_DEFAULT_REGION, the profile's, the bucket's."
    )
    profile: str | None = Field(default=None, description="A profile of the AWS config files; default: AWS_PROFILE.")
    anonymous: bool = Field(default=False, description="Send unsigned requests, for public buckets.")
    connect_timeout_s: float = Field(default=3.0, gt=0, description="Seconds to open one connection.")
    request_timeout_s: float = Field(default=60.0, gt=0, description="Seconds for one whole request.")
    max_retries: int = Field(default=3, ge=0, description="Retries of one request after a connection error or a 5xx answer.")

    def resolved(self) -> StorageOptions:
        """These options with the environment's answers filled in, so that a worker elsewhere reaches the same storage."""
        env = os.environ.get
        endpoint = self.endpoint_url or env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL") or None
        if endpoint is not None and not re.fullmatch(r"https?://(\[[0-9a-fA-F:.]+\]|[^/\s:]+)(:\d+)?(/\S*)?", endpoint):
            raise ConfigError(f"the endpoint {endpoint!r} is no URL; write http://HOST:PORT or https://HOST")
        return self.model_copy(
            update={
                "endpoint_url": endpoint,
                "region": self.region or env("AWS_REGION") or env("AWS_DEFAULT_REGION") or None,
                "profile": self.profile or env("AWS_PROFILE") or None,
            }
        )


@dataclass(frozen=True)
class Location:
    """A parsed URI. scheme: "file", "s3", "gs" or "az". bucket: "" for local files. key: for local files the absolute path."""

    scheme: str
    bucket: str
    key: str

    @property
    def is_local(self) -> bool:
        """Whether the operating system's own calls reach it."""
        return self.scheme == "file"

    @property
    def uri(self) -> str:
        """The canonical URI: one spelling for one object, as it stands in the table."""
        if self.is_local:
            return self.key
        return f"{self.scheme}://{self.bucket}/{self.key}" if self.key else f"{self.scheme}://{self.bucket}"


@dataclass(frozen=True)
class ObjectStat:
    """What a listing says about one object."""

    etag: str | None
    bytes: int


_SCHEMES = {"s3": "s3", "s3a": "s3", "s3n": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "file": "file"}


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def parse(uri: str | os.PathLike[str]) -> Location:
    """Split a URI; ConfigError for a scheme that no client here speaks, or a missing bucket."""
    text = os.fspath(uri)
    if not text:
        raise ConfigError("an empty path names nothing; give a local path, s3://, gs:// or az://")
    found = _SCHEME.match(text)
    if found is None:
        return Location("file", "", _absolute(text))
    scheme, rest = found.group(1).lower(), text[found.end() :]
    if scheme not in _SCHEMES:
        raise ConfigError(f"{text}: no storage client for {scheme}://; give a local path, s3://, gs:// or az://")
    if scheme == "file":
        return Location("file", "", _file_uri_path(text))
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise ConfigError(f"{text}: names no bucket; write {scheme}://BUCKET/KEY")
    return Location(_SCHEMES[scheme], bucket, key)


def _absolute(path: str) -> str:
    """`os.path.abspath`, but two slashes at the front, which POSIX leaves open, are one."""
    return re.sub("^//+", "/", os.path.abspath(path))


def _file_uri_path(uri: str) -> str:
    host, _, path = uri[len("file://") :].partition("/")
    if host not in ("", "localhost"):
        raise ConfigError(f"{uri}: file URIs name this machine only; write file:///{host}/{path} or a plain path")
    return _absolute("/" + os.fsdecode(unquote_to_bytes(os.fsencode(path))))


def canonical(uri: str | os.PathLike[str]) -> str:
    """The one spelling of a place: an absolute path for local files, `scheme://bucket/key` without a last slash elsewhere.

    Keys are literal: `s3://b/a/` is `s3://b/a`, but `s3://b/a//` stays as it is. A folder's keys begin with `below`.
    """
    at = parse(uri)
    return at.uri[:-1] if not at.is_local and re.search("[^/]/$", at.key) else at.uri


def real_place(uri: str) -> str:
    """The canonical name with the symbolic links of this machine's paths followed."""
    at = parse(uri)
    return os.path.realpath(at.key) if at.is_local else canonical(uri)


def local_etag(stat: os.stat_result) -> str:
    """The version of a local file: size and modification time in nanoseconds."""
    return f"{stat.st_size}-{stat.st_mtime_ns}"


class _BotocoreCredentials:
    """obstore's credential provider over botocore's chain: variables, profiles, SSO, containers, instances; refreshed."""

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


class Storage:
    """Handles for every library, from one set of options; cached, and rebuilt in the process that unpickles it."""

    def __init__(self, options: StorageOptions | None = None) -> None:
        self.options = (options or StorageOptions()).resolved()
        self._stores: dict[tuple[str, str], ObjectStore] = {}
        self._filesystems: dict[tuple[str, str], pyarrow.fs.FileSystem] = {}
        self._regions: dict[str, str] = {}
        self._clients: dict[str, Any] = {}
        self._client_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Storage({self.options!r})"

    def __reduce__(self) -> tuple[type[Storage], tuple[StorageOptions]]:
        return (Storage, (self.options,))

    # -- handles -------------------------------------------------------------------------------------------------------

    def object_store(self, uri: str) -> tuple[ObjectStore, str]:
        """An obstore store and the key of `uri` in it: one store a bucket, one for all local files.

        ConfigError for a key that obstore would take for another one; see `literal_object`.
        """
        at = parse(uri)
        if at.key and not at.is_local and not is_plain(at.key.removesuffix("/")):
            raise ConfigError(f"{uri!r}: holds an empty or a dot segment or a control character; choose another key")
        where = (at.scheme, at.bucket)
        if where not in self._stores:
            with translated(uri):
                self._stores[where] = self._build_store(at)
        return self._stores[where], at.key.lstrip("/") if at.is_local else at.key

    def literal_object(self, uri: str) -> LiteralObject | None:
        """The object of an S3 URI whose key obstore cannot name; None where obstore can, and for other schemes."""
        at = parse(uri)
        if at.scheme != "s3" or not at.key or is_plain(at.key):
            return None
        with translated(uri):
            return LiteralObject(self._botocore_client(at.bucket), at.bucket, at.key)

    def arrow(self, uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
        """A pyarrow file system and the path of `uri` in it (S3: bucket/key). It pickles, credentials included."""
        at = parse(uri)
        where = (at.scheme, at.bucket)
        if where not in self._filesystems:
            with translated(uri):
                self._filesystems[where] = self._build_filesystem(at)
        return self._filesystems[where], at.key if at.is_local else f"{at.bucket}/{at.key}"

    def fsspec(self, uri: str) -> tuple[Any, str]:
        """An fsspec file system and the path of `uri` in it; for libraries that take nothing else."""
        at = parse(uri)
        import fsspec

        if at.is_local:
            return fsspec.filesystem("file", auto_mkdir=True), at.key
        try:
            filesystem = fsspec.filesystem(at.scheme, **self._fsspec_arguments(at))
        except ImportError as error:
            raise ConfigError(f"{uri}: fsspec needs a package for {at.scheme}:// that is not installed ({error})") from error
        return filesystem, f"{at.bucket}/{at.key}"

    def delta_options(self, uri: str | None = None) -> dict[str, str]:
        """`storage_options` for deltalake. It HOLDS CREDENTIALS: pass it on, never print, log or store it."""
        if uri is not None and parse(uri).scheme != "s3":
            return {}
        bucket = parse(uri).bucket if uri is not None else ""
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
        """The region to sign for: named, else the profile's, else asked of AWS; a custom endpoint seldom minds."""
        if self.options.region:
            return self.options.region
        if not self.options.anonymous:
            _ = self._botocore_credentials  # without any, say so instead of asking the network for the bucket's region
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
        """Explicit keys where they are static; pyarrow's own chain where a role renews them, for it outlives one key."""
        if self.options.anonymous:
            return {"anonymous": True}
        credentials = self._botocore_credentials
        if credentials.method in ("iam-role", "container-role", "assume-role-with-web-identity") and not self.options.profile:
            return {}
        frozen = credentials.get_frozen_credentials()
        return {"access_key": frozen.access_key, "secret_key": frozen.secret_key, "session_token": frozen.token}

    def _fsspec_arguments(self, at: Location) -> dict[str, Any]:
        if at.scheme != "s3":
            return {}
        retries = {"max_attempts": self.options.max_retries}
        config: dict[str, Any] = {"connect_timeout": self.options.connect_timeout_s, "retries": retries}
        if self.options.endpoint_url:
            config["s3"] = {"addressing_style": "path"}
        return {
            "anon": self.options.anonymous,
            "profile": self.options.profile,
            "endpoint_url": self.options.endpoint_url,
            "client_kwargs": {"region_name": self.region(at.bucket)},
            "config_kwargs": config,
            "use_listings_cache": False,  # a job must see what another process wrote a second ago
            "skip_instance_cache": True,  # the cache's key knows nothing of the credentials in the environment
        }

    @contextmanager
    def reading(self, uri: str, asked: str | None = None) -> Iterator[None]:
        """`translated`; a store that refused without its reason is asked for it by a GET of one byte, of ``asked`` or `uri`."""
        with translated(uri):
            try:
                yield
            except FOREIGN as error:
                if parse(uri).scheme == "s3" and is_vague(error):
                    self._raise_reason(asked or uri)
                raise

    def _raise_reason(self, uri: str) -> None:
        try:
            if (literal := self.literal_object(uri)) is not None:
                literal.get(max_bytes=0)
                return
            store, key = self.object_store(uri)
            obstore.get_range(store, key or "masklake", start=0, length=1)
        except FileNotFoundError:
            return
        except FOREIGN as error:
            if not is_vague(error):
                raise

    # -- whole objects -------------------------------------------------------------------------------------------------

    def read_bytes(self, uri: str) -> bytes:
        """The object's bytes; InputNotFoundError, AccessDeniedError or StorageError."""
        at = parse(uri)
        with translated(uri):
            if at.is_local:
                return Path(at.key).read_bytes()
            if (literal := self.literal_object(uri)) is not None:
                return literal.get().data or b""
            store, key = self.object_store(uri)
            return bytes(obstore.get(store, key).bytes())

    def write_bytes(self, uri: str, data: bytes) -> None:
        """Write an object so that a reader sees the old or the new bytes, never a part; parents are made."""
        at = parse(uri)
        with translated(uri):
            if at.is_local:
                local_files.write(Path(at.key), data)
                return
            if (literal := self.literal_object(uri)) is not None:
                literal.put(data)
                return
            store, key = self.object_store(uri)
            obstore.put(store, key, data)

    def upload(self, path: Path, uri: str) -> None:
        """Copy a local file to `uri`, in parts where it is large; a reader sees all of it or nothing."""
        at = parse(uri)
        with translated(uri):
            if at.is_local:
                local_files.copy(path, Path(at.key))
                return
            if (literal := self.literal_object(uri)) is not None:
                with path.open("rb") as file:
                    literal.put(file)
                return
            store, key = self.object_store(uri)
            obstore.put(store, key, path)

    def sync(self, uris: Iterable[str]) -> None:
        """Have what another program wrote on the disk; object stores have it as soon as they answer."""
        for uri in uris:
            if parse(uri).is_local:
                with translated(uri):
                    local_files.sync(Path(parse(uri).key))

    def delete(self, uri: str) -> None:
        """Remove one object; an absent one is no error."""
        at = parse(uri)
        with translated(uri):
            if at.is_local:
                Path(at.key).unlink(missing_ok=True)
                return
            if (literal := self.literal_object(uri)) is not None:
                literal.delete()
                return
            store, key = self.object_store(uri)
            try:
                obstore.delete(store, key)
            except FileNotFoundError:
                return

    def stat(self, uri: str) -> ObjectStat:
        """Version and size of one object; InputNotFoundError where there is none."""
        at = parse(uri)
        with self.reading(uri):
            if at.is_local:
                found = os.stat(at.key)
                return ObjectStat(local_etag(found), found.st_size)
            if (literal := self.literal_object(uri)) is not None:
                answer = literal.head()
                return ObjectStat(unquoted(answer.etag), answer.size)
            store, key = self.object_store(uri)
            meta = obstore.head(store, key)
            return ObjectStat(unquoted(meta["e_tag"]), meta["size"])

    def stat_many(self, uris: Sequence[str]) -> pa.RecordBatch:
        """OBJECT_SCHEMA rows in the order asked, HEADs in parallel; etag and bytes are null where no answer came.

        An object that is missing or forbidden is no error here: whoever fetches it gives it its status and reason.
        """
        with ThreadPoolExecutor(CONCURRENT_HEADS) as pool:
            stats = list(pool.map(self._stat_or_none, uris))
        return pa.record_batch(
            [list(uris), [found and found.etag for found in stats], [found and found.bytes for found in stats]],
            schema=OBJECT_SCHEMA,
        )

    def _stat_or_none(self, uri: str) -> ObjectStat | None:
        try:
            return self.stat(uri)
        except MaskLakeError:
            return None

    def exists(self, uri: str) -> bool:
        """Whether `uri` is an object, a folder, or a prefix of at least one object."""
        at = parse(uri)
        if at.is_local:
            return os.path.exists(at.key)
        try:
            if at.key and not at.key.endswith("/"):
                self.stat(uri)
                return True
        except InputNotFoundError:
            pass  # no object of that name: it may be a prefix
        try:
            return next(self.list_objects(uri), None) is not None
        except InputNotFoundError:
            return False

    def is_file(self, uri: str) -> bool:
        """Whether `uri` is one object (not a folder or prefix)."""
        at = parse(uri)
        if at.is_local:
            return os.path.isfile(at.key)
        if not at.key or at.key.endswith("/"):
            return False
        try:
            self.stat(uri)
        except InputNotFoundError:
            return False
        return True

    def list_objects(self, uri: str, left_out: LeftOut | None = None) -> Iterator[pa.RecordBatch]:
        """Everything below a folder or prefix, recursively, as OBJECT_SCHEMA batches in no promised order.

        A stream: a bucket of millions costs one batch of memory. left_out: hears what cannot be listed; without it a folder
        that cannot be read is an error, which names that folder. InputNotFoundError: no such folder or bucket (a prefix that
        holds nothing gives no batch: object stores have no folders).
        """
        at = parse(uri)
        with translated(uri):
            yield from _list_local(at.key, left_out) if at.is_local else self._list_store(at, left_out)

    def folders(self, uri: str) -> list[str]:
        """Names of the folders directly below a folder or prefix: of at most a thousand entries, in no promised order."""
        at = parse(uri)
        with translated(uri):
            if at.is_local:
                with os.scandir(at.key) as entries:
                    return [entry.name for entry in itertools.islice(entries, 1000) if entry.is_dir()]
            if at.scheme != "s3":
                store, key = self.object_store(uri)
                found = obstore.list_with_delimiter(store, key.rstrip("/") or None)["common_prefixes"]
                return [prefix.rstrip("/").rpartition("/")[2] for prefix in found]
            prefix = _prefix(at)
            page = self._botocore_client(at.bucket).list_objects_v2(Bucket=at.bucket, Prefix=prefix, Delimiter="/")
            return [item["Prefix"][len(prefix) : -1] for item in page.get("CommonPrefixes", ())]

    def _list_store(self, at: Location, left_out: LeftOut | None) -> Iterator[pa.RecordBatch]:
        pages = self._s3_pages(at) if at.scheme == "s3" else self._store_pages(at)
        rows = (row for page in pages for row in page if self._is_readable(at, row[0], row[2], left_out))
        base = f"{at.scheme}://{at.bucket}/"
        while chunk := list(itertools.islice(rows, LISTING_BATCH)):
            keys, etags, sizes = zip(*chunk, strict=True)
            uris = [base + key for key in keys]
            yield pa.record_batch([uris, [unquoted(etag) for etag in etags], sizes], schema=OBJECT_SCHEMA)

    def _is_readable(self, at: Location, key: str, size: int, left_out: LeftOut | None) -> bool:
        """Whether this listed key can be asked for again."""
        reason: Reason | None = None
        if key.endswith("/"):
            if not size:
                return False  # a folder's mark: nothing that anybody would miss
            reason = Reason.SLASH_AT_END
        elif at.scheme != "s3" and not is_plain(key):
            reason = Reason.NO_CLIENT
        elif REPLACEMENT in key and not self.is_file(f"{at.scheme}://{at.bucket}/{key}"):
            reason = Reason.NOT_UTF8  # the listing's reader put that sign where bytes were none
        if reason is not None and left_out is not None:
            left_out.add(reason, key)
        return reason is None

    def _s3_pages(self, at: Location) -> Iterator[list[tuple[str, str | None, int]]]:
        """Listed by botocore: obstore gives up on the whole bucket at the first key like `a//b` or `a/./b`."""
        pages = self._botocore_client(at.bucket).get_paginator("list_objects_v2").paginate(Bucket=at.bucket, Prefix=_prefix(at))
        for page in pages:
            yield [(item["Key"], item.get("ETag"), item["Size"]) for item in page.get("Contents", ())]

    def _store_pages(self, at: Location) -> Iterator[list[tuple[str, str | None, int]]]:
        store, key = self.object_store(at.uri)
        for page in obstore.list(store, key.rstrip("/") or None, chunk_size=1000):
            yield [(item["path"], item["e_tag"], item["size"]) for item in page]

    def _botocore_client(self, bucket: str) -> Any:
        """One client a bucket: making one takes a tenth of a second, and threads may share it."""
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
            _ = self._botocore_credentials  # says what is missing before a request fails without it
        return self._session.create_client(
            "s3",
            region_name=self.region(bucket),
            endpoint_url=self.options.endpoint_url,
            config=botocore.config.Config(**config),
        )

    def open_input(self, uri: str) -> pa.NativeFile:
        """The object as a file to read anywhere in; InputNotFoundError, AccessDeniedError or StorageError."""
        if self.literal_object(uri) is not None:
            return pa.BufferReader(self.read_bytes(uri))
        filesystem, path = self.arrow(uri)
        with translated(uri):
            return filesystem.open_input_file(path)

    @staticmethod
    def join(base: str, *parts: str) -> str:
        """`base/part/part`, whatever the scheme; nothing is quoted."""
        return "/".join([base.removesuffix("/"), *(part.strip("/") for part in parts)])


def _prefix(folder: Location) -> str:
    """What the keys below a folder begin with."""
    return f"{folder.key}/" if folder.key and not folder.key.endswith("/") else folder.key


def unquoted(etag: str | None) -> str | None:
    """An HTTP entity tag without its quotes: the form that stands in tables."""
    return etag.removeprefix("W/").strip('"') if etag is not None else None


def _list_local(folder: str, left_out: LeftOut | None) -> Iterator[pa.RecordBatch]:
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise NotADirectoryError(folder)
    if not os.path.isdir(folder):
        raise FileNotFoundError(folder)
    found = walk(folder, left_out)
    try:
        while rows := list(itertools.islice(found, LISTING_BATCH)):
            stats = [status for _, status in rows]
            etags, sizes = [local_etag(status) for status in stats], [status.st_size for status in stats]
            yield pa.record_batch([[path for path, _ in rows], etags, sizes], schema=OBJECT_SCHEMA)
    except OSError as error:
        raise translate(error, error.filename or folder) from error


def relative_to(base: str, name: str) -> str:
    """`name` as a canonical URI: as it is where it is absolute, otherwise below the folder `base`.

    A relative name may begin with `./` and `../`; every other part of a key is literal.
    """
    if _SCHEME.match(name) or os.path.isabs(name):
        return parse(name).uri
    if not _SCHEME.match(base):
        return parse(os.path.join(base, name)).uri
    while found := re.match(r"(\.\.?)/+", name):
        base, name = parent(base) if found.group(1) == ".." else base, name[found.end() :]
    return parse(f"{base}{name}" if base.endswith("/") else f"{base}/{name}").uri


def below(folder: str) -> str:
    """What the names in a folder begin with: the folder, in one spelling, and a slash. `s3://b//` holds `s3://b//a`."""
    place = canonical(folder)
    return place if place.endswith("/") else f"{place}/"


def parent(uri: str) -> str:
    """The folder that holds `uri`, as `canonical` spells it."""
    at = parse(uri)
    if at.is_local:
        return os.path.dirname(at.key)
    key = canonical(uri)[len(f"{at.scheme}://{at.bucket}/") :]
    return canonical(Location(at.scheme, at.bucket, key[: key.rfind("/") + 1]).uri)


def concat(batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """All batches of a listing as one table."""
    return pa.Table.from_batches(batches, schema=OBJECT_SCHEMA)
