"""Lists the runs of a table, with their state, results and cost, from their records, the log and the leases, without a scan."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from masklake.pipeline.errors import TableError
from masklake.pipeline.labelling.live_leases import Held, held
from masklake.pipeline.table.log import COMMITTED, DROPPED, files_of
from masklake.pipeline.table.runs import RunRecord
from masklake.pipeline.table.table import Table

READERS = 32


class RunState(StrEnum):
    """The state of a run."""

    RUNNING = "running"
    """A driver holds its lease."""
    INTERRUPTED = "interrupted"
    """Neither committed nor running: the same `label` command continues it."""
    COMMITTED = "committed"
    """Its rows are in the table."""
    DROPPED = "dropped"
    """Its rows were in the table, and were removed from it."""


class RunInfo(BaseModel):
    """One run of a table. A field is None if it is not known (yet), as for runs of earlier versions."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    state: RunState
    images: int | None = Field(default=None, description="Number of images in its list.")
    statuses: dict[str, int] | None = Field(default=None, description="Images by status, once it is committed.")
    seconds: float | None = Field(default=None, description="Duration of labelling, over all starts.")
    images_per_s: float | None = Field(default=None, description="images / seconds, once it is committed.")
    gpu_hours: float | None = Field(default=None, description="Hours of labelling times GPUs, over all starts.")
    cost: float | None = Field(
        default=None, description="Hours of labelling times --price-per-hour; None if a start had no price."
    )
    starts: int | None = Field(default=None, description="Number of calls of `label` that labelled images of this run.")
    model_id: str | None = None
    label_id: str | None = None
    input: str | None = Field(default=None, description="The input's URI.")
    by: str | None = Field(default=None, description="user@host of the last start.")
    held_by: str | None = Field(default=None, description="Host and process of the driver that is writing it.")
    planned_at: datetime | None = None
    started_at: datetime | None = Field(default=None, description="Time of the first start.")
    committed_at: datetime | None = None
    dropped_at: datetime | None = None
    dropped_by: str | None = None


def list_runs(table: Table) -> list[RunInfo]:
    """Returns the table's runs, in the order in which they were planned. Raises TableError if there is no table."""
    if table.schema_version() is None:
        raise TableError(table.why_empty())
    records = all_records(table)
    # The log is read after the records: a run that is committed in between is then committed, and not interrupted.
    delta = table.delta()
    in_table = {run_id for _, run_id in files_of(delta)}
    states: dict[str, int | None] = dict.fromkeys(in_table, COMMITTED)
    for record in records:
        if record.run_id not in states:
            known = DROPPED if record.dropped_at is not None else None
            states[record.run_id] = known or (None if delta is None else delta.transaction_version(record.run_id))
    leases = held(table, [record.run_id for record in records if states[record.run_id] is None])
    infos = [_info(table, record, states[record.run_id], leases.get(record.run_id)) for record in records]
    unknown = sorted(in_table - {record.run_id for record in records})  # their records were removed
    return [RunInfo(run_id=run_id, state=RunState.COMMITTED) for run_id in unknown] + infos


def all_records(table: Table) -> list[RunRecord]:
    """Returns the records of all runs, in the order in which they were planned."""
    names = [name for name, files in table.private_files().items() if "run.json" in files]
    with ThreadPoolExecutor(READERS) as pool:
        found = [record for record in pool.map(table.run_record, names) if record is not None]
    return sorted(found, key=lambda record: (record.planned_at, record.run_id))


def drop_of(table: Table, run_id: str) -> dict[str, Any]:
    """Returns dropped_at and dropped_by of a dropped run, from the log. Its record lacks them if the process that dropped it
    ended before it wrote them.
    """
    delta = table.delta()
    entries = table.log.entries(delta.version()) if delta is not None else iter(())
    note = next((entry.note for entry in entries if entry.states.get(run_id) == DROPPED), {})
    return {name: note.get(name) for name in ("dropped_at", "dropped_by")}


def _info(table: Table, record: RunRecord, state: int | None, lease: Held | None) -> RunInfo:
    alive = lease if lease is not None and lease.seems_alive else None
    if state is None:
        shown = RunState.RUNNING if alive else RunState.INTERRUPTED
    else:
        shown = RunState.COMMITTED if state == COMMITTED else RunState.DROPPED
    known = record.model_dump(include={"dropped_at", "dropped_by"})
    if shown is RunState.DROPPED and record.dropped_at is None:
        known = drop_of(table, record.run_id)
    seconds = record.seconds
    return RunInfo.model_validate(
        known
        | record.model_dump(include={"run_id", "images", "model_id", "label_id", "planned_at", "committed_at"})
        | {
            "state": shown,
            "statuses": None if state is None else record.statuses,
            "seconds": seconds,
            "images_per_s": record.images / seconds if seconds and state is not None else None,
            "gpu_hours": record.gpu_hours,
            "cost": record.cost,
            "starts": len(record.starts) or None,
            "input": record.input.get("uri"),
            "by": _last(record, "by"),
            "started_at": record.starts[0].started_at if record.starts else None,
            "held_by": str(alive.holder) if alive and state is None else None,
        }
    )


def _last(record: RunRecord, name: str) -> Any:
    return getattr(record.starts[-1], name) if record.starts else None


def known_names(runs: Sequence[RunInfo]) -> str:
    """Returns the newest committed runs, for a message about one that does not exist."""
    names = [run.run_id for run in runs if run.state is RunState.COMMITTED]
    return ", ".join(names[-5:]) or "none"
