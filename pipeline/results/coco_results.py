"""Matches the images of a table with those of a COCO file, and converts the table's detections to COCO results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import takewhile
from typing import Any

import pyarrow as pa

from masklake.model.errors import ConfigError
from masklake.model.wording import counted
from masklake.pipeline.coco.dataset import CocoDataset
from masklake.pipeline.images.status import Status
from masklake.pipeline.storage.uri import relative_to
from masklake.pipeline.table.stored_values import check_row


@dataclass
class TableDetections:
    """COCO result rows of the images in the ground truth, and counts of the table's images.

    labelled, failed: number of images of the ground truth whose row has the status `ok`, or another one. failures: failed
    images by status. first_failure: URI and error of the first. strangers: number of images of the table that the ground truth
    does not list. names: the table's category names by id. sizes: width and height of the labelled images, by id.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    labelled: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    first_failure: str | None = None
    strangers: int = 0
    names: dict[int, str] = field(default_factory=dict)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Number of images of the ground truth whose row has another status than `ok`."""
        return self.failures.total()


COLUMNS = ("uri", "status", "error", "height", "width", "instances", "rles", "keypoints")
"""Columns of a table that `collect` needs."""


class Fit(IntEnum):
    """How well a URI fits the `file_name` of an image."""

    LAST_PART = 1  # where files moved into another folder
    END = 2
    EXACT = 3  # below the one folder that all fitting URIs share, or the file name is the URI


@dataclass(frozen=True)
class Matches:
    """Image ids of the ground truth by URI. ambiguous: URIs whose last part alone fits several images; they match none."""

    image_ids: dict[str, int]
    ambiguous: list[str]


class ImageNames:
    """Finds the images of the ground truth among the URIs of a table.

    With a folder, the URI must be that of the file in the folder. Without one, the URI must end in a `file_name` or, where
    files moved to another folder, have the same last part: `s3://b/val2017/1.jpg` matches `val2017/1.jpg`, `1.jpg` and
    `images/1.jpg`. If several URIs fit one image, the best fit (`Fit`) is used, and the others count as not in the ground
    truth.
    """

    def __init__(self, truth: CocoDataset, folder: str | None = None) -> None:
        self._folder = folder
        self._names: dict[int, str] = {}
        self._by_name: dict[str, int] = {}
        self._by_last_part: dict[str, int | None] = {}
        for image in truth.images:
            name = relative_to(folder, image.file_name) if folder is not None else image.file_name.removeprefix("./")
            if self._by_name.setdefault(name, image.id) != image.id:
                raise ConfigError(f"{truth.source} lists {image.file_name} under two ids; images cannot be told apart.")
            self._names[image.id] = name
            last = name.rpartition("/")[2]
            self._by_last_part[last] = None if last in self._by_last_part else image.id

    def match(self, uris: Iterable[str]) -> Matches:
        """Returns the matches. Raises ConfigError if two URIs fit one image equally well."""
        candidates: dict[int, list[str]] = {}
        ambiguous: list[str] = []
        for uri in uris:
            image_id = self._by_name.get(uri) if self._folder is not None else self._by_end(uri)
            if image_id is not None:
                candidates.setdefault(image_id, []).append(uri)
            elif self._folder is None and uri.rpartition("/")[2] in self._by_last_part:
                ambiguous.append(uri)
        root = common_folder(uri for fitting in candidates.values() for uri in fitting)
        chosen = (self._best(image_id, fitting, root) for image_id, fitting in candidates.items())
        return Matches(dict(zip(chosen, candidates, strict=True)), ambiguous)

    def _by_end(self, uri: str) -> int | None:
        parts = uri.split("/")
        for start in range(len(parts)):
            if (image_id := self._by_name.get("/".join(parts[start:]))) is not None:
                return image_id
        return self._by_last_part.get(parts[-1])

    def _best(self, image_id: int, uris: Sequence[str], root: str) -> str:
        best, *others = sorted(uris, key=lambda uri: self._fit(image_id, uri, root), reverse=True)
        if others and self._fit(image_id, others[0], root) == self._fit(image_id, best, root):
            raise ConfigError(
                f"{best} and {others[0]} both fit {self._names[image_id]} of the truth. "
                "Say which folder is meant with --images."
            )
        return best

    def _fit(self, image_id: int, uri: str, root: str) -> Fit:
        name = self._names[image_id]
        if uri in (name, f"{root}/{name}"):
            return Fit.EXACT
        return Fit.END if uri.endswith(f"/{name}") else Fit.LAST_PART


def common_folder(uris: Iterable[str]) -> str:
    """Returns the deepest folder that contains all URIs; "" if there is none."""
    common: list[str] | None = None
    for uri in uris:
        folder = uri.split("/")[:-1]
        if common is None:
            common = folder
        elif folder[: len(common)] != common:
            common = [part for part, _ in takewhile(lambda pair: pair[0] == pair[1], zip(common, folder, strict=False))]
    return "/".join(common or [])


def collect(batches: Iterable[pa.RecordBatch], image_ids: Mapping[str, int]) -> TableDetections:
    """Returns the detections of a table's rows with the image ids of the ground truth. batches: `COLUMNS`. image_ids: by URI.

    Raises TableError for a row whose values cannot be scored (`pipeline.table.stored_values`).
    """
    found = TableDetections()
    for batch in batches:
        for row in batch.to_pylist():
            image_id = image_ids.get(row["uri"])
            if image_id is None:
                found.strangers += 1
            elif row["status"] != Status.OK:
                found.failures[str(row["status"])] += 1
                found.first_failure = found.first_failure or f"{row['uri']} ({row['error']})"
            else:
                check_row(row)
                found.labelled += 1
                found.sizes[image_id] = row["width"], row["height"]
                found.rows.extend(_results(row, image_id))
                found.names |= {i["category_id"]: i["category"] or str(i["category_id"]) for i in row["instances"]}
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
        if row["rles"] and row["rles"][n] is not None:  # null if no masks were requested
            result["segmentation"] = {"size": [row["height"], row["width"]], "counts": row["rles"][n]}
        if row["keypoints"] and row["keypoints"][n]:
            result["keypoints"] = _flat(row["keypoints"][n])
        results.append(result)
    return results


def _flat(points: Sequence[Mapping[str, float]]) -> list[float]:
    return [point[part] for point in points for part in ("x", "y", "score")]


def check_sizes(found: TableDetections, truth: CocoDataset) -> None:
    """Raises ConfigError if an image was labelled in another size: the ground truth is of other images, or of images not turned
    upright.
    """
    for image in truth.images:
        labelled = found.sizes.get(image.id)
        if labelled is not None and None not in labelled and labelled != (image.width, image.height):
            raise ConfigError(
                f"image {image.id} ({image.file_name}) of {truth.source} is {image.width} x {image.height} pixels; it was "
                f"labelled as {labelled[0]} x {labelled[1]}. The table is of other images."
            )


def check_keypoints(found: TableDetections, truth: CocoDataset) -> None:
    """Raises ConfigError if a category's instances have another number of keypoints than in the ground truth."""
    counts = {category.id: len(category.keypoints) for category in truth.categories if category.keypoints}
    for row in found.rows:
        points, expected = len(row.get("keypoints", ())) // 3, counts.get(row["category_id"])
        if points and expected is not None and points != expected:
            raise ConfigError(
                f"category {row['category_id']} ({found.names[row['category_id']]}) has "
                f"{counted(points, 'keypoint')} in the table and {expected} in {truth.source}: give the truth the "
                "categories that the model was trained with."
            )
