"""A table's images and a COCO file's: which row of the one is which of the other, and the table's detections as results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from model.errors import ConfigError
from pipeline.coco import CocoDataset
from pipeline.schema import Status
from pipeline.storage import relative_to


@dataclass
class TableDetections:
    """COCO result rows of the images that the truth lists, and what the table says of the others.

    labelled, failed: images of the truth with an `ok` row, or another. strangers: images of the table that the truth does not
    list. names: the table's category names by id.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    labelled: int = 0
    failed: int = 0
    strangers: int = 0
    names: dict[int, str] = field(default_factory=dict)


COLUMNS = ("uri", "status", "height", "width", "instances", "rles", "keypoints")
"""What `collect` needs of a table."""


class ImageNames:
    """Finds an image of the truth by its URI.

    With a folder the URI must be the file's in it. Without one the URI's end must be a `file_name`, or, where files moved into
    another folder, have its last part: `s3://b/val2017/1.jpg` is `val2017/1.jpg`, `1.jpg` and `images/1.jpg`.
    """

    def __init__(self, truth: CocoDataset, folder: str | None = None) -> None:
        self._folder = folder
        self._by_name: dict[str, int] = {}
        self._by_last_part: dict[str, int | None] = {}
        for image in truth.images:
            name = relative_to(folder, image.file_name) if folder is not None else image.file_name.removeprefix("./")
            if self._by_name.setdefault(name, image.id) != image.id:
                raise ConfigError(f"{truth.source} lists {image.file_name} under two ids; images cannot be told apart.")
            last = name.rpartition("/")[2]
            self._by_last_part[last] = None if last in self._by_last_part else image.id
        self._taken: dict[int, str] = {}

    def find(self, uri: str) -> int | None:
        """The image's id, or None. Raises ConfigError when two URIs are the same image."""
        image_id = self._by_name.get(uri) if self._folder is not None else self._find_by_end(uri)
        if image_id is not None and self._taken.setdefault(image_id, uri) != uri:
            raise ConfigError(
                f"{uri} and {self._taken[image_id]} both fit one image of the truth. Say which folder is meant with --images."
            )
        return image_id

    def _find_by_end(self, uri: str) -> int | None:
        parts = uri.split("/")
        for start in range(len(parts)):
            if (image_id := self._by_name.get("/".join(parts[start:]))) is not None:
                return image_id
        return self._by_last_part.get(parts[-1])


def collect(batches: Iterable[pa.RecordBatch], names: ImageNames) -> TableDetections:
    """The detections of a table's rows (`COLUMNS`), each with the id of its image in the truth."""
    found = TableDetections()
    for batch in batches:
        for row in batch.to_pylist():
            image_id = names.find(row["uri"])
            if image_id is None:
                found.strangers += 1
            elif row["status"] != Status.OK:
                found.failed += 1
            else:
                found.labelled += 1
                found.rows.extend(_results(row, image_id))
                found.names |= {instance["category_id"]: instance["category"] for instance in row["instances"]}
    return found


def _results(row: Mapping[str, Any], image_id: int) -> list[dict[str, Any]]:
    results = []
    for n, instance in enumerate(row["instances"]):
        box = instance["box"]
        result = {
            "image_id": image_id,
            "category_id": instance["category_id"],
            "score": instance["score"],
            "bbox": [box["x1"], box["y1"], box["x2"] - box["x1"], box["y2"] - box["y1"]],
        }
        if n < len(row["rles"]):
            result["segmentation"] = {"size": [row["height"], row["width"]], "counts": row["rles"][n]}
        if n < len(row["keypoints"]) and row["keypoints"][n]:
            result["keypoints"] = _flat(row["keypoints"][n])
        results.append(result)
    return results


def _flat(points: Sequence[Mapping[str, float]]) -> list[float]:
    return [point[part] for point in points for part in ("x", "y", "score")]


def check_sizes(found: TableDetections, truth: CocoDataset) -> None:
    """Raises ConfigError when a mask is not of its image's size: the truth is of other images, or of images not upright."""
    sizes = {image.id: [image.height, image.width] for image in truth.images}
    for row in found.rows:
        expected, labelled = sizes[row["image_id"]], row.get("segmentation", {}).get("size")
        if labelled is not None and labelled != expected:
            raise ConfigError(
                f"image {row['image_id']} of {truth.source} is {expected[1]} x {expected[0]} pixels; it was labelled as "
                f"{labelled[1]} x {labelled[0]}. The table is of other images."
            )
