"""URIs of storage: parsed, in one spelling, joined and related.

A URI is a local path (`/data/x`, `photos`, `file:///data/x`) or `scheme://bucket/key`; `s3://` is tested, `gs://` and `az://`
come through the same libraries. Keys are literal: `s3://b/100%25.jpg` names the object `100%25.jpg`, `s3://b//a` is `/a` in b.
Only `file://` URIs are percent-encoded, as their standard says. The canonical form of a local URI is its absolute path.
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


def key_prefix(folder: Location) -> str:
    """What the keys below a folder begin with."""
    return f"{folder.key}/" if folder.key and not folder.key.endswith("/") else folder.key
