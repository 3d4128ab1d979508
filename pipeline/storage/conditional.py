"""Conditional puts that survive a lost reply, and a check that a store supports them.

A put whose reply is lost may have succeeded. If it is repeated, the store refuses it because of the object that the first
attempt wrote. So a refusal counts only after the object was read: content that contains our own token is ours.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from masklake.model.errors import MaskLakeError
from masklake.pipeline.errors import StorageError
from masklake.pipeline.storage.errors import fault, is_known, reason_of, translated
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import parse_uri

if TYPE_CHECKING:  # defined in obstore's stubs only
    from obstore import PutMode, PutResult, UpdateVersion

logger = logging.getLogger(__name__)

_REFUSALS = (AlreadyExistsError, PreconditionError)
_PAUSES_S = (0.1, 0.5, 2.0)  # after puts without a reply


class RefusedError(Exception):
    """The condition does not hold. `found` is another writer's content, or None if the object is gone."""

    def __init__(self, uri: str, found: Found | None) -> None:
        super().__init__(f"{uri}: the condition of a put does not hold")
        self.found = found


@dataclass(frozen=True)
class Found:
    """The content of an object. version: the condition for a later put."""

    content: bytes
    version: UpdateVersion


class ConditionalObject:
    """One object in a store that is written only under conditions.

    token: text that every content put here contains, and no other writer's does. bare_tags: send entity tags without their
    quotes (see `bare_tags`). Methods raise the errors of obstore, and RefusedError.
    """

    def __init__(self, storage: Storage, uri: str, token: str, bare_tags: bool) -> None:
        self.uri = uri
        self._store, self._key = storage.object_store(uri)
        self._token = token.encode()
        self._bare_tags = bare_tags

    def read(self) -> Found | None:
        """Returns the current object, or None if there is none."""
        try:
            answer = obstore.get(self._store, self._key)
            return Found(bytes(answer.bytes()), self._version(answer.meta["e_tag"], answer.meta["version"]))
        except FileNotFoundError:
            return None

    def create(self, content: bytes) -> UpdateVersion:
        """Creates the object. Raises RefusedError if another writer's object exists."""
        return self._put(content, "create")

    def replace(self, content: bytes, version: UpdateVersion) -> UpdateVersion:
        """Replaces the object if it still has this version or is ours. Raises RefusedError otherwise."""
        return self._put(content, version)

    def _put(self, content: bytes, condition: PutMode) -> UpdateVersion:
        pauses = iter(_PAUSES_S)
        while True:
            try:
                return self._result(obstore.put(self._store, self._key, content, mode=condition))
            except (BaseError, OSError) as error:
                refused = isinstance(error, _REFUSALS)
                if not refused and fault(error).is_refusal:
                    raise
                found = self._read_after(error)
                if found is not None and found.content == content:
                    return found.version  # the put succeeded, and only the reply was lost
                pause = next(pauses, None)
                if pause is None:
                    if refused:
                        raise RefusedError(self.uri, found) from error
                    raise
                if refused:
                    condition = self._next_condition(condition, found, error)
                else:
                    time.sleep(pause)

    def _read_after(self, error: BaseException) -> Found | None:
        """Returns the object after a put that failed. Raises `error` again if it cannot be read either."""
        try:
            return self.read()
        except (BaseError, OSError):
            raise error from None

    def _next_condition(self, condition: PutMode, found: Found | None, error: BaseException) -> PutMode:
        """Returns the condition after a refusal that an earlier put of ours without a reply explains. Raises RefusedError if it
        does not.
        """
        if found is None and condition == "create":
            return "create"  # the other object was removed
        if found is None or self._token not in found.content or found.version == condition:
            raise RefusedError(self.uri, found) from error
        return found.version

    def _result(self, result: PutResult) -> UpdateVersion:
        return self._version(result["e_tag"], result["version"])

    def _version(self, e_tag: str | None, version: str | None) -> UpdateVersion:
        if e_tag is None:
            raise _lacks(self.uri, "gives no entity tags")
        tag = e_tag.strip('"') if self._bare_tags else e_tag
        return {"e_tag": tag} if version is None else {"e_tag": tag, "version": version}


# -- proof -------------------------------------------------------------------------------------------------------------

_PROVEN: dict[tuple[str | None, str, str], bool] = {}  # (endpoint, scheme, bucket): whether it wants bare tags


def bare_tags(storage: Storage, folder: str) -> bool:
    """Returns whether the store that holds `folder` expects entity tags without quotes, as Ceph's gateway 16.2 does.

    Checks, once per process and bucket, with an object of its own in `folder`, that the store refuses to create an object that
    exists, replaces one under the right tag and refuses a wrong tag. Raises StorageError that says what the store lacks.
    """
    at = parse_uri(folder)
    place = (storage.options.endpoint_url, at.scheme, at.bucket)
    if place not in _PROVEN:
        uri = storage.join(folder, f"probe-{uuid.uuid4().hex}")
        try:
            _PROVEN[place] = _prove(storage, uri)
        finally:
            _remove(storage, uri)
    return _PROVEN[place]


def _prove(storage: Storage, uri: str) -> bool:
    ours, other = uuid.uuid4().hex, uuid.uuid4().hex
    with translated(uri), _implemented(uri):
        probe = ConditionalObject(storage, uri, ours, bare_tags=False)
        first = probe.create(f"{ours} 1".encode())
        if not _is_refused(lambda: ConditionalObject(storage, uri, other, bare_tags=False).create(other.encode())):
            raise _lacks(uri, "overwrites what a put was only to create (it ignores If-None-Match)")
        second = f"{ours} 2".encode()
        bare = _is_refused(lambda: probe.replace(second, first))
        if bare:
            first = {**first, "e_tag": (first["e_tag"] or "").strip('"')}
            probe = ConditionalObject(storage, uri, ours, bare_tags=True)
            if _is_refused(lambda: probe.replace(second, first)):
                raise _lacks(uri, "refuses a put under the object's own entity tag, with its quotes and without (If-Match)")
        if not _is_refused(lambda: ConditionalObject(storage, uri, other, bare).replace(other.encode(), first)):
            raise _lacks(uri, "overwrites an object under an entity tag that it no longer has (it ignores If-Match)")
    return bare


def _is_refused(put: Callable[[], object]) -> bool:
    try:
        put()
    except RefusedError:
        return True
    return False


@contextmanager
def _implemented(uri: str) -> Iterator[None]:
    """Context manager that translates the answer of a store without conditional puts; other refusals are raised unchanged."""
    try:
        yield
    except BaseError as error:
        if fault(error).status in (400, 405, 501) and not is_known(error):
            raise _lacks(uri, f"does not implement conditional puts ({reason_of(error)})") from error
        raise


def _lacks(uri: str, what: str) -> StorageError:
    return StorageError(
        f"{uri}: this store {what}, so a run could not be protected against a second driver; "
        "use a store with conditional puts (docs/labelling.md names those that were tried)"
    )


def _remove(storage: Storage, uri: str) -> None:
    try:
        storage.delete(uri)
    except MaskLakeError as error:  # the same fault ended the check, or will end the run with its own error
        logger.warning("the object that tests conditional puts could not be removed: %s", error)
