"""`masklake runs`: lists the runs of a table, removes runs from it, and deletes files that are no longer needed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta

from pydantic import BaseModel, ConfigDict, Field

from masklake.model.wording import agreeing, counted
from masklake.pipeline.errors import TableError
from masklake.pipeline.labelling import upkeep
from masklake.pipeline.labelling.run_list import RunInfo, RunState, list_runs
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.table import Table, open_table

log = logging.getLogger(__name__)

Say = Callable[[str], None]


class RunsReport(BaseModel):
    """The runs of a table, in the order in which they were planned."""

    model_config = ConfigDict(frozen=True)

    table: str
    runs: list[RunInfo]


class DropReport(BaseModel):
    """Runs that were removed from a table, in the order of their commits."""

    model_config = ConfigDict(frozen=True)

    table: str
    dropped: list[str]
    dry_run: bool = Field(description="Whether the runs only would be removed, and nothing was changed.")


class VacuumReport(BaseModel):
    """Data files that were deleted or kept."""

    model_config = ConfigDict(frozen=True)

    table: str
    files: int
    bytes: int
    kept_files: int = Field(description="Files that the table does not list, but that are younger than --older-than.")
    kept_bytes: int
    unfinished_files: int = Field(description="Files of runs that are not committed, which are never deleted.")
    dry_run: bool = Field(description="Whether the files only would be deleted, and nothing was changed.")


def run(storage: Storage, table: str) -> RunsReport:
    """Returns the runs of a table. Raises TableError if there is no table."""
    opened = open_table(storage, table)
    return RunsReport(table=opened.uri, runs=list_runs(opened))


def drop(storage: Storage, table: str, run: str, dry_run: bool = False, say: Say = log.info) -> DropReport:
    """Removes a run from a table (`upkeep.drop`)."""
    opened = _existing(storage, table)
    return DropReport(table=opened.uri, dropped=upkeep.drop(opened, run, dry_run=dry_run, on_wait=say), dry_run=dry_run)


def rollback(storage: Storage, table: str, run: str, dry_run: bool = False, say: Say = log.info) -> DropReport:
    """Removes the runs that were committed after a run (`upkeep.rollback`)."""
    opened = _existing(storage, table)
    return DropReport(table=opened.uri, dropped=upkeep.rollback(opened, run, dry_run=dry_run, on_wait=say), dry_run=dry_run)


def vacuum(storage: Storage, table: str, older_than: float = 7.0, dry_run: bool = False, say: Say = log.info) -> VacuumReport:
    """Deletes data files that a table does not list (`upkeep.vacuum`). older_than: days."""
    opened = _existing(storage, table)
    done = upkeep.vacuum(opened, timedelta(days=older_than), dry_run=dry_run, on_wait=say)
    return VacuumReport(table=opened.uri, dry_run=dry_run, **vars(done))


def _existing(storage: Storage, uri: str) -> Table:
    table = open_table(storage, uri)
    if table.schema_version() is None:
        raise TableError(table.why_empty())
    return table


# -- text --------------------------------------------------------------------------------------------------------------

HEADER = ("run", "state", "started (UTC)", "images", "time", "images/s", "GPU hours", "cost")
RUN_WIDTH = 24
"""Maximum width of the first column. A longer ID moves the rest of its own line to the right."""


def describe(report: RunsReport) -> str:
    """Returns the runs as a table, each with a line of numbers and lines of text below. It fits in 100 columns."""
    if not report.runs:
        return f"{report.table}: no runs"
    lines = [HEADER, *(_numbers(run) for run in report.runs)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    widths[0] = min(widths[0], RUN_WIDTH)
    shown = [_line(HEADER, widths)]
    for run, numbers in zip(report.runs, lines[1:], strict=True):
        shown.append(_line(numbers, widths))
        shown += [f"    {part}" for part in _words(run)]
    return "\n".join(shown)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    """Returns one line, with text aligned to the left and numbers to the right."""
    left = [cell.ljust(width) for cell, width in zip(cells[:3], widths[:3], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
    return "  ".join([*left, *right]).rstrip()


def _numbers(run: RunInfo) -> tuple[str, ...]:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return (
        run.run_id,
        run.state,
        _minute(run.started_at or run.planned_at),
        shown(run.images, ","),
        "" if run.seconds is None else str(timedelta(seconds=round(run.seconds))),
        shown(run.images_per_s, ",.1f"),
        shown(run.gpu_hours or None, ",.2f"),  # a zero on a CPU says nothing
        shown(run.cost, ",.2f"),
    )


def _words(run: RunInfo) -> list[str]:
    statuses = ", ".join(f"{count:,} {status}" for status, count in (run.statuses or {}).items() if count)
    who = " ".join(filter(None, (run.model_id, f"by {run.by}" if run.by else "")))
    dropped = " ".join(filter(None, ("dropped", _minute(run.dropped_at), f"by {run.dropped_by}" if run.dropped_by else "")))
    held = f"being written by {run.held_by}" if run.held_by else ""
    parts = (statuses, who, held, dropped if run.state is RunState.DROPPED else "")
    return [part for part in parts if part]


def _minute(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M}"


def describe_drop(report: DropReport) -> str:
    """Returns the report as one line of text."""
    if not report.dropped:
        return f"{report.table}: no run was committed after it; nothing to remove"
    verb = "would be dropped" if report.dry_run else "dropped"
    runs = agreeing(len(report.dropped), "run")
    return f"{report.table}: {verb}: {runs} {', '.join(report.dropped)}"


def describe_vacuum(report: VacuumReport) -> str:
    """Returns the report as one line of text."""
    verb = "would be deleted" if report.dry_run else "deleted"
    parts = [f"{report.table}: {counted(report.files, 'file')} ({_size(report.bytes)}) {verb}"]
    if report.kept_files:
        parts.append(f"{counted(report.kept_files, 'file')} ({_size(report.kept_bytes)}) younger than --older-than kept")
    if report.unfinished_files:
        parts.append(f"{counted(report.unfinished_files, 'file')} of unfinished runs kept")
    return ", ".join(parts)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
