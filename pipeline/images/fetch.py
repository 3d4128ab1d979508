"""Fetches many objects at once. A fetch never raises: a failure gets a status and a reason, and the others continue."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import obstore

from masklake.model.errors import MaskLakeError
from masklake.pipeline.errors import InputNotFoundError, StorageError
from masklake.pipeline.images.status import Status
from masklake.pipeline.storage.errors import translated
from masklake.pipeline.storage.literal_keys import LiteralObject
from masklake.pipeline.storage.objects import local_etag, unquoted
from masklake.pipeline.storage.retry import PAUSES_S
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import parse_uri

CONCURRENT_GETS = 32
"""Concurrent requests per call: enough to hide 50 ms of latency at 600 images/s, few enough for the sockets of one node."""


@dataclass(frozen=True)
class Fetched:
    """One object: its bytes if the status is ok, else None and a reason.

    etag and bytes describe the version that was read (not the one that was listed); None if nothing answered. may_pass: whether
    the same request may succeed later (`StorageError.may_pass`).
    """

    status: Status
    data: bytes | None = field(default=None, repr=False)  # asyncio formats results that nobody prints
    etag: str | None = None
    bytes: int | None = None
    error: str | None = None
    may_pass: bool = False


def fetch(storage: Storage, uris: Sequence[str], *, max_bytes: int, concurrency: int = CONCURRENT_GETS) -> list[Fetched]:
    """Returns the objects of `uris`, in order. Fetches at most `concurrency` at a time. Must be called from a thread without an
    event loop.

    An object of more than `max_bytes` is too_large, and its body is not read. Retries and timeouts are those of the storage
    options.
    """
    found: dict[str, Fetched] = {}
    local = [uri for uri in dict.fromkeys(uris) if _is_local(uri)]
    if local:
        with ThreadPoolExecutor(min(concurrency, len(local)), thread_name_prefix="read") as pool:
            found |= zip(local, pool.map(lambda uri: _read_local(uri, max_bytes), local), strict=True)
    if stored := [uri for uri in dict.fromkeys(uris) if uri not in found]:
        found |= zip(stored, asyncio.run(_fetch_stored(storage, stored, max_bytes, concurrency)), strict=True)
    return [found[uri] for uri in uris]


def fetch_patiently(storage: Storage, uris: Sequence[str], *, max_bytes: int) -> list[Fetched]:
    """Same as `fetch`, but retries transient failures for up to a minute: for callers that cannot try an image again later."""
    found = fetch(storage, uris, max_bytes=max_bytes)
    for pause in PAUSES_S:
        again = [place for place, got in enumerate(found) if got.may_pass]
        if not again:
            break
        time.sleep(pause)
        for place, got in zip(again, fetch(storage, [uris[place] for place in again], max_bytes=max_bytes), strict=True):
            found[place] = got
    return found


def _is_local(uri: str) -> bool:
    try:
        return parse_uri(uri).is_local
    except MaskLakeError:  # the fetch of this one says why
        return False


async def _fetch_stored(storage: Storage, uris: Sequence[str], max_bytes: int, concurrency: int) -> list[Fetched]:
    gate = asyncio.Semaphore(concurrency)

    async def fetch_one(uri: str) -> Fetched:
        async with gate:
            try:
                with translated(uri):
                    return await _get(storage, uri, max_bytes)
            except MaskLakeError as error:
                return _failed(error)

    return await asyncio.gather(*(fetch_one(uri) for uri in uris))


def _failed(error: MaskLakeError) -> Fetched:
    missing = isinstance(error, InputNotFoundError)
    may_pass = isinstance(error, StorageError) and error.may_pass
    return Fetched(Status.MISSING if missing else Status.FETCH_ERROR, error=str(error), may_pass=may_pass)


async def _get(storage: Storage, uri: str, max_bytes: int) -> Fetched:
    """Returns one object of a store. Raises the errors of its client."""
    if (literal := storage.literal_object(uri)) is not None:
        return await asyncio.to_thread(_get_literal, literal, max_bytes)
    store, key = storage.object_store(uri)
    answer = await obstore.get_async(store, key)
    etag, size = unquoted(answer.meta["e_tag"]), answer.meta["size"]
    if size > max_bytes:
        return _too_large(etag, size, max_bytes)
    return Fetched(Status.OK, bytes(await answer.bytes_async()), etag, size)


def _get_literal(found: LiteralObject, max_bytes: int) -> Fetched:
    answer = found.get(max_bytes)
    if answer.data is None:
        return _too_large(unquoted(answer.etag), answer.size, max_bytes)
    return Fetched(Status.OK, answer.data, unquoted(answer.etag), answer.size)


def _read_local(uri: str, max_bytes: int) -> Fetched:
    """Reads one local file. Files that are not regular are refused unopened: a pipe would block forever."""
    path = parse_uri(uri).key
    try:
        with translated(uri):
            if not stat.S_ISREG(os.stat(path).st_mode):
                return Fetched(Status.FETCH_ERROR, error=f"{path}: not a regular file")
            with Path(path).open("rb") as file:
                found = os.fstat(file.fileno())
                etag = local_etag(found)
                if found.st_size > max_bytes:
                    return _too_large(etag, found.st_size, max_bytes)
                return Fetched(Status.OK, file.read(found.st_size), etag, found.st_size)
    except MaskLakeError as error:
        return _failed(error)


def _too_large(etag: str | None, size: int, max_bytes: int) -> Fetched:
    return Fetched(Status.TOO_LARGE, None, etag, size, f"{size} bytes; the limit is {max_bytes}")
