"""Removes runs from a table, and deletes files that are no longer needed (docs/runs.md).

`drop` and `rollback` are one Delta transaction each. They delete no file, so queries of an earlier version continue. `vacuum`
deletes files and leaves the log as it is. All three raise LeaseHeldError while a lease of the table is held.

`vacuum` deletes only in the folders of runs that the log contains, committed or dropped. A run enters the log once and writes
nothing afterwards, so no file of a run that is being written is in danger, whatever a lease says.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from deltalake import DeltaTable

from masklake.model.wording import counted
from masklake.pipeline.errors import LeaseHeldError, RunNotFoundError
from masklake.pipeline.labelling.lease import UPKEEP, Lease, OnWait
from masklake.pipeline.labelling.live_leases import living
from masklake.pipeline.labelling.run_list import drop_of
from masklake.pipeline.table.log import COMMITTED, DROPPED, files_of
from masklake.pipeline.table.runs import this_user, valid_run_id
from masklake.pipeline.table.schema import RUN_COLUMN
from masklake.pipeline.table.table import Table

logger = logging.getLogger(__name__)

DELETERS = 16


def drop(table: Table, run_id: str, *, dry_run: bool = False, on_wait: OnWait = logger.warning) -> list[str]:
    """Removes a run from the table in one transaction; returns its id.

    The images that it labelled get back their rows of earlier runs, and the next `label` labels them again. dry_run: whether to
    check only. Raises RunNotFoundError unless the table holds the run, and LeaseHeldError while a lease is held.
    """
    valid_run_id(run_id)

    def choose(delta: DeltaTable) -> list[str]:
        _check_committed(table, delta, run_id)
        return [run_id]

    return _dropped(table, choose, dry_run, on_wait)


def rollback(table: Table, run_id: str, *, dry_run: bool = False, on_wait: OnWait = logger.warning) -> list[str]:
    """Removes all runs that were committed after `run_id` in one transaction; returns their ids, in the order of their commits.

    Runs that were dropped earlier stay dropped. Raises the errors of `drop`, and TableError if the log lacks the order.
    """
    valid_run_id(run_id)

    def choose(delta: DeltaTable) -> list[str]:
        _check_committed(table, delta, run_id)
        return committed_after(table, delta, run_id)

    return _dropped(table, choose, dry_run, on_wait)


def committed_after(table: Table, delta: DeltaTable, run_id: str) -> list[str]:
    """Returns the runs of a snapshot that were committed after one of its runs, in the order of their commits."""
    later: list[str] = []
    gone: set[str] = set()
    for entry in table.log.entries(delta.version()):  # newest first
        if entry.states.get(run_id) == COMMITTED:
            break
        gone |= {name for name, state in entry.states.items() if state == DROPPED}
        later += [name for name, state in entry.states.items() if state == COMMITTED and name not in gone]
    return later[::-1]


def _dropped(table: Table, choose: Callable[[DeltaTable], list[str]], dry_run: bool, on_wait: OnWait) -> list[str]:
    delta = table.delta()
    if delta is None:
        raise RunNotFoundError(f"{table.uri}: holds no committed run; see masklake runs {table.uri}")
    chosen = choose(delta)  # a wrong name is reported before the lease is taken
    if dry_run or not chosen:
        return chosen
    with _alone(table, on_wait) as confirm:
        return table.drop_runs(choose, this_user(), confirm)


def _check_committed(table: Table, delta: DeltaTable, run_id: str) -> None:
    state = delta.transaction_version(run_id)
    if state == COMMITTED:
        return
    see = f"see masklake runs {table.uri}"
    if state is not None:
        raise RunNotFoundError(f"run {run_id} was dropped from {table.uri} before; {see}")
    if table.run_record(run_id) is not None:
        raise RunNotFoundError(f"run {run_id} is not committed, so {table.uri} holds nothing of it; {see}")
    raise RunNotFoundError(f"{table.uri} has no run {run_id}; {see}")


@contextmanager
def _alone(table: Table, on_wait: OnWait) -> Iterator[Callable[[], None]]:
    """Context manager that holds the lease of upkeep, and yields a check to call right before each change.

    The check raises LeaseHeldError while another lease of the table is held.
    """
    with Lease.acquire(table.storage, table.uri, UPKEEP, on_wait=on_wait) as lease:

        def confirm() -> None:
            names = [name for name, files in table.private_files().items() if "lease" in files and name != UPKEEP]
            if alive := living(table, names, on_wait):
                others = f" and {counted(len(alive) - 1, 'other lease')}" if alive[1:] else ""
                raise LeaseHeldError(
                    f"run {alive[0].name} is being written by {alive[0].holder}{others}; "
                    f"runs are removed while nobody writes to {table.uri}: wait until it ends, or stop it"
                )
            lease.confirm()

        yield confirm


# -- vacuum ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vacuumed:
    """Data files that the table does not list: those that were deleted, those that are kept for queries of an earlier version,
    and those of unfinished runs.
    """

    files: int
    bytes: int
    kept_files: int
    kept_bytes: int
    unfinished_files: int


@dataclass(frozen=True)
class _File:
    path: str
    run_id: str
    bytes: int


def vacuum(table: Table, older_than: timedelta, *, dry_run: bool = False, on_wait: OnWait = logger.warning) -> Vacuumed:
    """Deletes data files that the table does not list, of runs that were dropped or committed at least `older_than` ago.

    Files of runs that the log does not contain are never touched. dry_run: whether to count only. Raises LeaseHeldError while a
    lease is held.
    """
    with _alone(table, on_wait) as confirm:
        confirm()
        unlisted, unfinished = _unlisted(table)
        now = datetime.now(UTC)
        since = {run_id: _finished_at(table, run_id) for run_id in {file.run_id for file in unlisted}}
        old = {run_id for run_id, at in since.items() if not older_than or (at is not None and now - at >= older_than)}
        chosen = [file for file in unlisted if file.run_id in old]
        kept = [file for file in unlisted if file.run_id not in old]
        if not dry_run:
            _delete(table, chosen)
    return Vacuumed(len(chosen), _size(chosen), len(kept), _size(kept), len(unfinished))


def _unlisted(table: Table) -> tuple[list[_File], list[_File]]:
    """Returns the data files that the newest snapshot does not list: of runs that the log contains, and of others.

    The folders are listed before the log is read, so that a file of a run that is committed in between is listed there.
    """
    present: dict[str, list[_File]] = defaultdict(list)
    for file in _data_files(table):
        present[file.run_id].append(file)
    delta = table.delta()
    in_log: dict[str, set[str]] = {}
    for path, run_id in files_of(delta):
        in_log.setdefault(run_id, set()).add(path)
    finished: list[_File] = []
    unfinished: list[_File] = []
    for run_id, files in present.items():
        listed = in_log.get(run_id, set())
        rest = [file for file in files if file.path not in listed]
        if not rest:
            continue
        if len(files) - len(rest) < len(listed):  # a store that lists late, or names files otherwise than the log
            logger.warning("run %s: its folder does not list all of its files, so nothing is removed from it", run_id)
        elif delta is None or (not listed and delta.transaction_version(run_id) is None):
            unfinished += rest
        else:
            finished += rest
    return finished, unfinished


def _data_files(table: Table) -> Iterator[_File]:
    """Yields the Parquet files in the folders of runs."""
    start = len(table.uri) + 1
    private = (table.storage.join(table.uri, "_masklake"), table.storage.join(table.uri, "_delta_log"))
    for batch in table.storage.list_objects(table.uri, enters=lambda folder: folder not in private):
        for row in batch.to_pylist():
            path = row["uri"][start:]
            folder, _, name = path.partition("/")
            if folder.startswith(f"{RUN_COLUMN}=") and name.endswith(".parquet"):
                yield _File(path, folder[len(RUN_COLUMN) + 1 :], row["bytes"])


def _finished_at(table: Table, run_id: str) -> datetime | None:
    """Returns when a run was dropped, or else committed; None if that is not recorded."""
    record = table.run_record(run_id)
    if record is not None and record.dropped_at is not None:
        return record.dropped_at
    if table.state(run_id) == DROPPED:
        at = drop_of(table, run_id)["dropped_at"]
        return datetime.fromisoformat(at) if at else None
    return None if record is None else record.committed_at


def _delete(table: Table, files: Sequence[_File]) -> None:
    with ThreadPoolExecutor(DELETERS) as pool:
        for _ in pool.map(lambda file: table.storage.delete(table.storage.join(table.uri, file.path)), files):
            pass


def _size(files: Sequence[_File]) -> int:
    return sum(file.bytes for file in files)
