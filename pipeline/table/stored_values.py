"""Checks the stored values of an instance before they reach code that trusts them (pycocotools and the drawing use C).

Rows that MaskLake wrote pass. A damaged file, or a table that another program wrote, raises TableError, which names the image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from masklake.model.wording import counted
from masklake.pipeline.coco.values import checked_runs
from masklake.pipeline.errors import TableError
from masklake.pipeline.images.fields import MOST_PIXELS

REMEDY = "Restore the table's files, or label into a new table."
SIDES = ("x1", "y1", "x2", "y2")


def check_row(row: Mapping[str, Any]) -> None:
    """Raises TableError if an `ok` row has invalid values. row: uri, width, height, instances, rles and keypoints."""
    instances = row["instances"]
    if instances is None:
        raise TableError(f"{row['uri']}: its row in the table has no list of instances. {REMEDY}")
    for name in ("rles", "keypoints"):
        if row[name] and len(row[name]) != len(instances):
            given = counted(len(row[name]), name.removesuffix("s"))
            raise TableError(f"{row['uri']}: its row has {counted(len(instances), 'instance')} and {given}. {REMEDY}")
    rles, keypoints = (row[name] or [None] * len(instances) for name in ("rles", "keypoints"))
    for n, (instance, rle, points) in enumerate(zip(instances, rles, keypoints, strict=True)):
        if instance is None or instance["box"] is None:
            raise TableError(f"{row['uri']}: instance {n} of its row is null. {REMEDY}")
        check_instance(f"{row['uri']}: instance {n} of its row", instance | instance["box"], rle, points, row)


def check_instance(
    place: str,
    instance: Mapping[str, Any],
    rle: bytes | None,
    keypoints: Sequence[Mapping[str, float | None] | None] | None,
    image: Mapping[str, Any],
) -> None:
    """Raises TableError, whose message begins with `place`, if an instance has invalid values.

    instance: category_id, score in 0..1, x1, y1, x2 and y2 (pixels). rle: COCO compressed counts. keypoints: x, y and score
    each. image: width and height (pixels).
    """
    if instance["category_id"] is None:
        raise TableError(f"{place} has no category. {REMEDY}")
    score, box = instance["score"], [instance[side] for side in SIDES]
    if not _finite([score]) or not 0 <= score <= 1:
        raise TableError(f"{place} has the score {score}; a score is 0 to 1. {REMEDY}")
    if not _finite(box) or box[2] < box[0] or box[3] < box[1]:
        raise TableError(f"{place} has the box {box}; x1 <= x2 and y1 <= y2 are needed, in finite numbers. {REMEDY}")
    for point in keypoints or ():
        if point is None or not _finite([point[part] for part in ("x", "y", "score")]):
            raise TableError(f"{place} has the keypoint {point}; finite numbers are needed. {REMEDY}")
    if rle is not None:
        _check_mask(place, rle, image["width"], image["height"])


def _check_mask(place: str, rle: bytes, width: int | None, height: int | None) -> None:
    if width is None or height is None or min(width, height) < 1 or width * height > MOST_PIXELS:
        raise TableError(f"{place} has a mask, and its image the size {width} x {height}. {REMEDY}")
    try:
        checked_runs(rle, height, width)
    except ValueError as error:
        raise TableError(f"{place} has a mask whose {error}. {REMEDY}") from error


def _finite(numbers: Sequence[float | None]) -> bool:
    return all(number is not None and math.isfinite(number) for number in numbers)
