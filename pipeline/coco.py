"""COCO annotation files: read once, checked once, then plain values.

What other readers let pass and fail on later is decided here: an image row that is repeated, an annotation of an unknown image
or category, boxes without an area, crowd regions in either run-length form, files without `info`. The first kinds of trouble
are errors that name the row; what can be left out safely is left out and counted (`CocoDataset.dropped`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import pycocotools.mask
from numpy.typing import NDArray

from model.config import Category
from model.rle import unpack_counts
from pipeline.errors import AnnotationError
from pipeline.storage import Storage, canonical, parent, relative_to

Segmentation: TypeAlias = list[list[float]] | dict[str, Any] | None
"""Polygons (x, y, x, y, ... in pixels), or a run-length encoding {"size": [H, W], "counts": list | str}; None: box only."""

NAMED = 5
"""How many offenders an error message names before it only counts."""

ZERO_AREA, REPEATED_IMAGE, MISSING_FILE = "boxes without an area", "repeated image rows", "images without a file"


@dataclass(frozen=True, slots=True)
class CocoImage:
    """One row of `images`: `file_name` is relative to the image folder; sizes are pixels."""

    id: int
    file_name: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class CocoAnnotation:
    """One row of `annotations`. `bbox` is x, y, width, height in pixels; `keypoints` is x, y, visibility per keypoint, flat."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float
    crowd: bool
    segmentation: Segmentation
    keypoints: tuple[float, ...] = ()


@dataclass(frozen=True)
class CocoDataset:
    """A checked COCO file.

    `annotations` holds every image's own, crowds included; `dropped` counts what was left out, by reason.
    """

    source: str
    categories: tuple[Category, ...]
    images: tuple[CocoImage, ...]
    annotations: Mapping[int, tuple[CocoAnnotation, ...]]
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def has_masks(self) -> bool:
        """Whether every instance that is not a crowd has an outline to learn from."""
        instances = [a for rows in self.annotations.values() for a in rows if not a.crowd]
        return bool(instances) and all(a.segmentation is not None for a in instances)

    @property
    def has_keypoints(self) -> bool:
        """Whether any category names keypoints."""
        return any(category.keypoints for category in self.categories)

    def instance_count(self) -> int:
        """Annotations that are not crowd regions."""
        return sum(not a.crowd for rows in self.annotations.values() for a in rows)


def read_coco(storage: Storage, uri: str) -> CocoDataset:
    """Reads and checks the COCO JSON at `uri` (local path or s3://).

    Raises InputNotFoundError, AccessDeniedError or StorageError when it cannot be fetched, AnnotationError when it cannot be
    used.
    """
    data = storage.read_bytes(uri)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise AnnotationError(f"{uri} is not JSON ({error}). Give the COCO annotation file, not the images.") from error
    return parse_coco(document, uri)


def parse_coco(document: Any, source: str) -> CocoDataset:
    """Checks a decoded COCO document; `source` names it in messages. Raises AnnotationError."""
    if not isinstance(document, dict):
        raise AnnotationError(f"{source} holds a {type(document).__name__}, not a COCO object with images and annotations.")
    for part in ("images", "annotations", "categories"):
        if not isinstance(document.get(part), list):
            raise AnnotationError(f"{source} has no list '{part}': a COCO file needs images, annotations and categories.")
    dropped: Counter[str] = Counter()
    try:
        categories = _categories(document["categories"], source)
        images = _images(document["images"], source, dropped)
        annotations = _annotations(document["annotations"], images, {c.id: c for c in categories}, source, dropped)
    except (TypeError, ValueError, OverflowError) as error:  # a value of a kind that no check foresaw
        raise AnnotationError(f"{source} holds a value that no COCO file has ({error}).") from error
    return CocoDataset(source, categories, tuple(images.values()), annotations, dict(dropped))


def _categories(rows: list[Any], source: str) -> tuple[Category, ...]:
    categories: dict[int, Category] = {}
    for number, row in enumerate(rows):
        where = f"{source}: categories[{number}]"
        category_id, name = _integer(row, "id", where), str(row.get("name", ""))
        if not name:
            raise AnnotationError(f"{where} has no name.")
        if category_id in categories:
            raise AnnotationError(f"{where} repeats the id {category_id} of '{categories[category_id].name}'.")
        keypoints = tuple(str(keypoint) for keypoint in row.get("keypoints") or ())
        categories[category_id] = Category(
            id=category_id,
            name=name,
            keypoints=keypoints,
            flip_pairs=flip_pairs(keypoints),
            skeleton=_skeleton(row, keypoints, where),
        )
    if not categories:
        raise AnnotationError(f"{source} has no categories.")
    return tuple(categories.values())


def _skeleton(row: Mapping[str, Any], keypoints: Sequence[str], where: str) -> tuple[tuple[int, int], ...]:
    """COCO counts a skeleton's ends from 1, a `Category` from 0."""
    edges = []
    for edge in row.get("skeleton") or ():
        if len(edge) != 2 or not all(isinstance(end, int) and 1 <= end <= len(keypoints) for end in edge):
            raise AnnotationError(f"{where}: the skeleton edge {edge} does not join two of its {len(keypoints)} keypoints.")
        edges.append((edge[0] - 1, edge[1] - 1))
    return tuple(edges)


def flip_pairs(keypoints: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Which keypoints a mirror exchanges: `left_x` and `right_x`, as indices; every other keypoint stays itself."""
    index = {name: number for number, name in enumerate(keypoints)}
    return tuple(
        (number, index["right_" + name.removeprefix("left_")])
        for name, number in index.items()
        if name.startswith("left_") and "right_" + name.removeprefix("left_") in index
    )


def _images(rows: list[Any], source: str, dropped: Counter[str]) -> dict[int, CocoImage]:
    images: dict[int, CocoImage] = {}
    for number, row in enumerate(rows):
        where = f"{source}: images[{number}]"
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            raise AnnotationError(f"{where} has no file_name.")
        image = CocoImage(_integer(row, "id", where), name, _integer(row, "width", where), _integer(row, "height", where))
        if image.width <= 0 or image.height <= 0:
            raise AnnotationError(f"{where} ({name}) has the size {image.width} x {image.height}.")
        known = images.setdefault(image.id, image)
        if known is not image:
            if known != image:
                raise AnnotationError(f"{where}: the id {image.id} is given to {known} and to {image}. Keep one of them.")
            dropped[REPEATED_IMAGE] += 1
    return images


def _annotations(
    rows: list[Any],
    images: Mapping[int, CocoImage],
    categories: Mapping[int, Category],
    source: str,
    dropped: Counter[str],
) -> dict[int, tuple[CocoAnnotation, ...]]:
    by_image: dict[int, list[CocoAnnotation]] = {}
    for number, row in enumerate(rows):
        where = f"{source}: annotations[{number}]"
        image_id, category_id = _integer(row, "image_id", where), _integer(row, "category_id", where)
        if image_id not in images:
            raise AnnotationError(f"{where} belongs to the image {image_id}, which `images` does not list.")
        if category_id not in categories:
            raise AnnotationError(f"{where} has the category {category_id}, which `categories` does not list.")
        bbox = _bbox(row, where)
        if bbox[2] <= 0 or bbox[3] <= 0:
            dropped[ZERO_AREA] += 1
            continue
        segmentation = _segmentation(row.get("segmentation"), images[image_id], where)
        keypoints = _keypoints(row, categories[category_id], where)
        area = row.get("area")
        by_image.setdefault(image_id, []).append(
            CocoAnnotation(
                image_id=image_id,
                category_id=category_id,
                bbox=bbox,
                area=float(area) if isinstance(area, int | float) else bbox[2] * bbox[3],
                crowd=bool(row.get("iscrowd", 0)),
                segmentation=segmentation,
                keypoints=keypoints,
            )
        )
    return {image_id: tuple(found) for image_id, found in by_image.items()}


def _integer(row: Any, key: str, where: str) -> int:
    value = row.get(key) if isinstance(row, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise AnnotationError(f"{where} needs a whole number '{key}', not {value!r}.")
    return int(value)


def _bbox(row: Mapping[str, Any], where: str) -> tuple[float, float, float, float]:
    bbox = row.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_finite(side) for side in bbox):
        raise AnnotationError(f"{where} needs a bbox [x, y, width, height] of finite numbers, not {bbox!r}.")
    x, y, width, height = (float(side) for side in bbox)
    return x, y, width, height


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _keypoints(row: Mapping[str, Any], category: Category, where: str) -> tuple[float, ...]:
    keypoints = row.get("keypoints") or ()
    if not category.keypoints or not keypoints:
        return ()
    if len(keypoints) != 3 * len(category.keypoints) or not all(_is_finite(value) for value in keypoints):
        raise AnnotationError(
            f"{where} has {len(keypoints)} keypoint numbers; '{category.name}' with {len(category.keypoints)} keypoints needs "
            f"{3 * len(category.keypoints)} finite ones (x, y, visibility)."
        )
    return tuple(float(value) for value in keypoints)


def _segmentation(value: Any, image: CocoImage, where: str) -> Segmentation:
    """Polygons of at least three corners, or a run-length encoding of this image's size; None when there is no outline."""
    if not value:
        return None
    if isinstance(value, dict):
        return _checked_rle(value, image, where)
    if not isinstance(value, list) or not all(isinstance(polygon, list) for polygon in value):
        raise AnnotationError(f"{where}: the segmentation is neither polygons nor a run-length encoding.")
    for polygon in value:
        if len(polygon) % 2 or not all(_is_finite(coordinate) for coordinate in polygon):
            raise AnnotationError(f"{where} has a polygon of {len(polygon)} numbers; x, y pairs of finite numbers are needed.")
    return [polygon for polygon in value if len(polygon) >= 6] or None


def _checked_rle(value: Mapping[str, Any], image: CocoImage, where: str) -> dict[str, Any]:
    size, counts = value.get("size"), value.get("counts")
    if size != [image.height, image.width]:
        raise AnnotationError(f"{where}: the mask's size {size} is not its image's [{image.height}, {image.width}].")
    try:
        runs = np.asarray(counts) if isinstance(counts, list) else unpack_counts(str(counts).encode())
    except ValueError as error:
        raise AnnotationError(f"{where}: the mask's counts are no run lengths ({error}).") from error
    # Readers in C trust this sum: without the check they would give pixels that nobody wrote.
    pixels = image.height * image.width
    if (
        runs.dtype.kind != "i"
        or runs.ndim != 1
        or (runs < 0).any()
        or (runs > pixels).any()
        or runs.sum() != image.height * image.width
    ):
        raise AnnotationError(f"{where}: the mask's runs do not add up to its {image.height} x {image.width} pixels.")
    return {"size": size, "counts": counts}


def to_rle(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """The region as one compressed run-length encoding of (height, width) pixels, as pycocotools draws it."""
    if segmentation is None:
        raise AnnotationError("an annotation without an outline has no mask.")
    if isinstance(segmentation, list):
        return dict(pycocotools.mask.merge(pycocotools.mask.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        return dict(pycocotools.mask.frPyObjects(segmentation, height, width))
    return segmentation


def to_mask(segmentation: Segmentation, height: int, width: int) -> NDArray[np.uint8]:
    """The region as uint8 (height, width) of 0 and 1."""
    return np.asarray(pycocotools.mask.decode([to_rle(segmentation, height, width)])[:, :, 0])


def to_document(dataset: CocoDataset, image_ids: Iterable[int] | None = None) -> dict[str, Any]:
    """The data set (or only these images) as a COCO document; annotation ids count from 1, as evaluators take 0 for "none"."""
    kept = {image.id for image in dataset.images} if image_ids is None else set(image_ids)
    annotations = [a for image_id, rows in dataset.annotations.items() if image_id in kept for a in rows]
    return {
        "images": [
            {"id": image.id, "file_name": image.file_name, "width": image.width, "height": image.height}
            for image in dataset.images
            if image.id in kept
        ],
        "annotations": [_row(number, a) for number, a in enumerate(annotations, start=1)],
        "categories": [
            {"id": c.id, "name": c.name} | ({"keypoints": list(c.keypoints)} if c.keypoints else {}) for c in dataset.categories
        ],
    }


def _row(number: int, annotation: CocoAnnotation) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": number,
        "image_id": annotation.image_id,
        "category_id": annotation.category_id,
        "bbox": list(annotation.bbox),
        "area": annotation.area,
        "iscrowd": int(annotation.crowd),
    }
    if annotation.segmentation is not None:
        row["segmentation"] = annotation.segmentation
    elif annotation.crowd:  # evaluators ask a crowd for its region whenever they score masks
        x, y, width, height = annotation.bbox
        row["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    if annotation.keypoints:
        row["keypoints"] = list(annotation.keypoints)
        row["num_keypoints"] = sum(visibility > 0 for visibility in annotation.keypoints[2::3])
    return row


def image_folder(given: str | None, annotations: str) -> str:
    """Where the images of the COCO file at `annotations` are: the folder that is given, else `images` beside the file."""
    return canonical(given) if given is not None else Storage.join(parent(annotations), "images")


def with_files(storage: Storage, dataset: CocoDataset, folder: str, allow_missing: bool = False) -> CocoDataset:
    """The data set, after a look whether every image's file can be reached in `folder` (local path or s3://).

    Without `allow_missing` an absent file is an AnnotationError that names a few; with it, its image and annotations are left
    out and counted. When no file at all is there it is an error either way.
    """
    uris = [relative_to(folder, image.file_name) for image in dataset.images]
    sizes = storage.stat_many(uris).column("bytes").to_pylist() if uris else []
    missing = [image for image, size in zip(dataset.images, sizes, strict=True) if size is None]
    if not missing:
        return dataset
    names = ", ".join(image.file_name for image in missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
    found = f"{len(missing)} of the {len(dataset.images)} images of {dataset.source} are not in {folder}: {names}."
    if len(missing) == len(dataset.images):
        raise AnnotationError(f"{found} Check the image folder.")
    if not allow_missing:
        raise AnnotationError(f"{found} Check the image folder, or leave them out with --allow-missing.")
    return _without(dataset, {image.id for image in missing}, MISSING_FILE)


def _without(dataset: CocoDataset, image_ids: Collection[int], reason: str) -> CocoDataset:
    return replace(
        dataset,
        images=tuple(image for image in dataset.images if image.id not in image_ids),
        annotations={image_id: rows for image_id, rows in dataset.annotations.items() if image_id not in image_ids},
        dropped={**dataset.dropped, reason: len(image_ids)},
    )
