"""Reads COCO annotation files: each is read and checked once, and its values can be trusted afterwards.

Cases that other readers accept and fail on later are decided here: repeated image rows, annotations of an unknown image or
category, boxes without an area or outside their image, crowd regions in either run-length form, files without `info`.
Contradictions raise an error that names the row (`pipeline.coco.values` checks each number). Rows that can be left out are left
out and counted (`CocoDataset.dropped`). An instance that lacks the ground truth of one task is kept for the others.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from masklake.model.config import INT32, Category
from masklake.model.wording import agreeing, counted, counted_of
from masklake.pipeline.coco.dataset import NAMED, OUTSIDE, REPEATED_IMAGE, REPEATED_ROW, ZERO_AREA, CocoAnnotation, CocoDataset
from masklake.pipeline.coco.values import (
    CocoImage,
    Place,
    area_of,
    box_of,
    crowd_of,
    image_of,
    is_text,
    keypoints_of,
    overlaps,
    quoted,
    segmentation_of,
    whole,
)
from masklake.pipeline.errors import AnnotationError
from masklake.pipeline.storage.storage import Storage

FEW_BOXES = 8
"""Minimum number of boxes from which their format is inferred."""


def read_coco(storage: Storage, uri: str) -> CocoDataset:
    """Returns the checked COCO JSON file at `uri` (local or s3://).

    Raises InputNotFoundError, AccessDeniedError or StorageError if it cannot be fetched, AnnotationError if it cannot be used.
    """
    data = storage.read_bytes(uri)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise AnnotationError(f"{uri} is not JSON ({error}). {_bytes_hint(data)}") from error
    return parse_coco(document, uri)


def parse_coco(document: Any, source: str) -> CocoDataset:
    """Returns a checked COCO document, decoded from JSON. source: its name in messages. Raises AnnotationError."""
    if not isinstance(document, dict):
        raise AnnotationError(
            f"{source} holds a {type(document).__name__}, not a COCO object with images and annotations.{_list_hint(document)}"
        )
    for part in ("images", "annotations", "categories"):
        if not isinstance(document.get(part), list):
            raise AnnotationError(
                f"{source} has no list '{part}': a COCO file needs images, annotations and categories.{_object_hint(document)}"
            )
    dropped = _Dropped()
    categories = _categories(document["categories"], source)
    images = _images(document["images"], source, dropped)
    annotations = _annotations(document["annotations"], images, {c.id: c for c in categories}, source, dropped)
    return CocoDataset(source, categories, tuple(images.values()), annotations, dict(dropped.counts), dict(dropped.examples))


def flip_pairs(keypoints: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Returns the pairs of keypoint indices that a mirror image swaps: `left_x` and `right_x`."""
    index = {name: number for number, name in enumerate(keypoints)}
    return tuple(
        (number, index["right_" + name.removeprefix("left_")])
        for name, number in index.items()
        if name.startswith("left_") and "right_" + name.removeprefix("left_") in index
    )


class _Dropped:
    """Counts what is left out, by reason, and keeps the first few names."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, tuple[str, ...]] = {}

    def add(self, reason: str, place: object) -> None:
        self.counts[reason] += 1
        if self.counts[reason] <= NAMED:
            self.examples[reason] = (*self.examples.get(reason, ()), str(place))


def _bytes_hint(data: bytes) -> str:
    """Returns a guess at what a file is that is not JSON, and what to do."""
    start = data[:64].lstrip()
    if start.startswith(b"\x1f\x8b"):
        return "It is compressed: unpack it first."
    if start.startswith(b"<"):
        return "It looks like XML: convert it to COCO's JSON first."
    if start.startswith(b"{") and b"}\n{" in data.replace(b"\r", b"")[: 1 << 20]:
        return "It looks like JSON lines: a COCO file is one object with the lists images, annotations and categories."
    return "Give the COCO annotation file, not the images."


def _list_hint(document: Any) -> str:
    first = document[0] if isinstance(document, list) and document else None
    results = isinstance(first, dict) and "score" in first
    return " It looks like detections (COCO results): give the ground truth." if results else ""


def _object_hint(document: Mapping[str, Any]) -> str:
    if "shapes" in document and "imagePath" in document:
        return " It looks like LabelMe's file of one image: export the project as COCO."
    if "_via_img_metadata" in document or any(isinstance(row, dict) and "regions" in row for row in document.values()):
        return " It looks like a project of the VGG Image Annotator: export it as COCO."
    return ""


def _categories(rows: list[Any], source: str) -> tuple[Category, ...]:
    categories: dict[int, Category] = {}
    for number, row in enumerate(rows):
        place = Place(source, "categories", number, row)
        category_id = whole(row, "id", place, INT32)
        name = row.get("name")
        if not isinstance(name, str | int | float) or name == "" or not is_text(str(name)):
            raise AnnotationError(f"{place} has no name.")
        if category_id in categories:
            raise AnnotationError(f"{place} repeats the id {category_id} of '{categories[category_id].name}'.")
        keypoints = _keypoint_names(row, place)
        categories[category_id] = Category(
            id=category_id,
            name=str(name),
            keypoints=keypoints,
            flip_pairs=flip_pairs(keypoints),
            skeleton=_skeleton(row, keypoints, place),
        )
    if not categories:
        raise AnnotationError(f"{source} has no categories.")
    return tuple(categories.values())


def _keypoint_names(row: Mapping[str, Any], place: Place) -> tuple[str, ...]:
    names = row.get("keypoints") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and is_text(name) for name in names):
        raise AnnotationError(f"{place} needs a list of names as its keypoints, not {quoted(names)}.")
    return tuple(names)


def _skeleton(row: Mapping[str, Any], keypoints: Sequence[str], place: Place) -> tuple[tuple[int, int], ...]:
    """Returns the skeleton's edges. COCO counts keypoints from 1, a `Category` from 0."""
    edges = row.get("skeleton") or []
    if not isinstance(edges, list):
        raise AnnotationError(f"{place} needs a list of pairs as its skeleton, not {quoted(edges)}.")
    for edge in edges:
        pair = isinstance(edge, list) and len(edge) == 2
        if not pair or not all(type(end) is int and 1 <= end <= len(keypoints) for end in edge):
            raise AnnotationError(
                f"{place}: the skeleton edge {quoted(edge)} does not join two of its {counted(len(keypoints), 'keypoint')}."
            )
    return tuple((edge[0] - 1, edge[1] - 1) for edge in edges)


def _images(rows: list[Any], source: str, dropped: _Dropped) -> dict[int, CocoImage]:
    images: dict[int, CocoImage] = {}
    for number, row in enumerate(rows):
        place = Place(source, "images", number, row)
        image = image_of(row, place)
        known = images.setdefault(image.id, image)
        if known is not image:
            if known != image:
                raise AnnotationError(
                    f"{place}: the id {image.id} is given to {_described(known)} and to {_described(image)}. Keep one of them."
                )
            dropped.add(REPEATED_IMAGE, f"{place} ({image.file_name})")
    return images


def _described(image: CocoImage) -> str:
    return f"'{image.file_name}' ({image.width} x {image.height})"


def _annotations(
    rows: list[Any],
    images: Mapping[int, CocoImage],
    categories: Mapping[int, Category],
    source: str,
    dropped: _Dropped,
) -> dict[int, tuple[CocoAnnotation, ...]]:
    by_image: dict[int, list[CocoAnnotation]] = {}
    found: list[tuple[CocoImage, CocoAnnotation]] = []
    seen: dict[Any, Any] = {}
    for number, row in enumerate(rows):
        image, annotation, place = _annotation(number, row, images, categories, source)
        own_id = row.get("id")
        if type(own_id) in (int, str) and seen.setdefault(own_id, row) is not row and seen[own_id] == row:
            dropped.add(REPEATED_ROW, place)
            continue
        found.append((image, annotation))
        if annotation.bbox[2] <= 0 or annotation.bbox[3] <= 0:
            dropped.add(ZERO_AREA, place)
        elif not overlaps(annotation.bbox, image):
            dropped.add(OUTSIDE, place)
        else:
            by_image.setdefault(image.id, []).append(annotation)
    _check_units(found, source)
    return {image_id: tuple(kept) for image_id, kept in by_image.items()}


def _annotation(
    number: int, row: Any, images: Mapping[int, CocoImage], categories: Mapping[int, Category], source: str
) -> tuple[CocoImage, CocoAnnotation, Place]:
    place = Place(source, "annotations", number, row)
    image_id, category_id = whole(row, "image_id", place), whole(row, "category_id", place, INT32)
    if image_id not in images:
        raise AnnotationError(f"{place} belongs to the image {image_id}, which `images` does not list.")
    place = Place(source, "annotations", number, row, images[image_id])
    if category_id not in categories:
        raise AnnotationError(f"{place} has the category {category_id}, which `categories` does not list.")
    image, category = images[image_id], categories[category_id]
    bbox = box_of(row, image, place)
    annotation = CocoAnnotation(
        image_id=image_id,
        category_id=category_id,
        bbox=bbox,
        area=area_of(row, bbox, place),
        crowd=crowd_of(row, place),
        segmentation=segmentation_of(row, image, place),
        keypoints=keypoints_of(row, category.name, len(category.keypoints), image, place),
    )
    return image, annotation, place


def _check_units(found: Sequence[tuple[CocoImage, CocoAnnotation]], source: str) -> None:
    """Raises AnnotationError if most boxes seem to be fractions of the image's sides, or two corners instead of a corner and
    sides.
    """
    boxes = np.array([a.bbox for _, a in found], np.float64).reshape(-1, 4)
    sizes = np.array([(image.width, image.height) for image, _ in found], np.float64).reshape(-1, 2)
    drawn = (boxes[:, 2:] > 0).all(axis=1)
    boxes, sizes = boxes[drawn], sizes[drawn]
    with np.errstate(over="ignore"):  # infinitely far is beyond every image
        far = boxes[:, :2] + boxes[:, 2:]
    shares = (boxes[:, :2] >= 0).all(axis=1) & (far <= 1.001).all(axis=1) & (sizes > 2).all(axis=1)
    if (count := int(shares.sum())) * 2 > len(boxes):
        raise AnnotationError(
            f"{source}: {counted_of(count, len(boxes), 'box')} {agreeing(count, 'lies', 'lie')} within 0..1. Such numbers seem "
            "to be shares of the image's sides; COCO's are pixels: multiply x and width by the image's width, y and height by "
            "its height."
        )
    beyond = (far > sizes + 1).any(axis=1)
    corners = (boxes[:, 2:] > boxes[:, :2]).all() and (boxes[:, 2:] <= sizes + 1).all()
    if len(boxes) >= FEW_BOXES and corners and (count := int(beyond.sum())) * 2 > len(boxes):
        raise AnnotationError(
            f"{source}: {counted_of(count, len(boxes), 'box')} reach beyond their image. They seem to be x1, y1, x2, y2; "
            "COCO's are x, y, width, height: subtract x1 from x2 and y1 from y2."
        )
