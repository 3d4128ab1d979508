"""`masklake show`: one image of a table with its instances drawn on it."""

from __future__ import annotations

import io
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from pipeline.decode import decode
from pipeline.draw import draw_instances
from pipeline.errors import InputNotFoundError, StorageError, TableError
from pipeline.query import connect
from pipeline.schema import Status
from pipeline.storage import Storage, canonical
from pipeline.storage_errors import describe

NEAR_NAMES = 3


class ShowReport(BaseModel):
    """What was drawn. size: the picture's width and height in pixels, which is a multiple of a small image's own."""

    model_config = ConfigDict(frozen=True)

    output: str
    uri: str
    instances: int
    size: tuple[int, int]


def run(storage: Storage, table_uri: str, uri: str, output: str, min_score: float = 0.0) -> ShowReport:
    """Draw the current row of `uri` from its instances and the image in storage, and write a PNG to `output`.

    InputNotFoundError: the table has no such image (near names are given), it was not labelled, or it is gone from storage.
    """
    with connect(storage, table_uri) as connection:
        found = _find(connection, uri)
        instances = _rows(
            connection,
            "SELECT * FROM current_detections WHERE uri = $uri AND run = $run AND image_id = $image_id AND score >= $min_score",
            {"uri": found["uri"], "run": found["run"], "image_id": found["image_id"], "min_score": min_score},
        )
    picture = draw_instances(_read_image(storage, found), instances)
    png = io.BytesIO()
    picture.save(png, "PNG")
    storage.write_bytes(output, png.getvalue())
    return ShowReport(output=canonical(output), uri=found["uri"], instances=len(instances), size=picture.size)


def _rows(connection: duckdb.DuckDBPyConnection, sql: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        return connection.sql(sql, params=parameters).to_arrow_table().to_pylist()
    except (duckdb.Error, pa.ArrowException, OSError) as error:  # a file of the table is gone or damaged
        raise TableError(f"the table cannot be read ({describe(error)}); restore its files, or label again") from error


def _find(connection: duckdb.DuckDBPyConnection, uri: str) -> dict[str, Any]:
    """The image's current row, named as in the table or as a path from here."""
    columns = "SELECT uri, run, image_id, width, height, status, error FROM current_images"
    for name in dict.fromkeys([uri, canonical(uri)]):
        if found := _rows(connection, f"{columns} WHERE uri = $uri", {"uri": name}):
            return _labelled(found[0])
    near = _rows(
        connection,
        "SELECT uri FROM current_images "
        "ORDER BY contains(uri, $uri) DESC, jaro_winkler_similarity(parse_filename(uri), parse_filename($uri)) DESC, uri "
        "LIMIT $limit",
        {"uri": uri, "limit": NEAR_NAMES},
    )
    raise InputNotFoundError(f"{uri}: is not in the table; near names: {', '.join(row['uri'] for row in near)}")


def _labelled(row: dict[str, Any]) -> dict[str, Any]:
    if row["status"] != Status.OK:
        raise InputNotFoundError(f"{row['uri']}: was not labelled, its status is {row['status']} ({row['error']})")
    return row


def _read_image(storage: Storage, row: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 RGB (H, W, 3), upright as the labeller saw it; StorageError when it is another image by now."""
    decoded = decode(storage.read_bytes(row["uri"]))
    if decoded.image is None:
        raise StorageError(f"{row['uri']}: cannot be read any more ({decoded.error}); label it again")
    if (decoded.width, decoded.height) != (row["width"], row["height"]):
        raise StorageError(
            f"{row['uri']}: is {decoded.width} x {decoded.height} pixels now and was {row['width']} x {row['height']} "
            "when it was labelled; label it again"
        )
    return np.ascontiguousarray(decoded.image.permute(1, 2, 0).numpy())
