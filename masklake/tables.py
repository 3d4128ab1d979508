"""`masklake.open_table`: queries, masks and pictures of a table, without Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Unpack

import pyarrow as pa

from masklake.options import StorageKeywords, storage_of
from masklake.pipeline.errors import TableError
from masklake.pipeline.table.fields import LIKELY_SCORE

if TYPE_CHECKING:
    import numpy as np
    import pandas
    import polars
    from numpy.typing import NDArray
    from PIL import Image

    from masklake.pipeline.labelling.run_list import RunInfo
    from masklake.pipeline.storage.storage import Storage


class QueryAnswer:
    """The result of a query, in memory. Libraries that support Arrow's C stream interface accept it directly."""

    def __init__(self, rows: pa.Table) -> None:
        self._rows = rows

    def __repr__(self) -> str:
        return f"QueryAnswer({len(self)} rows of {', '.join(self._rows.column_names)})"

    def __len__(self) -> int:
        return self._rows.num_rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the rows as dictionaries."""
        for batch in self._rows.to_batches():
            yield from batch.to_pylist()

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self._rows.__arrow_c_stream__(requested_schema)

    def to_arrow(self) -> pa.Table:
        """Returns the result as a pyarrow table, without a copy."""
        return self._rows

    def to_pandas(self) -> pandas.DataFrame:
        """Returns the result as a pandas data frame. Raises ModuleNotFoundError if pandas is not installed."""
        _check_installed("pandas")
        return self._rows.to_pandas()

    def to_polars(self) -> polars.DataFrame:
        """Returns the result as a polars data frame. Raises ModuleNotFoundError if polars is not installed."""
        _check_installed("polars")
        import polars

        return polars.DataFrame(polars.from_arrow(self._rows))


class MaskTable:
    """A table, for reading. `masklake.open_table` returns one. Each call reads the newest snapshot."""

    def __init__(self, storage: Storage, uri: str) -> None:
        self.uri = uri
        self._storage = storage

    def __repr__(self) -> str:
        return f"MaskTable({self.uri!r})"

    def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> QueryAnswer:
        """Returns the result of one statement in DuckDB's SQL. docs/query.md describes the views.

        parameters: values of the `$name` placeholders in the SQL. Raises QueryError with DuckDB's message.
        """
        from masklake.pipeline.table.query import query

        return QueryAnswer(query(self._storage, self.uri, sql, parameters))

    def runs(self) -> list[RunInfo]:
        """Returns the table's runs, as `masklake runs` lists them, in the order in which they were planned."""
        from masklake.pipeline.labelling.run_list import list_runs
        from masklake.pipeline.table.table import open_table

        return list_runs(open_table(self._storage, self.uri))

    def masks(self, uri: str, *, min_score: float = 0.0) -> NDArray[np.bool_]:
        """Returns the masks of an image's current instances, bool (N, H, W), in the order of `current_detections`.

        uri: the image's URI in the table, a path relative to the current folder, or a unique ending of its path. min_score:
        minimum score of an instance. The masks take N x H x W bytes of memory.

        Raises InputNotFoundError if the table has no such image or several, or the image was not labelled, and TableError if
        its row is damaged or holds no masks.
        """
        import numpy as np

        from masklake.jobs.show import find_image
        from masklake.model.masks.rle import decode
        from masklake.pipeline.table.query import connect_duckdb

        with connect_duckdb(self._storage, self.uri) as connection:
            image = find_image(connection, uri)
        size = image.row["height"], image.row["width"]
        rles = [instance["rle"] for instance in image.instances if instance["score"] >= min_score]
        if None in rles:
            raise TableError(f"{image.row['uri']}: was labelled without masks; label it with a model that has the task `mask`")
        masks = np.zeros((len(rles), *size), dtype=bool)
        for mask, rle in zip(masks, rles, strict=True):
            mask[:] = decode(rle, size)
        return masks

    def show(self, uri: str, *, min_score: float = LIKELY_SCORE, images: str | os.PathLike[str] | None = None) -> Image.Image:
        """Returns an image with its current instances drawn on it, in RGB; a small image is enlarged.

        uri: as in `masks`. min_score: minimum score of a drawn instance. images: folder that holds the images now; None: where
        they were labelled.

        Raises the errors of `masks`, and StorageError if the image has changed since it was labelled.
        """
        from masklake.jobs.show import draw, find_image, place_of
        from masklake.pipeline.table.query import connect_duckdb

        folder = None if images is None else os.fspath(images)
        with connect_duckdb(self._storage, self.uri) as connection:
            image = find_image(connection, uri, folder)
        return draw(self._storage, image, place_of(self._storage, image, folder), min_score).picture


def open_table(uri: str | os.PathLike[str], **storage: Unpack[StorageKeywords]) -> MaskTable:
    """Returns an existing table, for reading.

    uri: folder of the table, local or s3://. storage: options such as `endpoint_url` and `region` (`StorageKeywords`).

    Raises TableError if there is no table, or nothing has been labelled into it yet.
    """
    from masklake.pipeline.table.table import open_table

    handles = storage_of(storage)
    table = open_table(handles, os.fspath(uri))
    table.dataset()  # raises where nothing can be read
    return MaskTable(handles, table.uri)


def _check_installed(package: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"{package} is not installed: pip install {package}, or use to_arrow()", name=package)
