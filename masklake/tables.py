"""`masklake.open_table`: queries, masks and pictures of a table, without Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Unpack

import pyarrow as pa

from masklake.options import StorageKeywords, storage_of
from masklake.pipeline.errors import TableError
from masklake.pipeline.table.schema import LIKELY_SCORE

if TYPE_CHECKING:
    import numpy as np
    import pandas
    import polars
    from numpy.typing import NDArray
    from PIL import Image

    from masklake.pipeline.storage.storage import Storage


class QueryAnswer:
    """The rows of an answer, in memory. Whatever reads Arrow's C stream interface takes it as it is."""

    def __init__(self, rows: pa.Table) -> None:
        self._rows = rows

    def __repr__(self) -> str:
        return f"QueryAnswer({len(self)} rows of {', '.join(self._rows.column_names)})"

    def __len__(self) -> int:
        return self._rows.num_rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows as dictionaries."""
        for batch in self._rows.to_batches():
            yield from batch.to_pylist()

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self._rows.__arrow_c_stream__(requested_schema)

    def to_arrow(self) -> pa.Table:
        """The answer as a pyarrow table; nothing is copied."""
        return self._rows

    def to_pandas(self) -> pandas.DataFrame:
        """The answer as a pandas data frame. ModuleNotFoundError where pandas is not installed."""
        _check_installed("pandas")
        return self._rows.to_pandas()

    def to_polars(self) -> polars.DataFrame:
        """The answer as a polars data frame. ModuleNotFoundError where polars is not installed."""
        _check_installed("polars")
        import polars

        return polars.DataFrame(polars.from_arrow(self._rows))


class MaskTable:
    """A table of masks to read; make it with `masklake.open_table`. Each call reads the newest snapshot."""

    def __init__(self, storage: Storage, uri: str) -> None:
        self.uri = uri
        self._storage = storage

    def __repr__(self) -> str:
        return f"MaskTable({self.uri!r})"

    def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> QueryAnswer:
        """The answer to one statement of DuckDB's SQL over the views of docs/query.md.

        parameters: the value of each `$name` in the SQL. Raises QueryError with DuckDB's message.
        """
        from masklake.pipeline.table.query import query

        return QueryAnswer(query(self._storage, self.uri, sql, parameters))

    def masks(self, uri: str, *, min_score: float = 0.0) -> NDArray[np.bool_]:
        """The masks of an image's current instances, in the order of `current_detections`: bool (N, H, W).

        uri: as the table names the image, as a path from here, or a unique ending of its path. min_score: minimum score of an
        instance; N x H x W bytes are needed for those that are left.

        Raises InputNotFoundError if the table has no such image, several, or no labels of it, and TableError if its row is
        damaged or holds no masks.
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
        """An image with its current instances drawn on it, in RGB; a small image is enlarged.

        uri: as in `masks`. min_score: minimum score of an instance that is drawn. images: the folder that the images are in
        now; default: where they were labelled.

        Raises as `masks`, and StorageError if the image is another one by now.
        """
        from masklake.jobs.show import draw, find_image, place_of
        from masklake.pipeline.table.query import connect_duckdb

        folder = None if images is None else os.fspath(images)
        with connect_duckdb(self._storage, self.uri) as connection:
            image = find_image(connection, uri, folder)
        return draw(self._storage, image, place_of(self._storage, image, folder), min_score).picture


def open_table(uri: str | os.PathLike[str], **storage: Unpack[StorageKeywords]) -> MaskTable:
    """A table that is there, to read.

    uri: its folder, local or s3://. storage: endpoint, region and the like (`StorageKeywords`).

    Raises TableError if there is no table, or nothing was labelled into it yet.
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
