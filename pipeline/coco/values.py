"""Checks the numbers of a COCO file against their types and against the image that they belong to.

Code that follows trusts every number: tables with 64-bit image ids and 32-bit category ids, and pycocotools, which draws
coordinates in C (a polygon that extends to 1e9 ends the process) and adds up run lengths unchecked. So everything is checked
here, once. An invalid value raises AnnotationError, which names file, row, annotation and image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from masklake.model.config import INT32
from masklake.model.masks.rle import unpack_counts
from masklake.model.wording import counted
from masklake.pipeline.errors import AnnotationError
from masklake.pipeline.images.fields import MOST_PIXELS

Segmentation: TypeAlias = list[list[float]] | dict[str, Any] | None
"""Polygons (x, y, x, y, ... in pixels), or a run-length encoding {"size": [H, W], "counts": list | str}; None: box only."""

INT64 = (-(2**63), 2**63 - 1)
"""Range of an image id, which is stored in a column of that type."""
EXACT = 2**53
"""Integers written as floats (7.0) are accepted up to this value: larger floats have lost digits."""
REACH = 1.0
"""How far a coordinate may lie outside its image, in image sides: outlines of objects may be cut off by the border."""
MOST_AREA = 1e10
"""Maximum area in pixels; COCO's scores leave out larger ones."""
VISIBILITIES = frozenset((0.0, 1.0, 2.0))
SHOWN = 60
"""Number of characters of a wrong value that a message quotes."""


@dataclass(frozen=True, slots=True)
class CocoImage:
    """One row of `images`. file_name: relative to the image folder. width, height: pixels."""

    id: int
    file_name: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a value in a file. Converted to text, it is the beginning of a message."""

    source: str
    part: str
    number: int
    row: Any
    image: CocoImage | None = None

    def __str__(self) -> str:
        facts = []
        if isinstance(self.row, dict) and self.part == "annotations" and self.row.get("id") is not None:
            facts.append(f"id {quoted(self.row['id'])}")
        if self.image is not None:
            facts.append(f"image {self.image.id}, {self.image.file_name}")
        return f"{self.source}: {self.part}[{self.number}]" + (f" ({'; '.join(facts)})" if facts else "")


def is_text(value: str) -> bool:
    """Returns whether a string can be written to a file: it contains no zero byte and no lone surrogate."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def quoted(value: Any) -> str:
    """Returns a value as text for a message, shortened if it is long."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def finite(value: Any) -> float | None:
    """Returns a JSON number as a float; None for text, true, null, NaN, infinity, and integers too large for a float."""
    if type(value) not in (int, float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _object(row: Any, place: Place) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise AnnotationError(f"{place} is {quoted(row)} and not an object.")
    return row


def whole(row: Any, key: str, place: Place, limits: tuple[int, int] = INT64) -> int:
    """Returns the integer `row[key]` within `limits`; 7.0 is 7. Raises AnnotationError for text, true and everything else."""
    value = _object(row, place).get(key)
    number = value if type(value) is int else None
    if type(value) is float and value.is_integer() and abs(value) <= EXACT:
        number = int(value)
    if number is None:
        raise AnnotationError(f"{place} needs a whole number '{key}', not {quoted(value)}.")
    if not limits[0] <= number <= limits[1]:
        bits = "32" if limits == INT32 else "64"
        raise AnnotationError(f"{place} has the '{key}' {quoted(number)}, which is beyond {bits}-bit integers. Number it anew.")
    return number


def image_of(row: Any, place: Place) -> CocoImage:
    """Returns a checked row of `images`."""
    name = _object(row, place).get("file_name")
    if not isinstance(name, str) or not name or not is_text(name):
        raise AnnotationError(f"{place} has no file_name that a file can have: {quoted(name)}.")
    image = CocoImage(whole(row, "id", place), name, whole(row, "width", place, INT32), whole(row, "height", place, INT32))
    if image.width <= 0 or image.height <= 0 or image.width * image.height > MOST_PIXELS:
        raise AnnotationError(f"{place} ({name}) has the size {image.width} x {image.height}.")
    return image


def box_of(row: Mapping[str, Any], image: CocoImage, place: Place) -> tuple[float, float, float, float]:
    """Returns x, y, width, height: four finite numbers. If any part of the box lies on the image, its corners must be at most
    REACH sides away from it.
    """
    bbox = row.get("bbox")
    numbers = [finite(side) for side in bbox] if isinstance(bbox, list) and len(bbox) == 4 else [None]
    if None in numbers:
        raise AnnotationError(f"{place} needs a bbox [x, y, width, height] of finite numbers, not {quoted(bbox)}.")
    x, y, width, height = (number for number in numbers if number is not None)
    if width > 0 and height > 0 and overlaps((x, y, width, height), image):
        _check_reach([x, x + width], [y, y + height], image, place, "a bbox")
    return x, y, width, height


def overlaps(bbox: tuple[float, float, float, float], image: CocoImage) -> bool:
    """Returns whether a box has any area on its image."""
    x, y, width, height = bbox
    return x < image.width and y < image.height and x + width > 0 and y + height > 0


def _check_reach(xs: Sequence[float], ys: Sequence[float], image: CocoImage, place: Place, what: str) -> None:
    for name, lowest, highest, side in (("x", min(xs), max(xs), image.width), ("y", min(ys), max(ys), image.height)):
        if lowest < -REACH * side or highest > (1 + REACH) * side:
            raise AnnotationError(
                f"{place} has {what} from {name} = {lowest:g} to {highest:g}, far outside an image of "
                f"{image.width} x {image.height} pixels."
            )


def area_of(row: Mapping[str, Any], bbox: tuple[float, float, float, float], place: Place) -> float:
    """Returns the area in pixels; that of the box if the row has none."""
    value = row.get("area")
    if value is None:
        return bbox[2] * bbox[3]
    area = finite(value)
    if area is None or not 0 <= area <= MOST_AREA:
        raise AnnotationError(f"{place} needs an area in pixels (0 to {MOST_AREA:g}), not {quoted(value)}.")
    return area


def crowd_of(row: Mapping[str, Any], place: Place) -> bool:
    """Returns `iscrowd`: 0 or 1, false or true; False if the row has none."""
    value = row.get("iscrowd")
    if value is None or value in (0, 1):  # False == 0, 1.0 == 1
        return bool(value)
    raise AnnotationError(f"{place} needs an iscrowd of 0 or 1, not {quoted(value)}.")


def keypoints_of(row: Mapping[str, Any], name: str, count: int, image: CocoImage, place: Place) -> tuple[float, ...]:
    """Returns x, y, visibility for each of a category's `count` keypoints, flat; () if the row has none.

    Visibility is 0 (absent), 1 (hidden) or 2 (visible). `num_keypoints` is not read. An absent keypoint may lie anywhere.
    """
    value = row.get("keypoints")
    if not count or value is None or value == []:
        return ()
    numbers = [finite(number) for number in value] if isinstance(value, list) else []
    if len(numbers) != 3 * count or None in numbers:
        given = counted(len(value), "keypoint number") if isinstance(value, list) else f"the keypoints {quoted(value)}"
        raise AnnotationError(
            f"{place} has {given}; '{name}' with {counted(count, 'keypoint')} needs {3 * count} finite ones (x, y, visibility)."
        )
    points = tuple(number for number in numbers if number is not None)
    if strange := set(points[2::3]) - VISIBILITIES:
        raise AnnotationError(f"{place} has a keypoint of visibility {min(strange):g}: 0, 1 and 2 are known.")
    seen = [number for number, visibility in enumerate(points[2::3]) if visibility]
    if seen:
        _check_reach([points[3 * n] for n in seen], [points[3 * n + 1] for n in seen], image, place, "keypoints")
    return points


def segmentation_of(row: Mapping[str, Any], image: CocoImage, place: Place) -> Segmentation:
    """Returns polygons of at least three corners, or a run-length encoding of this image's size.

    None if there is no outline: missing, null, empty, polygons of two points, runs without a pixel.
    """
    value = row.get("segmentation")
    if not value:
        return None
    if isinstance(value, dict):
        return _run_lengths(value, image, place)
    if not isinstance(value, list) or not all(isinstance(polygon, list) for polygon in value):
        hint = " A polygon is a list of its own within that list." if finite_list(value) else ""
        raise AnnotationError(f"{place}: the segmentation is neither polygons nor a run-length encoding.{hint}")
    for polygon in value:
        points = _numbers(polygon)
        if points is None or len(polygon) % 2:
            size = (
                f"of {counted(len(polygon), 'number')}" if points is not None else f"with {quoted(_no_number(polygon))} in it"
            )
            raise AnnotationError(f"{place} has a polygon {size}; x, y pairs of finite numbers are needed.")
        if len(polygon):
            _check_reach(points[0::2].tolist(), points[1::2].tolist(), image, place, "a polygon")
    return [polygon for polygon in value if len(polygon) >= 6] or None


def finite_list(value: Any) -> bool:
    """Returns whether a value is a list of finite numbers."""
    return isinstance(value, list) and _numbers(value) is not None


def _numbers(values: list[Any]) -> NDArray[np.float64] | None:
    """Returns float64 (n,) for a flat list of finite numbers; None for any other list."""
    if not set(map(type, values)) <= {int, float}:
        return None
    try:
        numbers = np.array(values, np.float64)
    except OverflowError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def _no_number(values: list[Any]) -> Any:
    """Returns the first element that `_numbers` refuses."""
    return next(value for value in values if _numbers([value]) is None)


def _run_lengths(value: Mapping[str, Any], image: CocoImage, place: Place) -> dict[str, Any] | None:
    size, counts = value.get("size"), value.get("counts")
    if size != [image.height, image.width]:
        raise AnnotationError(f"{place}: the mask's size {quoted(size)} is not its image's [{image.height}, {image.width}].")
    try:
        runs = checked_runs(counts, image.height, image.width)
    except ValueError as error:
        raise AnnotationError(f"{place}: the mask's {error}.") from error
    if not runs[1::2].any():
        return None
    return {"size": [image.height, image.width], "counts": counts}


def checked_runs(counts: Any, height: int, width: int) -> NDArray[np.int64]:
    """Returns the run lengths, int64 (n,), of COCO counts: a list of numbers, or compressed as text or bytes.

    Raises ValueError unless they are non-negative and fill height x width: readers in C trust their sum, and would return
    pixels that nobody wrote.
    """
    if isinstance(counts, list):
        if not set(map(type, counts)) <= {int}:
            raise ValueError("counts are not run lengths: a list of whole numbers is needed")
        if not all(0 <= count <= height * width for count in counts):
            raise ValueError(f"runs do not add up to its {height} x {width} pixels")
        runs = np.array(counts, np.int64)
    elif isinstance(counts, str | bytes):
        try:
            runs = unpack_counts(counts.encode() if isinstance(counts, str) else counts)
        except ValueError as error:
            raise ValueError(f"counts are not run lengths ({error})") from error
    else:
        raise ValueError(f"counts are not run lengths, but {quoted(counts)}")
    pixels = height * width
    if (runs < 0).any() or (runs > pixels).any() or runs.sum() != pixels:
        raise ValueError(f"runs do not add up to its {height} x {width} pixels")
    return runs
