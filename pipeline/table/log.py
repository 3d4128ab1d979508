"""The table's Delta log: its newest snapshot, the files that it lists, and transactions that add or remove runs' files.

The state of a run is in the log itself, as the version of its application transaction: `COMMITTED` is written with its files
and `DROPPED` with their removal. A run id is never used again, so a run goes from one to the other once.
"""

from __future__ import annotations

import errno
import json
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import deltalake
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from masklake.model.errors import MaskLakeError
from masklake.pipeline.errors import InputNotFoundError, TableError
from masklake.pipeline.storage.errors import os_error_number, reason_of, translate
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.schema import RUN_COLUMN, TABLE_SCHEMA

logger = logging.getLogger(__name__)

CHECKPOINT_EVERY = 1000
"""Number of transactions between two checkpoints of the log. A checkpoint is a Parquet file in the table: readers of
`**/*.parquet` count its rows as images, so none is written until a log without one is slow to read (1 s).
"""
# Ours are written by `_write_checkpoint`. No entry of the log may be cleaned up: `entries` reads them all.
_NO_CHECKPOINT = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)

COMMITTED = 1
"""Version of the application transaction of a run whose files are in the table."""
DROPPED = 2
"""Version of the application transaction of a run whose files were removed from the table."""

READERS = 16

NOTE = "masklake"
"""Key of our own part of a transaction's description (`commitInfo`)."""


@dataclass(frozen=True)
class DataFile:
    """A Parquet file in a run's folder. path: relative to the table."""

    path: str
    bytes: int
    rows: int


@dataclass(frozen=True)
class Entry:
    """Changes of one transaction. states: `COMMITTED` or `DROPPED`, by run id. note: empty in those of other programs."""

    version: int
    states: dict[str, int]
    note: dict[str, Any]


class DeltaLog:
    """The Delta log of the table at `uri`, which need not exist yet. Holds no connection and no snapshot."""

    def __init__(self, storage: Storage, uri: str) -> None:
        self._storage = storage
        self._uri = uri

    def snapshot(self) -> DeltaTable | None:
        """Returns the newest snapshot, or None before the first commit. Raises TableError and the storage's errors."""
        try:
            with self._translated():
                return DeltaTable(self._uri, storage_options=self._storage.delta_options(self._uri))
        except _NoLogYetError:
            return None

    def files(self) -> list[tuple[str, str]]:
        """Returns (path relative to the table, run_id) of every file of the newest snapshot; none before the first commit."""
        return files_of(self.snapshot())

    def snapshot_or_created(self) -> DeltaTable:
        """Returns the newest snapshot; creates the log if there is none."""
        delta = self.snapshot()
        if delta is not None:
            return delta
        try:
            with self._translated():
                created = DeltaTable.create(
                    self._uri,
                    _delta_schema(),
                    mode="ignore",  # another writer may have created it since
                    partition_by=[RUN_COLUMN],
                    name="masklake",
                    configuration={"delta.checkpointInterval": str(2**31 - 1)},  # for other writers
                    storage_options=self._storage.delta_options(self._uri),
                    commit_properties=CommitProperties(max_commit_retries=0),
                )
        except _CommitConflictError as error:  # ... or creates it at this moment, which "ignore" does not cover
            delta = self.snapshot()
            if delta is None:
                reason = reason_of(error.__cause__ or error)
                raise TableError(f"{self._uri}: the Delta log cannot be created ({reason})") from error
            return delta
        self._sync_log(0)
        return created

    def try_append(self, snapshot: DeltaTable, run_id: str, files: Sequence[DataFile]) -> bool:
        """Adds a run's files in the transaction after `snapshot`. Returns False if another writer took that version."""
        return self._try_commit(snapshot, [_add_action(run_id, file) for file in files], [Transaction(run_id, COMMITTED)])

    def try_drop(self, snapshot: DeltaTable, run_ids: Sequence[str], note: Mapping[str, Any]) -> bool:
        """Removes all files of these runs in the transaction after `snapshot`, and marks the runs as dropped. Returns False if
        another writer took that version.

        The files stay where they are, for readers of earlier versions. note: JSON values that the log keeps with the
        transaction.
        """
        now_ms = int(time.time() * 1000)
        rows = pa.table(snapshot.get_add_actions(flatten=True)).select(["path", "size_bytes", f"partition.{RUN_COLUMN}"])
        chosen = set(run_ids)
        removed = [
            RemoveAction(path, True, now_ms, size=size, partition_values={RUN_COLUMN: run_id})
            for path, size, run_id in zip(*(column.to_pylist() for column in rows.columns), strict=True)
            if run_id in chosen
        ]
        return self._try_commit(snapshot, removed, [Transaction(run_id, DROPPED) for run_id in run_ids], note)

    def _try_commit(
        self,
        snapshot: DeltaTable,
        actions: Sequence[AddAction | RemoveAction],
        transactions: list[Transaction],
        note: Mapping[str, Any] = MappingProxyType({}),
    ) -> bool:
        """Writes the transaction after `snapshot`. Returns False if another writer took that version.

        The transaction carries a token: a client that repeats a put whose reply was lost meets its own entry, and is refused.
        """
        version = snapshot.version() + 1
        own = {**note, "token": uuid.uuid4().hex}
        try:
            with self._translated():
                snapshot.create_write_transaction(
                    list(actions),
                    "append",
                    _delta_schema(),
                    partition_by=[RUN_COLUMN],
                    commit_properties=CommitProperties({NOTE: own}, max_commit_retries=0, app_transactions=transactions),
                    post_commithook_properties=_NO_CHECKPOINT,
                )
        except _CommitConflictError:
            if not self._is_entry(version, own):
                return False
        self._sync_log(version)
        if version % CHECKPOINT_EVERY == 0:
            self._write_checkpoint()
        return True

    def _write_checkpoint(self) -> None:
        """Writes a checkpoint of the newest version. If that fails, the log is complete without it."""
        try:
            with self._translated():
                DeltaTable(self._uri, storage_options=self._storage.delta_options(self._uri)).create_checkpoint()
        except (MaskLakeError, _NoLogYetError) as error:
            logger.warning("the checkpoint of the log was not written: %s", error)

    def entries(self, newest: int) -> Iterator[Entry]:
        """Yields the changes of each transaction, from version `newest` back to the first.

        Raises TableError at an entry that another program has removed (Delta allows that below a checkpoint).
        """
        with ThreadPoolExecutor(READERS) as pool:
            for first in range(newest, 0, -READERS):
                yield from pool.map(self._entry, range(first, max(first - READERS, 0), -1))

    def _entry(self, version: int) -> Entry:
        uri = self._entry_uri(version)
        try:
            return _entry(version, self._storage.read_bytes(uri), uri)
        except InputNotFoundError as error:
            raise TableError(f"{uri}: is gone, so the order of earlier transactions is not known") from error

    def _is_entry(self, version: int, note: Mapping[str, Any]) -> bool:
        """Returns whether this version is the transaction with this note."""
        uri = self._entry_uri(version)
        try:
            return _entry(version, self._storage.read_bytes(uri), uri).note == note
        except InputNotFoundError:
            return False

    def _entry_uri(self, version: int) -> str:
        return self._storage.join(self._uri, "_delta_log", f"{version:020}.json")

    def _sync_log(self, version: int) -> None:
        self._storage.sync([self._entry_uri(version)])

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except CommitFailedError as error:
            raise _CommitConflictError from error
        except DeltaError as error:
            # deltalake reports any error of the file system as a missing log.
            if os_error_number(error) not in (None, errno.ENOENT):
                raise translate(error, self._uri) from error
            if isinstance(error, TableNotFoundError):
                raise _NoLogYetError from error
            raise TableError(f"{self._uri}: the Delta log cannot be used ({reason_of(error)})") from error
        except OSError as error:
            raise translate(error, self._uri) from error


def files_of(snapshot: DeltaTable | None) -> list[tuple[str, str]]:
    """Returns (path relative to the table, run_id) of every file of a snapshot; none without a snapshot."""
    if snapshot is None:
        return []
    actions = pa.table(snapshot.get_add_actions(flatten=True))
    return list(zip(actions["path"].to_pylist(), actions[f"partition.{RUN_COLUMN}"].to_pylist(), strict=True))


class _NoLogYetError(Exception):
    """There is no Delta log at the table's path."""


class _CommitConflictError(Exception):
    """Another writer's transaction took the version."""


def _entry(version: int, content: bytes, uri: str) -> Entry:
    try:
        actions = [json.loads(line) for line in content.splitlines() if line.strip()]
        states = {action["txn"]["appId"]: int(action["txn"]["version"]) for action in actions if "txn" in action}
        notes = [action["commitInfo"].get(NOTE) for action in actions if "commitInfo" in action]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TableError(f"{uri}: is not an entry of a Delta log ({error})") from error
    return Entry(version, states, next((note for note in notes if isinstance(note, dict)), {}))


def _delta_schema() -> deltalake.Schema:
    return deltalake.Schema.from_arrow(TABLE_SCHEMA)


def _add_action(run_id: str, file: DataFile) -> AddAction:
    # Only the row count: partial min/max statistics make filters through pyarrow and DuckDB return nothing (measured).
    now_ms = int(time.time() * 1000)
    return AddAction(file.path, file.bytes, {RUN_COLUMN: run_id}, now_ms, True, json.dumps({"numRecords": file.rows}))
