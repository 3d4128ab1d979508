"""S3 objects whose keys obstore cannot address, through botocore, which sends a key unchanged.

obstore strips the leading slash of a key, so that it reads ANOTHER object, and refuses `//`, `/./`, `/../` and control
characters. Such keys exist in S3: an upload with one slash too many creates one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import botocore.exceptions

MAX_KEY_BYTES = 1024
"""Maximum length of a key in S3, in bytes of UTF-8."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def is_plain(key: str) -> bool:
    """Returns whether obstore addresses exactly the object with this key."""
    return not _CONTROL.search(key) and not any(part in ("", ".", "..") for part in key.split("/"))


@dataclass(frozen=True)
class LiteralAnswer:
    """An object's version (with the store's quotes), its size in bytes, and its data; None if it was not read."""

    etag: str | None
    size: int
    data: bytes | None


@dataclass(frozen=True)
class LiteralObject:
    """One object, addressed by its literal key. Methods raise FileNotFoundError, PermissionError and botocore's errors."""

    client: Any  # botocore's; threads may share it
    bucket: str
    key: str

    def head(self) -> LiteralAnswer:
        """Returns version and size."""
        with _file_errors():
            answer = self.client.head_object(Bucket=self.bucket, Key=self.key)
        return LiteralAnswer(answer.get("ETag"), answer["ContentLength"], None)

    def get(self, max_bytes: int | None = None) -> LiteralAnswer:
        """Returns version, size and bytes from one answer. A body larger than `max_bytes` is not read."""
        with _file_errors():
            answer = self.client.get_object(Bucket=self.bucket, Key=self.key)
        etag, size, body = answer.get("ETag"), answer["ContentLength"], answer["Body"]
        try:
            return LiteralAnswer(etag, size, None if max_bytes is not None and size > max_bytes else body.read())
        finally:
            body.close()

    def put(self, body: bytes | IO[bytes]) -> None:
        """Writes the object in one request; at most 5 GB."""
        with _file_errors():
            self.client.put_object(Bucket=self.bucket, Key=self.key, Body=body)

    def delete(self) -> None:
        """Deletes the object; it is no error if there is none."""
        with _file_errors():
            self.client.delete_object(Bucket=self.bucket, Key=self.key)


@contextmanager
def _file_errors() -> Iterator[None]:
    """Context manager that raises FileNotFoundError and PermissionError: without a body, the answer to a HEAD has only a
    status.
    """
    try:
        yield
    except botocore.exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code")
        if code in ("404", "NoSuchKey", "NotFound"):
            raise FileNotFoundError(str(error)) from error
        if code in ("403", "Forbidden"):
            raise PermissionError(str(error)) from error
        raise
