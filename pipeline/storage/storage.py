"""Reads, writes and lists objects in storage, in the same way for local files and object stores."""

from __future__ import annotations

import itertools
import os
import stat
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import obstore
import pyarrow as pa

from masklake.model.errors import MaskLakeError
from masklake.pipeline.errors import InputNotFoundError
from masklake.pipeline.storage import local_files
from masklake.pipeline.storage.errors import FOREIGN, is_vague, translate, translated
from masklake.pipeline.storage.handles import CONCURRENT_HEADS, Handles
from masklake.pipeline.storage.left_out import LeftOut, Reason
from masklake.pipeline.storage.literal_keys import is_plain
from masklake.pipeline.storage.objects import LISTING_BATCH, OBJECT_SCHEMA, ObjectStat, local_etag, unquoted
from masklake.pipeline.storage.uri import Location, key_prefix, parse_uri
from masklake.pipeline.storage.walk import Enters, walk

REPLACEMENT = "\ufffd"


class Storage(Handles):
    """Reads, writes and lists objects by URI. Methods raise the errors of `pipeline.errors`."""

    @contextmanager
    def reading(self, uri: str, probe: str | None = None) -> Iterator[None]:
        """Context manager like `translated`. If a store's refusal contains no reason, it is obtained by a GET of one byte of
        `probe` (None: of `uri`).
        """
        with translated(uri):
            try:
                yield
            except FOREIGN as error:
                if parse_uri(uri).scheme == "s3" and is_vague(error):
                    self._raise_reason(probe or uri)
                raise

    def _raise_reason(self, uri: str) -> None:
        """Raises the store's error for a GET of one byte, if it contains a reason."""
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

    def read_bytes(self, uri: str) -> bytes:
        """Returns the bytes of an object. Raises InputNotFoundError, AccessDeniedError or StorageError."""
        at = parse_uri(uri)
        with translated(uri):
            if at.is_local:
                return Path(at.key).read_bytes()
            if (literal := self.literal_object(uri)) is not None:
                return literal.get().data or b""
            store, key = self.object_store(uri)
            return bytes(obstore.get(store, key).bytes())

    def write_bytes(self, uri: str, data: bytes) -> None:
        """Writes an object atomically: a reader sees the old or the new bytes, never a part. Parent folders are created."""
        with translated(uri):
            self._write(uri, data)

    def _write(self, uri: str, data: bytes) -> None:
        at = parse_uri(uri)
        if at.is_local:
            local_files.write(Path(at.key), data)
        elif (literal := self.literal_object(uri)) is not None:
            literal.put(data)
        else:
            store, key = self.object_store(uri)
            obstore.put(store, key, data)

    def check_writable(self, folder: str) -> None:
        """Raises AccessDeniedError or StorageError if no object can be written below a folder or prefix, which need not exist.
        Leaves nothing behind.
        """
        at = parse_uri(folder)
        with translated(folder):  # which the user knows, unlike the name of the probe
            if at.is_local:
                local_files.check_writable(Path(at.key))
                return
            probe = self.join(folder, f"masklake-probe-{uuid.uuid4().hex}")
            self._write(probe, b"")
        self.delete(probe)

    def upload(self, path: Path, uri: str) -> None:
        """Copies a local file to `uri`, in parts if it is large. A reader sees all of it or nothing."""
        at = parse_uri(uri)
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
        """Syncs local files that another program wrote to disk. Object stores are durable once they answer."""
        for uri in uris:
            if parse_uri(uri).is_local:
                with translated(uri):
                    local_files.sync(Path(parse_uri(uri).key))

    def delete(self, uri: str) -> None:
        """Deletes one object; it is no error if there is none."""
        at = parse_uri(uri)
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
        """Returns version and size of one object. Raises InputNotFoundError if there is none."""
        at = parse_uri(uri)
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
        """Returns OBJECT_SCHEMA rows in the order of `uris`, by parallel HEAD requests. etag and bytes are null for an object
        that is missing or cannot be accessed, which is not an error: fetching it later gives the reason.
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
        """Returns whether `uri` is an object, a folder, or a prefix of at least one object."""
        at = parse_uri(uri)
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
        """Returns whether `uri` is one object (not a folder or prefix)."""
        at = parse_uri(uri)
        if at.is_local:
            return os.path.isfile(at.key)
        if not at.key or at.key.endswith("/"):
            return False
        try:
            self.stat(uri)
        except InputNotFoundError:
            return False
        return True

    def list_objects(
        self, uri: str, left_out: LeftOut | None = None, enters: Enters = lambda folder: True
    ) -> Iterator[pa.RecordBatch]:
        """Yields everything below a folder or prefix, recursively, as OBJECT_SCHEMA batches in no particular order.

        Results are streamed: a bucket with millions of objects takes the memory of one batch. left_out: counts entries that
        cannot be listed; without it, a folder that cannot be read is an error that names the folder. enters: returns whether to
        list a local subfolder. Raises InputNotFoundError if there is no such folder or bucket. An empty prefix yields no batch:
        object stores have no folders.
        """
        at = parse_uri(uri)
        with translated(uri):
            yield from _list_local(at.key, left_out, enters) if at.is_local else self._list_store(at, left_out)

    def folders(self, uri: str) -> list[str]:
        """Returns the names of the folders directly below a folder or prefix, from at most a thousand entries, in no particular
        order.
        """
        at = parse_uri(uri)
        with translated(uri):
            if at.is_local:
                with os.scandir(at.key) as entries:
                    return [entry.name for entry in itertools.islice(entries, 1000) if entry.is_dir()]
            if at.scheme != "s3":
                store, key = self.object_store(uri)
                found = obstore.list_with_delimiter(store, key.rstrip("/") or None)["common_prefixes"]
                return [prefix.rstrip("/").rpartition("/")[2] for prefix in found]
            prefix = key_prefix(at)
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
        """Returns whether a listed key can be requested."""
        reason: Reason | None = None
        if key.endswith("/"):
            if not size:
                return False  # marks a folder
            reason = Reason.SLASH_AT_END
        elif at.scheme != "s3" and not is_plain(key):
            reason = Reason.NO_CLIENT
        elif REPLACEMENT in key and not self.is_file(f"{at.scheme}://{at.bucket}/{key}"):
            reason = Reason.NOT_UTF8  # the client has replaced bytes that are not UTF-8
        if reason is not None and left_out is not None:
            left_out.add(reason, key)
        return reason is None

    def _s3_pages(self, at: Location) -> Iterator[list[tuple[str, str | None, int]]]:
        """Lists with botocore, because obstore fails on the whole bucket at the first key like `a//b` or `a/./b`."""
        pages = (
            self._botocore_client(at.bucket).get_paginator("list_objects_v2").paginate(Bucket=at.bucket, Prefix=key_prefix(at))
        )
        for page in pages:
            yield [(item["Key"], item.get("ETag"), item["Size"]) for item in page.get("Contents", ())]

    def _store_pages(self, at: Location) -> Iterator[list[tuple[str, str | None, int]]]:
        store, key = self.object_store(at.uri)
        for page in obstore.list(store, key.rstrip("/") or None, chunk_size=1000):
            yield [(item["path"], item["e_tag"], item["size"]) for item in page]

    def open_input(self, uri: str) -> pa.NativeFile:
        """Returns the object as a random-access file. Raises InputNotFoundError, AccessDeniedError or StorageError."""
        if self.literal_object(uri) is not None:
            return pa.BufferReader(self.read_bytes(uri))
        filesystem, path = self.arrow(uri)
        with translated(uri):
            return filesystem.open_input_file(path)

    @staticmethod
    def join(base: str, *parts: str) -> str:
        """Returns `base/part/part`, for any scheme; nothing is quoted."""
        return "/".join([base.removesuffix("/"), *(part.strip("/") for part in parts)])


def _list_local(folder: str, left_out: LeftOut | None, enters: Enters) -> Iterator[pa.RecordBatch]:
    if not stat.S_ISDIR(os.stat(folder).st_mode):  # `isdir` does not distinguish a forbidden folder from a missing one
        raise NotADirectoryError(folder)
    found = walk(folder, left_out, enters)
    try:
        while rows := list(itertools.islice(found, LISTING_BATCH)):
            stats = [status for _, status in rows]
            etags, sizes = [local_etag(status) for status in stats], [status.st_size for status in stats]
            yield pa.record_batch([[path for path, _ in rows], etags, sizes], schema=OBJECT_SCHEMA)
    except OSError as error:
        raise translate(error, error.filename or folder) from error
