"""The table's Delta log: its newest snapshot, the files that it lists, and transactions that add a run's files."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import deltalake
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from masklake.pipeline.errors import TableError
from masklake.pipeline.storage.errors import os_error_number, reason_of, translate
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.schema import RUN_COLUMN, TABLE_SCHEMA

# A checkpoint of the log is a Parquet file in the table: readers of `**/*.parquet` would count its rows as images. Without
# checkpoints, no entry of the log may be cleaned up.
_NO_CHECKPOINT = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)


@dataclass(frozen=True)
class DataFile:
    """A Parquet file in a run's folder. path: relative to the table."""

    path: str
    bytes: int
    rows: int


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
        delta = self.snapshot()
        if delta is None:
            return []
        actions = pa.table(delta.get_add_actions(flatten=True))
        return list(zip(actions["path"].to_pylist(), actions[f"partition.{RUN_COLUMN}"].to_pylist(), strict=True))

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
        actions: list[AddAction | RemoveAction] = [_add_action(run_id, file) for file in files]
        version = snapshot.version() + 1
        try:
            with self._translated():
                snapshot.create_write_transaction(
                    actions,
                    "append",
                    _delta_schema(),
                    partition_by=[RUN_COLUMN],
                    commit_properties=CommitProperties(max_commit_retries=0, app_transactions=[Transaction(run_id, 1)]),
                    post_commithook_properties=_NO_CHECKPOINT,
                )
        except _CommitConflictError:
            return False
        self._sync_log(version)
        return True

    def _sync_log(self, version: int) -> None:
        self._storage.sync([self._storage.join(self._uri, "_delta_log", f"{version:020}.json")])

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


class _NoLogYetError(Exception):
    """There is no Delta log at the table's path."""


class _CommitConflictError(Exception):
    """Another writer's transaction took the version."""


def _delta_schema() -> deltalake.Schema:
    return deltalake.Schema.from_arrow(TABLE_SCHEMA)


def _add_action(run_id: str, file: DataFile) -> AddAction:
    # Only the row count: partial min/max statistics make filters through pyarrow and DuckDB return nothing (measured).
    now_ms = int(time.time() * 1000)
    return AddAction(file.path, file.bytes, {RUN_COLUMN: run_id}, now_ms, True, json.dumps({"numRecords": file.rows}))
