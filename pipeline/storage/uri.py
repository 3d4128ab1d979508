"""URIs of storage: parsing, the canonical spelling, and paths relative to a folder.

A URI is a local path (`/data/x`, `photos`, `file:///data/x`) or `scheme://bucket/key`. `s3://` is tested; `gs://` and `az://`
use the same libraries. Keys are literal: `s3://b/100%25.jpg` names the object `100%25.jpg`, and `s3://b//a` is the key `/a` in
bucket b. Only `file://` URIs are percent-encoded, as their standard requires. The canonical form of a local URI is its absolute
path.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from masklake.model.errors import ConfigError

_SCHEMES = {"s3": "s3", "s3a": "s3", "s3n": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "file": "file"}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True)
class Location:
    """A parsed URI. scheme: "file", "s3", "gs" or "az". bucket: "" for local files. key: the absolute path for local files."""

    scheme: str
    bucket: str
    key: str

    @property
    def is_local(self) -> bool:
        """Whether this is a path of the local file system."""
        return self.scheme == "file"

    @property
    def uri(self) -> str:
        """The canonical URI: one spelling per object, as the table stores it."""
        if self.is_local:
            return self.key
        return f"{self.scheme}://{self.bucket}/{self.key}" if self.key else f"{self.scheme}://{self.bucket}"


def parse_uri(uri: str | os.PathLike[str]) -> Location:
    """Splits a URI. Raises ConfigError for a scheme without a client here, or a missing bucket."""
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
    """Returns `os.path.abspath`, but with a single leading slash: POSIX leaves the meaning of two open."""
    return re.sub("^//+", "/", os.path.abspath(path))


def _file_uri_path(uri: str) -> str:
    host, _, path = uri[len("file://") :].partition("/")
    if host not in ("", "localhost"):
        raise ConfigError(f"{uri}: file URIs name this machine only; write file:///{host}/{path} or a plain path")
    return _absolute("/" + os.fsdecode(unquote_to_bytes(os.fsencode(path))))


def canonical(uri: str | os.PathLike[str]) -> str:
    """Returns the canonical spelling: an absolute path for local files, else `scheme://bucket/key` without a trailing slash.

    Keys are literal: `s3://b/a/` becomes `s3://b/a`, but `s3://b/a//` is unchanged. `below` gives the prefix of a folder's
    keys.
    """
    at = parse_uri(uri)
    return at.uri[:-1] if not at.is_local and re.search("[^/]/$", at.key) else at.uri


def real_place(uri: str) -> str:
    """Returns the canonical URI with symbolic links in local paths resolved."""
    at = parse_uri(uri)
    return os.path.realpath(at.key) if at.is_local else canonical(uri)


def relative_to(base: str, name: str) -> str:
    """Returns `name` as a canonical URI: unchanged if it is absolute, otherwise below the folder `base`.

    A relative name may begin with `./` and `../`; every other part of a key is literal.
    """
    if _SCHEME.match(name) or os.path.isabs(name):
        return parse_uri(name).uri
    if not _SCHEME.match(base):
        return parse_uri(os.path.join(base, name)).uri
    while found := re.match(r"(\.\.?)/+", name):
        base, name = parent(base) if found.group(1) == ".." else base, name[found.end() :]
    return parse_uri(f"{base}{name}" if base.endswith("/") else f"{base}/{name}").uri


def below(folder: str) -> str:
    """Returns the prefix of all names in a folder: the canonical folder and a slash. `s3://b//` contains `s3://b//a`."""
    place = canonical(folder)
    return place if place.endswith("/") else f"{place}/"


def parent(uri: str) -> str:
    """Returns the folder that contains `uri`, in canonical spelling."""
    at = parse_uri(uri)
    if at.is_local:
        return os.path.dirname(at.key)
    key = canonical(uri)[len(f"{at.scheme}://{at.bucket}/") :]
    return canonical(Location(at.scheme, at.bucket, key[: key.rfind("/") + 1]).uri)


def key_prefix(folder: Location) -> str:
    """Returns the prefix of all keys below a folder."""
    return f"{folder.key}/" if folder.key and not folder.key.endswith("/") else folder.key
