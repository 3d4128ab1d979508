"""`masklake show`: draws one image of a table with its instances."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from masklake.jobs.terminal.output import check_output, same_place
from masklake.model.errors import ConfigError
from masklake.model.wording import counted, printable
from masklake.pipeline.errors import InputNotFoundError, StorageError, TableError
from masklake.pipeline.images.decode import decode
from masklake.pipeline.images.status import Status
from masklake.pipeline.results.drawing import draw_instances
from masklake.pipeline.storage.errors import reason_of
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import below, canonical, parse_uri, real_place
from masklake.pipeline.storage.walk import is_utf8
from masklake.pipeline.table.fields import LIKELY_SCORE
from masklake.pipeline.table.query import connect_duckdb
from masklake.pipeline.table.stored_values import check_instance

NAMED = 3
"""Number of images that a message names."""

FORMATS: Mapping[str, str] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Pillow's formats by suffix of the output, in any case."""


class ShowReport(BaseModel):
    """What was drawn. size: width and height of the drawing in pixels; a small image is enlarged."""

    model_config = ConfigDict(frozen=True)

    output: str
    uri: str
    instances: int
    hidden: int = Field(description="Instances that are stored and were not drawn, as their score is below min_score.")
    min_score: float
    size: tuple[int, int]
    changed: bool = Field(description="Whether the size of the image's file, in bytes, has changed since it was labelled.")


@dataclass(frozen=True)
class LabelledImage:
    """An image of a table. row: its row of `current_images`. instances: its rows of `current_detections`."""

    row: Mapping[str, Any]
    instances: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Drawing:
    """A drawing, the number of instances on it, and whether the size of the image's file has changed since it was labelled."""

    picture: Image.Image
    instances: int
    changed: bool


def run(
    storage: Storage, table: str, uri: str, output: str, min_score: float = LIKELY_SCORE, images: str | None = None
) -> ShowReport:
    """Draws the current instances of the image `uri`, and writes the drawing to `output`, whose suffix selects the format.

    uri: the image's URI in the table, a path relative to the current folder, or a unique ending of its path (`a.jpg`,
    `sub/a.jpg`). images: folder that holds the images now; None: where they were labelled.

    Raises InputNotFoundError if the table has no such image (similar names are suggested) or several, or the image was not
    labelled or is gone from the storage; ConfigError for an invalid output; StorageError if the image has changed; TableError
    if the row's values cannot be drawn.
    """
    form = _check_picture(output)
    check_output(output, table)
    with connect_duckdb(storage, table) as connection:
        _check_no_image(connection, storage, output, images)
        image = find_image(connection, uri, images)
    place = place_of(storage, image, images)
    if same_place(output, place):
        raise ConfigError(f"{output}: is the image itself; name another file for the picture")
    drawing = draw(storage, image, place, min_score)
    encoded = io.BytesIO()
    drawing.picture.save(encoded, form, quality=92)  # ignored for PNG
    storage.write_bytes(output, encoded.getvalue())
    return ShowReport(
        output=canonical(output),
        uri=image.row["uri"],
        instances=drawing.instances,
        hidden=len(image.instances) - drawing.instances,
        min_score=min_score,
        size=drawing.picture.size,
        changed=drawing.changed,
    )


def find_image(connection: duckdb.DuckDBPyConnection, uri: str, images: str | None = None) -> LabelledImage:
    """Returns the current row of an image and its instances, checked; `uri`, `images` and errors as in `run`."""
    row = _labelled(_find(connection, uri, images))
    instances = _rows(
        connection,
        "SELECT * FROM current_detections WHERE uri = $uri AND run = $run AND image_id = $image_id",
        {name: row[name] for name in ("uri", "run", "image_id")},
    )
    for number, instance in enumerate(instances):
        check_instance(f"{row['uri']}: instance {number} of its row", instance, instance["rle"], instance["keypoints"], row)
    return LabelledImage(row, instances)


def place_of(storage: Storage, image: LabelledImage, images: str | None = None) -> str:
    """Returns where the image is now: where it was labelled, or in the folder `images`."""
    return image.row["uri"] if images is None else _moved(storage, image.row["uri"], images)


def draw(storage: Storage, image: LabelledImage, place: str, min_score: float = LIKELY_SCORE) -> Drawing:
    """Returns the image at `place` with its instances of at least `min_score`."""
    content = _content(storage, place)
    shown = [instance for instance in image.instances if instance["score"] >= min_score]
    picture = draw_instances(_pixels(content, place, image.row), shown)
    return Drawing(picture, len(shown), image.row["bytes"] is not None and image.row["bytes"] != len(content))


def describe(report: ShowReport) -> str:
    """Returns the report as a line or two of text."""
    hidden = f"; {report.hidden:,} weaker hidden, --min-score 0 draws all" if report.hidden else ""
    count = counted(report.instances, "instance")
    lines = [
        f"{report.output}: {count} of score >= {report.min_score:g} in {printable(report.uri)}, "
        f"{report.size[0]} x {report.size[1]} pixels{hidden}"
    ]
    if report.changed:
        lines.append("note: the image's file has changed since it was labelled; label it again if the picture looks wrong")
    return "\n".join(lines)


def _check_picture(output: str) -> str:
    form = FORMATS.get(Path(output).suffix.lower())
    if form is None:
        raise ConfigError(f"{output}: unknown picture format; use the suffix {', '.join(FORMATS)}")
    return form


def _check_no_image(connection: duckdb.DuckDBPyConnection, storage: Storage, output: str, images: str | None) -> None:
    """Raises ConfigError if `output` is an image of the table, or the file of one in the folder `images`."""
    names = {canonical(output), real_place(output)}
    conditions = {"uri = $name": names}
    if images is not None and storage.is_file(output):
        pairs = ((name, _relative(name, folder)) for name in names for folder in (images, real_place(images)))
        conditions["ends_with(uri, '/' || $name)"] = {below for name, below in pairs if below != name}
    for condition, values in conditions.items():
        for name in filter(is_utf8, values):
            sql = f"SELECT uri FROM current_images WHERE {condition} LIMIT 1"  # noqa: S608 - constants of this function
            if found := _rows(connection, sql, {"name": name}):
                image = found[0]["uri"]
                raise ConfigError(f"{output}: is where the table's image {image} lies; name another file for the picture")


def _rows(connection: duckdb.DuckDBPyConnection, sql: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        return connection.sql(sql, params=parameters).to_arrow_table().to_pylist()
    except (duckdb.Error, pa.ArrowException, OSError) as error:  # a file of the table is gone or damaged
        raise TableError(f"the table cannot be read ({reason_of(error)}); restore its files, or label again") from error


def _find(connection: duckdb.DuckDBPyConnection, uri: str, images: str | None) -> dict[str, Any]:
    """Returns the current row of the image: by its name in the table, a relative path, or a unique ending of its path."""
    columns = "SELECT uri, run, image_id, width, height, bytes, status, error FROM current_images"
    if not is_utf8(uri):
        raise InputNotFoundError(f"{ascii(uri)[1:-1]}: is not in the table, which holds no name that is not UTF-8")
    for name in dict.fromkeys([uri, canonical(uri)]):
        if found := _rows(connection, f"{columns} WHERE uri = $uri", {"uri": name}):
            return found[0]
    name = _relative(uri, images)
    if name == uri:  # one slash in front of a name says nothing; one below a folder is a part of the key
        name = uri.removeprefix("./").removeprefix("/").rstrip("/")
    exact, composed = "ends_with(uri, $ending)", "ends_with(nfc_normalize(uri), nfc_normalize($ending))"
    # Whole parts of the path first, then a name's own end: 139.jpg for 000000000139.jpg. Then in Unicode's composed form: macOS
    # writes an umlaut as two characters, which look like the one that a keyboard gives.
    for ending, condition in ((f"/{name}", exact), (name, exact), (f"/{name}", composed), (name, composed)):
        found = _rows(connection, f"{columns} WHERE {condition} ORDER BY uri LIMIT 100", {"ending": ending})
        if len(found) == 1:
            return found[0]
        if found:
            count = f"{len(found)}" if len(found) < 100 else "100 or more"
            raise InputNotFoundError(
                f"{uri}: {count} images of the table end with it, such as {', '.join(row['uri'] for row in found[:NAMED])}; "
                "give more of the path"
            )
    near = _rows(
        connection,
        "SELECT uri FROM current_images "
        "ORDER BY contains(uri, $uri) DESC, jaro_winkler_similarity(parse_filename(uri), parse_filename($uri)) DESC, uri "
        "LIMIT $limit",
        {"uri": uri, "limit": NAMED},
    )
    raise InputNotFoundError(f"{uri}: is not in the table; near names: {', '.join(row['uri'] for row in near)}")


def _relative(uri: str, images: str | None) -> str:
    """Returns the path below the folder where the images are now; elsewhere the name unchanged."""
    if images is None:
        return uri
    folder, name = below(images), canonical(uri)
    return name[len(folder) :] if name.startswith(folder) else uri


def _moved(storage: Storage, uri: str, images: str) -> str:
    """Returns where the image is in the folder `images`: the longest ending of its path that exists there."""
    if not storage.exists(images):
        raise InputNotFoundError(f"{images}: there is no such folder; check --images")
    if storage.is_file(images):
        raise InputNotFoundError(f"{images}: is a file; name a folder with --images")
    at, scheme = parse_uri(uri), parse_uri(images).scheme
    parts = (at.key.removeprefix("/") if at.is_local else f"{at.bucket}/{at.key}").split("/")
    for start in range(len(parts)):
        place = below(images) + "/".join(parts[start:])
        # Only a key of S3 has empty and dot segments; a local path of such would be another one.
        if (scheme == "s3" or not {"", ".", ".."}.intersection(parts[start:])) and storage.is_file(place):
            return place
    raise InputNotFoundError(f"{images}: holds no file named as the end of {uri}; check --images")


def _labelled(row: dict[str, Any]) -> dict[str, Any]:
    if row["status"] != Status.OK:
        raise InputNotFoundError(f"{row['uri']}: was not labelled, its status is {row['status']} ({row['error']})")
    return row


def _content(storage: Storage, place: str) -> bytes:
    try:
        return storage.read_bytes(place)
    except InputNotFoundError as error:
        remedy = "name the folder that the images are in now with --images"
        raise InputNotFoundError(f"{place}: is not there any more; {remedy}") from error


def _pixels(content: bytes, place: str, row: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Returns uint8 RGB (H, W, 3), upright as the labeller saw it. Raises StorageError if the image has changed."""
    decoded = decode(content)
    if decoded.image is None:
        raise StorageError(f"{place}: cannot be read any more ({decoded.error}); label it again")
    if (decoded.width, decoded.height) != (row["width"], row["height"]):
        raise StorageError(
            f"{place}: is {decoded.width} x {decoded.height} pixels now and was {row['width']} x {row['height']} "
            "when it was labelled; label it again"
        )
    return np.ascontiguousarray(decoded.image.permute(1, 2, 0).numpy())
