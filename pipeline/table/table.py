"""The table: a Delta Lake of Parquet files with one row per image, committed one run at a time (design, section 3.2).

    <table>/_delta_log/                   one transaction per run
    <table>/run=<run_id>/*.parquet        data; nothing else has the suffix
    <table>/_masklake/table.json          schema version
    <table>/_masklake/open-<key>.json     the uncommitted run of a label_id and input
    <table>/_masklake/<run_id>/           manifest, lease, run record

Readers see a run entirely or not at all: they follow the log, which gains all files of a run in one transaction.
"""

from __future__ import annotations

import json
import logging
import random
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow.parquet as pq
from deltalake import DeltaTable
from pydantic import ValidationError

from masklake.model.errors import ConfigError
from masklake.model.wording import counted
from masklake.pipeline.errors import InputNotFoundError, StorageError, TableError
from masklake.pipeline.inputs.suffixes import IMAGE_SUFFIXES
from masklake.pipeline.storage.literal_keys import is_plain
from masklake.pipeline.storage.nearby import first_missing, folder_within, similar_folder
from masklake.pipeline.storage.retry import patiently
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import canonical, parse_uri
from masklake.pipeline.table.log import COMMITTED, DROPPED, DataFile, DeltaLog
from masklake.pipeline.table.runs import RunRecord, input_key, valid_run_id
from masklake.pipeline.table.schema import RUN_COLUMN, SCHEMA_VERSION, TABLE_SCHEMA

if TYPE_CHECKING:
    import pyarrow.dataset

logger = logging.getLogger(__name__)

COMMIT_ATTEMPTS = 20

T = TypeVar("T")


def open_table(storage: Storage, uri: str) -> Table:
    """Returns the table at `uri`, which need not exist yet.

    Raises TableError if something else is there or a newer version wrote the table, ConfigError for a path that cannot hold a
    table.
    """
    table = Table(storage, canonical(uri))
    if re.search(r"%[0-9A-Fa-f]{2}|[\\\n]", table.uri):
        raise ConfigError(f"{table.uri}: Delta keeps no table at a path with %XX, a backslash or a line break; give another")
    at = parse_uri(table.uri)
    if not at.is_local and at.key and not is_plain(at.key):
        raise ConfigError(
            f"{table.uri!r}: no table can be at a key with `//`, `/./`, `/../` or a control character; give another"
        )
    if storage.is_file(table.uri):
        expanded = " (a pattern such as 'photos/*.jpg' needs quotes, or the shell expands it)"
        hint = expanded if table.uri.lower().endswith(IMAGE_SUFFIXES) else ""
        raise TableError(f"{table.uri}: is a file; a table is a folder, give another path{hint}")
    version = table.schema_version()
    if version is None and storage.exists(storage.join(table.uri, "_delta_log")):
        raise TableError(f"{table.uri}: is a Delta table that MaskLake did not write; give another path")
    if version is not None and version > SCHEMA_VERSION:
        raise TableError(
            f"{table.uri}: has schema version {version}, this MaskLake reads up to {SCHEMA_VERSION}; install a newer MaskLake"
        )
    return table


class Table:
    """One table. `open_table` creates it after checking what is there. Holds no connection and no snapshot."""

    def __init__(self, storage: Storage, uri: str) -> None:
        self.storage = storage
        self.uri = uri
        self.log = DeltaLog(storage, uri)

    def __repr__(self) -> str:
        return f"Table({self.uri!r})"

    # -- places --------------------------------------------------------------------------------------------------------

    def run_folder(self, run_id: str) -> str:
        """Returns the folder of a run's data files."""
        return self.storage.join(self.uri, f"{RUN_COLUMN}={valid_run_id(run_id)}")

    def private(self, run_id: str, *names: str) -> str:
        """Returns a path in `_masklake/<run_id>/`, which holds what a run needs to resume and is not part of the table."""
        return self.storage.join(self.uri, "_masklake", valid_run_id(run_id), *names)

    def lease_uri(self, name: str) -> str:
        """Returns the URI of the lease of a run, or of upkeep."""
        return self.storage.join(self.uri, "_masklake", name, "lease")

    def manifest_uri(self, run_id: str) -> str:
        """Returns the URI of a run's frozen manifest: Parquet with another suffix, so that `**/*.parquet` finds only images."""
        return self.private(run_id, "images.manifest")

    def find_manifest(self, run_id: str) -> str:
        """Returns the URI of an existing frozen manifest; earlier versions named it `manifest.parquet`."""
        earlier = self.private(run_id, "manifest.parquet")
        return earlier if self.storage.is_file(earlier) else self.manifest_uri(run_id)

    def _schema_uri(self) -> str:
        return self.storage.join(self.uri, "_masklake", "table.json")

    def _open_run_uri(self, key: str) -> str:
        return self.storage.join(self.uri, "_masklake", f"open-{key}.json")

    # -- state ---------------------------------------------------------------------------------------------------------

    def schema_version(self) -> int | None:
        """Returns the version in `_masklake/table.json`; None if there is no table yet."""
        try:
            content = self.storage.read_bytes(self._schema_uri())
        except InputNotFoundError:
            return None
        try:
            return int(json.loads(content)["schema_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise TableError(
                f"{self._schema_uri()}: is not a table's description ({error}); restore it or remove the table"
            ) from error

    def initialise(self) -> None:
        """Writes the table's description if there is none. The Delta log is created by the first commit."""
        if self.schema_version() is None:
            description = {"schema_version": SCHEMA_VERSION, "created_at": datetime.now(UTC).isoformat()}
            self.storage.write_bytes(self._schema_uri(), json.dumps(description, indent=1).encode())

    def delta(self) -> DeltaTable | None:
        """Returns the newest snapshot, or None before the first commit."""
        return self.log.snapshot()

    def version(self) -> int:
        """Returns the version of the newest snapshot; -1 before the first commit."""
        delta = self.delta()
        return delta.version() if delta else -1

    def state(self, run_id: str) -> int | None:
        """Returns `COMMITTED` or `DROPPED` (of `pipeline.table.log`); None for a run that the log does not contain."""
        delta = self.delta()
        return None if delta is None else delta.transaction_version(run_id)

    def is_committed(self, run_id: str) -> bool:
        """Returns whether the table holds this run: it was committed, and not dropped."""
        return self.state(run_id) == COMMITTED

    def files(self) -> list[tuple[str, str]]:
        """Returns (path relative to the table, run_id) of every file of the newest snapshot; none before the first commit."""
        return self.log.files()

    def dataset(self) -> pyarrow.dataset.Dataset:
        """Returns the newest snapshot as a pyarrow dataset of TABLE_SCHEMA. Raises TableError before the first commit.

        It is built from the file list of the log, never from a listing of folders, which also hold unfinished files.
        """
        files = self.files()
        if not files:
            raise TableError(self.why_empty())
        return self.dataset_of(files)

    def dataset_of(self, files: Sequence[tuple[str, str]]) -> pyarrow.dataset.Dataset:
        """Returns data files, given as (path relative to the table, run_id), as a dataset of TABLE_SCHEMA."""
        import pyarrow.dataset  # imports pandas, which a worker that only writes does not need

        filesystem, root = self.storage.arrow(self.uri)
        parquet = pyarrow.dataset.ParquetFileFormat()
        run = pyarrow.dataset.field(RUN_COLUMN)
        fragments = [
            parquet.make_fragment(f"{root}/{path}", filesystem=filesystem, partition_expression=run == run_id)
            for path, run_id in files
        ]
        return pyarrow.dataset.FileSystemDataset(fragments, TABLE_SCHEMA, parquet, filesystem)

    def why_empty(self) -> str:
        """Returns why nothing can be read here, with a suggestion."""
        storage = self.storage
        if self.schema_version() is not None:
            return f"{self.uri}: holds no committed run yet; label images into it first (masklake label)"
        if storage.exists(self.uri):
            meant = folder_within(storage, self.uri, lambda uri: is_table(storage, uri))
            return f"{self.uri}: is a folder and no table; {f'did you mean {meant}?' if meant else 'check the path'}"
        missing = first_missing(storage, self.uri)
        meant = similar_folder(storage, missing, self.uri, lambda uri: is_table(storage, uri))
        which = "" if missing == self.uri else f" {missing}"
        return f"{self.uri}: the folder{which} does not exist; {f'did you mean {meant}?' if meant else 'check the path'}"

    # -- runs ----------------------------------------------------------------------------------------------------------

    def run_record(self, run_id: str) -> RunRecord | None:
        """Returns the record of a run, or None if no such run was planned."""
        uri = self.private(run_id, "run.json")
        try:
            return RunRecord.model_validate_json(self.storage.read_bytes(uri))
        except InputNotFoundError:
            return None
        except ValidationError as error:
            raise TableError(
                f"{uri}: is not a run's record ({counted(error.error_count(), 'error')}); restore or remove it"
            ) from error

    def private_files(self) -> dict[str, set[str]]:
        """Returns the names of the files in each folder of `_masklake/`, by the folder's name; none if there is no table."""
        found: dict[str, set[str]] = {}
        for row in self._below(self.storage.join(self.uri, "_masklake")):
            folder, _, name = row["uri"].rpartition("/")
            found.setdefault(folder.rpartition("/")[2], set()).add(name)
        return found

    def update_record(self, run_id: str, **changes: Any) -> None:
        """Changes fields of a run's record, if there is one. The caller holds the run's lease, or that of upkeep."""
        record = self.run_record(run_id)
        if record is not None:
            self._write_record(RunRecord.model_validate(record.model_dump() | changes))

    def begin_run(self, record: RunRecord) -> None:
        """Records a planned run, so that a restart with the same input and label_id continues it."""
        self._write_record(record)
        pointer = json.dumps({"run_id": record.run_id}).encode()
        self.storage.write_bytes(self._open_run_uri(input_key(record.label_id, record.input)), pointer)

    def find_open_run(self, label_id: str, spec: dict[str, Any]) -> RunRecord | None:
        """Returns the planned, uncommitted run of this label_id and input, or None. Closes a run whose driver died right after
        its commit.
        """
        uri = self._open_run_uri(input_key(label_id, spec))
        try:
            pointer = self.storage.read_bytes(uri)
        except InputNotFoundError:
            return None
        try:
            run_id = valid_run_id(json.loads(pointer)["run_id"])
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            raise TableError(f"{uri}: does not name a run ({error}); remove it, and the input is planned anew") from error
        record = self.run_record(run_id)
        state = None if record is None else self.state(record.run_id)
        if record is None or state is None:
            return record
        if state == COMMITTED:
            self._close_run(record)
        else:
            self.storage.delete(uri)  # it was committed, and dropped before anybody closed it
        return None

    def _write_record(self, record: RunRecord) -> None:
        self.storage.write_bytes(self.private(record.run_id, "run.json"), record.model_dump_json(indent=1).encode())

    def _close_run(self, record: RunRecord) -> None:
        self.tidy(record.run_id)
        self._write_record(record.model_copy(update={"status": "committed", "committed_at": datetime.now(UTC)}))
        self.storage.delete(self._open_run_uri(input_key(record.label_id, record.input)))

    def run_files(self, run_id: str) -> list[DataFile]:
        """Returns the Parquet files in a run's folder with their row counts, read from their footers in parallel."""
        data = self._listed(run_id)
        with ThreadPoolExecutor(16) as pool:
            counts = pool.map(lambda row: self._count_rows(row["uri"]), data)
            return [
                DataFile(row["uri"][len(self.uri) + 1 :], row["bytes"], count) for row, count in zip(data, counts, strict=True)
            ]

    def _listed(self, run_id: str) -> list[dict[str, Any]]:
        """Returns OBJECT_SCHEMA rows of the Parquet files in a run's folder, by name."""
        return [row for row in self._below(self.run_folder(run_id)) if row["uri"].endswith(".parquet")]

    def _below(self, folder: str) -> list[dict[str, Any]]:
        """Returns OBJECT_SCHEMA rows of the files in a folder, by name; none if there is no folder."""
        try:
            batches = list(self.storage.list_objects(folder))
        except InputNotFoundError:
            return []  # a run that wrote nothing has no folder
        return sorted((row for batch in batches for row in batch.to_pylist()), key=lambda row: row["uri"])

    def _count_rows(self, uri: str) -> int:
        filesystem, path = self.storage.arrow(uri)
        with self.storage.reading(uri):
            return int(pq.read_metadata(path, filesystem=filesystem).num_rows)

    def commit_run(
        self, run_id: str, files: Sequence[DataFile] | None = None, confirm: Callable[[], None] = lambda: None
    ) -> bool:
        """Adds a run's files to the table in one transaction. Returns False if the log already contains the run.

        files: default, every Parquet file in the run's folder. Files without rows are left out. confirm: called right before
        each attempt; raises if this process may no longer write the run (`Lease.confirm`).

        Each attempt commits on top of the version that it has read, so the check that the run is absent still holds at the
        moment of the commit. If the reply to a commit is lost, the log is read again, and the commit is repeated only if it is
        not there.
        """
        chosen = [file for file in (self.run_files(run_id) if files is None else files) if file.rows]
        self.initialise()
        self.storage.sync(self.storage.join(self.uri, file.path) for file in chosen)

        def attempt(lost: bool) -> bool | None:
            delta = self.log.snapshot_or_created()
            state = delta.transaction_version(run_id)
            if state == DROPPED:
                raise TableError(f"run {run_id} was dropped from {self.uri}; run the command again, which plans a new run")
            if state is not None:
                self._finish(run_id)
                return lost  # a commit whose reply was lost is our own, for a run has one writer
            confirm()
            if not self.log.try_append(delta, run_id, chosen):
                return None
            self._finish(run_id)
            return True

        return self._transact(attempt)

    def drop_runs(
        self, choose: Callable[[DeltaTable], list[str]], by: str, confirm: Callable[[], None] = lambda: None
    ) -> list[str]:
        """Removes runs from the table in one transaction, and returns their ids. Their files stay where they are (`vacuum`).

        choose: returns the committed runs to drop, given the newest snapshot, or raises. It is called for each attempt, so that
        its answer is true of the version that the transaction replaces. by: user@host, for the records. confirm: as for
        `commit_run`.
        """
        tried: list[str] = []
        note = {"dropped_at": datetime.now(UTC).isoformat(), "dropped_by": by}

        def attempt(lost: bool) -> list[str] | None:
            delta = self.log.snapshot_or_created()
            if lost and tried and all(delta.transaction_version(run_id) == DROPPED for run_id in tried):
                return tried
            tried[:] = choose(delta)
            confirm()
            return tried if not tried or self.log.try_drop(delta, tried, note) else None

        dropped = self._transact(attempt)
        for run_id in dropped:
            patiently(partial(self.update_record, run_id, **note))
        return dropped

    def _transact(self, attempt: Callable[[bool], T | None]) -> T:
        """Repeats `attempt` until it returns a result. It returns None if another writer took the version.

        attempt: called with whether the reply to the previous attempt was lost, so that it may have succeeded.
        """
        lost: StorageError | None = None  # of the last attempt, which may have succeeded
        for number in range(COMMIT_ATTEMPTS):
            if number:
                time.sleep(random.uniform(0, 0.1 * 2 ** min(number, 5)))
            try:
                result = attempt(lost is not None)
                if result is not None:
                    return result
                lost = None
            except StorageError as error:
                if not error.may_pass:
                    raise
                lost = error
        if lost is not None:
            raise lost
        raise TableError(f"{self.uri}: other writers won {COMMIT_ATTEMPTS} commits in a row; run the command again")

    def _finish(self, run_id: str) -> None:
        record = self.run_record(run_id)
        if record is not None:
            self._close_run(record)

    def tidy(self, run_id: str) -> None:
        """Deletes files in a committed run's folders that the log does not list, so that readers of the folder find each row
        once.

        These are files of workers that outlived their driver, and files that earlier versions wrote beside the data.
        """
        kept = {path for path, run in self.files() if run == run_id}
        present = {row["uri"][len(self.uri) + 1 :] for row in self._listed(run_id)} if kept else set()
        if not kept <= present:  # the store lists with a delay, or names files differently from the log
            logger.warning("run %s: its folder does not list all of its files yet, so nothing is removed from it", run_id)
            return
        leftovers = [self.storage.join(self.uri, path) for path in present - kept]
        leftovers += [row["uri"] for row in self._below(self.private(run_id)) if row["uri"].endswith(".parquet")]
        for uri in leftovers:
            self.storage.delete(uri)


def is_table(storage: Storage, uri: str) -> bool:
    """Returns whether `uri` holds a MaskLake table (of any version)."""
    return not parse_uri(uri).key.endswith(".parquet") and Table(storage, canonical(uri)).schema_version() is not None
