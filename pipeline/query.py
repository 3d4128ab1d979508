"""SQL over a table: DuckDB with four views, offline, on local and object storage alike.

The rows come through pyarrow from the log's own file list, so no DuckDB extension has to be downloaded and a query sees one
snapshot. Projections and filters are pushed into the Parquet files: counting instances by category reads no mask.

A query cannot touch anything but the views: the connection has no access to files or the network and its settings are
locked, so `COPY ... TO`, `read_csv` and `ATTACH` fail. Write results with `masklake query --output`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.duck import connected
from pipeline.errors import QueryError
from pipeline.schema import RUN_COLUMN, TABLE_SCHEMA, Status
from pipeline.storage import Storage
from pipeline.table import open_table

BATCH_ROWS = 10_000

_FILES = "_table"  # the pyarrow dataset behind the views

_COLUMNS = ", ".join(TABLE_SCHEMA.names)

_IMAGES = "CREATE VIEW images AS SELECT {columns} FROM {files}"

_DETECTIONS = """
CREATE VIEW {name} AS
SELECT uri, image_id, {run}, model_id, label_id, labelled_at,
       instances[k].category_id AS category_id, instances[k].category AS category, instances[k].score AS score,
       instances[k].box.x1 AS x1, instances[k].box.y1 AS y1, instances[k].box.x2 AS x2, instances[k].box.y2 AS y2,
       instances[k].area AS area, rles[k] AS rle, keypoints[k] AS keypoints, width, height
FROM (SELECT *, unnest(range(1, len(instances) + 1)) AS k FROM {images})
"""
# An index is unnested and not the lists: the masks stay unread unless a query names them (0.5 MB instead of 31 MB, measured).

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
# The choice needs narrow columns only; joining back keeps masks out of the aggregation, and unread where nobody asks.

VIEWS = ("images", "detections", "current_images", "current_detections")
"""images: one row an image and run. detections: one row an instance. current_*: per uri the newest ok row, else the newest."""


@contextmanager
def connect(storage: Storage, table_uri: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB connection with the four views over the table's newest snapshot, closed at the end of the block.

    TableError: no table, no committed run yet, or one of a newer version. Its execution is otherwise DuckDB's own.
    """
    dataset = open_table(storage, table_uri).dataset()
    with tempfile.TemporaryDirectory(prefix="masklake-query-") as spill, connected() as connection:
        connection.execute("SET temp_directory = $folder", {"folder": spill})
        connection.execute("SET TimeZone = 'UTC'")
        connection.register(_FILES, dataset)
        _create_views(connection)
        for setting in (
            "python_enable_replacements = false",  # a table name must not find a variable of this process
            "autoinstall_known_extensions = false",
            "autoload_known_extensions = false",
            "enable_external_access = false",
            "lock_configuration = true",
        ):
            connection.execute(f"SET {setting}")
        yield connection


def _create_views(connection: duckdb.DuckDBPyConnection) -> None:
    connection.execute(_IMAGES.format(columns=_COLUMNS, files=_FILES))
    connection.execute(_DETECTIONS.format(name="detections", images="images", run=RUN_COLUMN))
    connection.execute(_CURRENT_IMAGES.format(columns=_COLUMNS, run=RUN_COLUMN, ok=Status.OK))
    connection.execute(_DETECTIONS.format(name="current_detections", images="current_images", run=RUN_COLUMN))


def query(storage: Storage, table_uri: str, sql: str, parameters: Mapping[str, Any] | None = None) -> pa.Table:
    """The whole answer in memory. parameters: values of `$name` in the SQL. QueryError with DuckDB's message and the views."""
    with stream(storage, table_uri, sql, parameters) as answer:
        return answer.read_all()


@contextmanager
def stream(
    storage: Storage, table_uri: str, sql: str, parameters: Mapping[str, Any] | None = None
) -> Iterator[pa.RecordBatchReader]:
    """The answer as batches, for results larger than memory; valid inside the block. Errors as in `query`."""
    with connect(storage, table_uri) as connection, _query_errors(connection):
        if not sql.strip(" \t\r\n;"):
            raise QueryError(f"the query is empty; select from {', '.join(VIEWS)}")
        if len(connection.extract_statements(sql)) > 1:
            raise QueryError("these are several statements, of which only one answer could be given; ask one at a time")
        answer = connection.sql(sql, params=dict(parameters or {}))
        if answer is None:
            raise QueryError(f"the query returns no rows; select from {', '.join(VIEWS)}")
        yield answer.to_arrow_reader(BATCH_ROWS)


@contextmanager
def _query_errors(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # of who reads the answer, not of the query
        raise
    except (duckdb.Error, pa.ArrowException, OSError) as error:  # a reader hands DuckDB's errors on as Arrow's
        forbidden = isinstance(error, duckdb.PermissionException)
        remedy = "A query reads this table and nothing else; write its answer with --output." if forbidden else ""
        raise QueryError(f"{error}\n{remedy or describe_views(connection.cursor())}") from error


def describe_views(connection: duckdb.DuckDBPyConnection) -> str:
    """The views and their columns, one view a line: what a query can name."""
    lines = []
    for view in VIEWS[:2]:
        columns = connection.execute(
            "SELECT column_name FROM duckdb_columns() WHERE table_name = $view ORDER BY column_index", {"view": view}
        ).fetchall()
        lines.append(f"{view} and current_{view}: {', '.join(name for (name,) in columns)}")
    return "The views and their columns are\n  " + "\n  ".join(lines)
