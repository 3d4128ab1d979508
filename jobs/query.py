"""`masklake query`: the result of a query on the terminal, in a pipe, or in a file whose suffix selects the format."""

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
STDOUT = ("-", "/dev/stdout")
"""Outputs that are not files: the result goes to stdout, and no report follows it."""


class QueryReport(BaseModel):
    """What was written. rows: number of rows of the result; the file holds all of them."""

    model_config = ConfigDict(frozen=True)

    output: str
    format: Format
    rows: int


def run(storage: Storage, table: str, sql: str, output: str, form: Format | None = None) -> QueryReport:
    """Writes the whole result to the file or object `output`, which appears when it is complete. form: None uses the suffix.

    Raises QueryError, TableError, ConfigError (an unknown format, a place inside the table) and the storage's errors.
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
    """Writes the result to stdout; returns the number of rows. A table is truncated on a terminal, and complete in a pipe."""
    if form is Format.PARQUET:
        raise ConfigError("--format parquet needs a file: name it with --output")
    with stream(storage, table, sql) as answer:
        if form is Format.TABLE and sys.stdout.isatty():
            return write_shown_table(answer, sys.stdout)
        return write_text(answer, form, sys.stdout)


def read_sql(sql: str) -> str:
    """Returns the SQL itself, or the content of stdin for `-`."""
    return sys.stdin.read() if sql == STDIN else sql
