"""S3 objects whose keys obstore cannot name, by botocore, which sends a key as it is.

obstore strips a key's first slash, so that it reads ANOTHER object, and refuses `//`, `/./`, `/../` and control characters.
S3 has such keys: a slash too many in somebody's upload is enough.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import botocore.exceptions

MAX_KEY_BYTES = 1024
"""S3's limit of a key, in UTF-8."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def is_plain(key: str) -> bool:
    """Whether obstore names exactly this object by this key."""
    return not _CONTROL.search(key) and not any(part in ("", ".", "..") for part in key.split("/"))


@dataclass(frozen=True)
class LiteralAnswer:
    """An object's version (with the store's quotes), its size in bytes, and its data unless it was larger than asked."""

    etag: str | None
    size: int
    data: bytes | None


@dataclass(frozen=True)
class LiteralObject:
    """One object by its literal key. Calls raise FileNotFoundError, PermissionError, or what botocore raises."""

    client: Any  # botocore's; threads may share it
    bucket: str
    key: str

    def head(self) -> LiteralAnswer:
        """Version and size."""
        with _file_errors():
            answer = self.client.head_object(Bucket=self.bucket, Key=self.key)
        return LiteralAnswer(answer.get("ETag"), answer["ContentLength"], None)

    def get(self, max_bytes: int | None = None) -> LiteralAnswer:
        """Version, size and bytes of one answer; a body of more than ``max_bytes`` is not read."""
        with _file_errors():
            answer = self.client.get_object(Bucket=self.bucket, Key=self.key)
        etag, size, body = answer.get("ETag"), answer["ContentLength"], answer["Body"]
        try:
            return LiteralAnswer(etag, size, None if max_bytes is not None and size > max_bytes else body.read())
        finally:
            body.close()

    def put(self, body: bytes | IO[bytes]) -> None:
        """Write the object, of at most 5 GB, in one request."""
        with _file_errors():
            self.client.put_object(Bucket=self.bucket, Key=self.key, Body=body)

    def delete(self) -> None:
        """Remove the object; an absent one is no error."""
        with _file_errors():
            self.client.delete_object(Bucket=self.bucket, Key=self.key)


@contextmanager
def _file_errors() -> Iterator[None]:
    """A HEAD's answer has no body, and so nothing but a status tells what is wrong."""
    try:
        yield
    except botocore.exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code")
        if code in ("404", "NoSuchKey", "NotFound"):
            raise FileNotFoundError(str(error)) from error
        if code in ("403", "Forbidden"):
            raise PermissionError(str(error)) from error
        raise
