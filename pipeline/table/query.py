"""SQL queries over a table: DuckDB with four views, offline, for local and object storage alike.

Rows are read through pyarrow from the file list of the log, so no DuckDB extension has to be downloaded, and a query sees a
single snapshot. Projections and filters are pushed down to the Parquet files: counting instances by category reads no masks.

A query can access only the views: the connection has no access to files or the network, and its settings are locked, so `COPY
... TO`, `read_csv` and `ATTACH` fail. `masklake query --output` writes results.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset
from duckdb.sqltypes import DuckDBPyType

from masklake.model.errors import MaskLakeError
from masklake.pipeline.errors import QueryError
from masklake.pipeline.images.status import Status
from masklake.pipeline.storage.errors import os_error_number
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.duckdb_connection import connected
from masklake.pipeline.table.schema import RUN_COLUMN, TABLE_SCHEMA
from masklake.pipeline.table.table import open_table

BATCH_ROWS = 10_000

_COLUMNS = ", ".join(TABLE_SCHEMA.names)

_DETECTIONS = """
CREATE VIEW {name} AS
SELECT uri, image_id, {run}, model_id, label_id, labelled_at,
       instances[k].category_id AS category_id, instances[k].category AS category, instances[k].score AS score,
       instances[k].box.x1 AS x1, instances[k].box.y1 AS y1, instances[k].box.x2 AS x2, instances[k].box.y2 AS y2,
       instances[k].area AS area, rles[k] AS rle, keypoints[k] AS keypoints, width, height
FROM (SELECT *, unnest(range(1, len(instances) + 1)) AS k FROM {images})
"""
# An index is unnested instead of the lists: masks are read only if a query names them (measured: 0.5 MB instead of 31 MB).

_CURRENT_IMAGES = """
CREATE VIEW current_images AS
SELECT {columns} FROM images AS i
SEMI JOIN (
    SELECT max_by(
        struct_pack(run := {run}, image_id := image_id),
        struct_pack(ok := status = '{ok}', labelled_at := labelled_at, run := {run}, image_id := image_id)
    ) AS newest
    FROM images GROUP BY uri
) AS c ON i.{run} = c.newest.run AND i.image_id = c.newest.image_id
"""
# The aggregation needs narrow columns only; the join keeps masks out of it, and unread unless a query names them.

VIEWS = ("images", "detections", "current_images", "current_detections")
"""images: one row per image and run. detections: one row per instance. current_*: for each uri, the newest row with status ok,
or else the newest row.
"""


@contextmanager
def connect_duckdb(storage: Storage, table_uri: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """Context manager for a DuckDB connection with the four views over the table's newest snapshot.

    Raises TableError if there is no table or no committed run, or if a newer version wrote it. Queries raise DuckDB's own
    errors.
    """
    dataset = open_table(storage, table_uri).dataset()
    with tempfile.TemporaryDirectory(prefix="masklake-query-") as spill, connected() as connection:
        connection.execute("SET temp_directory = $folder", {"folder": spill})
        connection.execute("SET TimeZone = 'UTC'")
        _create_views(connection, dataset)
        for setting in (
            "python_enable_replacements = false",  # a table name must not find a variable of this process
            "autoinstall_known_extensions = false",
            "autoload_known_extensions = false",
            "enable_external_access = false",
            "lock_configuration = true",
        ):
            connection.execute(f"SET {setting}")
        yield connection


def _create_views(connection: duckdb.DuckDBPyConnection, dataset: pyarrow.dataset.Dataset) -> None:
    # Not `register`, whose name would appear beside the views in SHOW TABLES.
    connection.from_arrow(dataset).project(_COLUMNS).create_view("images")
    connection.execute(_DETECTIONS.format(name="detections", images="images", run=RUN_COLUMN))
    connection.execute(_CURRENT_IMAGES.format(columns=_COLUMNS, run=RUN_COLUMN, ok=Status.OK))
    connection.execute(_DETECTIONS.format(name="current_detections", images="current_images", run=RUN_COLUMN))


Errors = Callable[[duckdb.DuckDBPyConnection], AbstractContextManager[None]]


class Answer:
    """A result as record batches, for results larger than memory. Iterating raises QueryError if the query fails at a row."""

    def __init__(self, reader: pa.RecordBatchReader, connection: duckdb.DuckDBPyConnection, errors: Errors) -> None:
        self.schema: pa.Schema = reader.schema
        self._reader = reader
        self._connection = connection
        self._errors = errors

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        with self._errors(self._connection):  # errors of the query only, not those of the caller's loop
            yield from self._reader

    def read_all(self) -> pa.Table:
        """Returns all rows in memory."""
        return pa.Table.from_batches(self, self.schema)


def query(storage: Storage, table_uri: str, sql: str, parameters: Mapping[str, Any] | None = None) -> pa.Table:
    """Returns the whole result in memory.

    parameters: values for `$name` in the SQL. Raises QueryError with DuckDB's message and the list of views, TableError if
    there is no table or no committed run, and the storage's errors.
    """
    with stream(storage, table_uri, sql, parameters) as answer:
        return answer.read_all()


@contextmanager
def stream(storage: Storage, table_uri: str, sql: str, parameters: Mapping[str, Any] | None = None) -> Iterator[Answer]:
    """Context manager for the result as record batches, valid inside the block. Raises the errors of `query`."""
    errors = partial(_query_errors, storage, table_uri)
    with connect_duckdb(storage, table_uri) as connection:
        with errors(connection):
            check_statement(connection, sql)
            relation = connection.sql(sql, params=dict(parameters or {}))
            if relation is None:
                raise QueryError(f"the query returns no rows; select from {', '.join(VIEWS)}")
            relation = with_exact_values(relation)
            answer = Answer(relation.to_arrow_reader(BATCH_ROWS), connection, errors)
        yield answer


_AS_TEXT = frozenset({"uhugeint", "bignum", "time with time zone", "time_ns", "interval", "bit", "variant", "geometry"})
"""DuckDB types that Arrow or Python lacks: UHUGEINT would be signed, TIMETZ would lose its zone, BIT and BIGNUM would be raw
bytes.
"""

_NESTED = frozenset({"struct", "tuple", "list", "array", "map", "union"})


def with_exact_values(relation: duckdb.DuckDBPyRelation) -> duckdb.DuckDBPyRelation:
    """Returns the relation with values that Arrow cannot represent exactly converted to DuckDB's own text (`::VARCHAR`)."""
    kinds = [exact_type(kind) for kind in relation.types]
    if kinds == [str(kind) for kind in relation.types]:
        return relation
    columns = [
        f"CAST(#{number} AS {kind}) AS {_quoted(name)}"
        for number, (name, kind) in enumerate(zip(relation.columns, kinds, strict=True), start=1)
    ]
    return relation.project(", ".join(columns))


def exact_type(kind: DuckDBPyType) -> str:
    """Returns the SQL type with VARCHAR in place of each of `_AS_TEXT`, also within nested types; other types are unchanged."""
    if kind.id in _AS_TEXT:
        return "VARCHAR"
    if kind.id not in _NESTED:
        return str(kind)
    members = [(name, member) for name, member in kind.children if isinstance(member, DuckDBPyType)]
    exact = [exact_type(member) for _, member in members]
    if kind.id == "union":  # values lose their member's type in Arrow, so only plain members can be converted
        return "VARCHAR" if any(member.id in _AS_TEXT | _NESTED for _, member in members) else str(kind)
    if exact == [str(member) for _, member in members]:
        return str(kind)
    if kind.id == "struct":
        return f"STRUCT({', '.join(f'{_quoted(name)} {text}' for (name, _), text in zip(members, exact, strict=True))})"
    if kind.id == "array":
        return f"{exact[0]}[{dict(kind.children)['size']}]"
    return f"{exact[0]}[]" if kind.id == "list" else f"{kind.id.upper()}({', '.join(exact)})"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


_READING = frozenset({"SELECT", "EXPLAIN", "PRAGMA", "CALL", "MULTI"})
"""Types of DuckDB statements that only read. SHOW, DESCRIBE and SUMMARIZE are SELECT; a PIVOT of unknown values is MULTI."""


def check_statement(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Raises QueryError unless `sql` is a single statement that reads. Other statements do no harm, but their result would
    mislead.
    """
    statements = connection.extract_statements(sql)
    if not statements:
        raise QueryError(f"the query is empty; select from {', '.join(VIEWS)}")
    if len(statements) > 1:
        raise QueryError("these are several statements, of which only one answer could be given; ask one at a time")
    kind = statements[0].type.name
    if kind not in _READING:
        raise QueryError(f"{kind} statements are refused: a query reads the table and changes nothing. {ELSEWHERE}")


ELSEWHERE = "Write the answer of a SELECT to a file with --output (`masklake query --help` lists the formats)."


def _a_data_file(storage: Storage, table_uri: str) -> str | None:
    """Returns one of the files that a query reads, to obtain the reason of a refusal; None if the log cannot be read either."""
    try:
        files = open_table(storage, table_uri).files()
    except MaskLakeError:
        return None
    return storage.join(table_uri, files[0][0]) if files else None


@contextmanager
def _query_errors(storage: Storage, table_uri: str, connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    try:
        yield
    except (duckdb.Error, pa.ArrowException, OSError) as error:  # a reader raises DuckDB's errors as Arrow's
        if _is_of_storage(error):
            with storage.reading(table_uri, probe=_a_data_file(storage, table_uri)):
                raise OSError(str(error)) from error
        if isinstance(error, duckdb.PermissionException):
            remedy = f"A query reads the table and nothing else. {ELSEWHERE}"
        else:
            remedy = describe_views(connection.cursor())
        raise QueryError(f"{error}\n{remedy}".rstrip()) from error


def _is_of_storage(error: BaseException) -> bool:
    """Returns whether the table's files could not be read, which DuckDB rewords, and the SQL is not at fault."""
    text = str(error)
    return "reading the Arrow source failed" in text and ("IOError" in text or os_error_number(error) is not None)


def describe_views(connection: duckdb.DuckDBPyConnection) -> str:
    """Returns the views and their columns, one kind of view per line."""
    lines = []
    for view in VIEWS[:2]:
        columns = connection.execute(
            "SELECT column_name FROM duckdb_columns() WHERE table_name = $view ORDER BY column_index", {"view": view}
        ).fetchall()
        lines.append(f"{view} and current_{view}: {', '.join(name for (name,) in columns)}")
    return "The views and their columns are\n  " + "\n  ".join(lines)
