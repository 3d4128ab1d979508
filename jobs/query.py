"""`masklake query`: an answer on the terminal, in a pipe, or in a file whose suffix says its format."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from masklake.jobs.terminal.answers import GZIP, Format, format_of, write_file, write_shown_table, write_text
from masklake.jobs.terminal.output import check_output
from masklake.model.errors import ConfigError
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.query import stream

STDIN = "-"


class QueryReport(BaseModel):
    """What was written. rows: of the answer, all of which are in the file."""

    model_config = ConfigDict(frozen=True)

    output: str
    format: Format
    rows: int


def run(storage: Storage, table: str, sql: str, output: str, form: Format | None = None) -> QueryReport:
    """Write the whole answer to the file or object `output`, which appears when it is complete. form: None is the suffix's.

    Raises QueryError, TableError, ConfigError (a name that says no format, a place inside the table) and the storage's errors.
    """
    check_output(output, table)
    form = format_of(output, form)
    with (
        stream(storage, table, sql) as answer,
        tempfile.TemporaryDirectory(prefix="masklake-query-") as folder,
    ):
        path = Path(folder, "answer")
        rows = write_file(answer, form, path, output.lower().endswith(GZIP))
        storage.upload(path, output)
    return QueryReport(output=output, format=form, rows=rows)


def show(storage: Storage, table: str, sql: str, form: Format = Format.TABLE) -> int:
    """Write the answer to stdout; the number of its rows. A table is cut to the terminal on a terminal, and whole in a pipe."""
    if form is Format.PARQUET:
        raise ConfigError("--format parquet needs a file: name it with --output")
    with stream(storage, table, sql) as answer:
        if form is Format.TABLE and sys.stdout.isatty():
            return write_shown_table(answer, sys.stdout)
        return write_text(answer, form, sys.stdout)


def read_sql(sql: str) -> str:
    """The SQL itself, or what stdin holds where it is `-`."""
    return sys.stdin.read() if sql == STDIN else sql
