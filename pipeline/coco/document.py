"""Converts a COCO data set: regions to run-length encodings, and the whole to a COCO document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pycocotools.mask

from masklake.pipeline.coco.dataset import CocoAnnotation, CocoDataset
from masklake.pipeline.coco.values import Segmentation
from masklake.pipeline.errors import AnnotationError


def to_rle(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """Returns the region as one compressed run-length encoding of (height, width) pixels, rasterised by pycocotools.

    Raises AnnotationError for an annotation without an outline.
    """
    if segmentation is None:
        raise AnnotationError("an annotation without an outline has no mask.")
    if isinstance(segmentation, list):
        return dict(pycocotools.mask.merge(pycocotools.mask.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        return dict(pycocotools.mask.frPyObjects(segmentation, height, width))
    return segmentation


def to_document(dataset: CocoDataset, image_ids: Iterable[int] | None = None) -> dict[str, Any]:
    """Returns the data set (or only these images) as a COCO document. Annotation ids start at 1, because evaluators use 0 for
    "none".
    """
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
        row["segmentation"] = [box_outline(annotation.bbox)]
    if annotation.keypoints:
        row["keypoints"] = list(annotation.keypoints)
        row["num_keypoints"] = sum(visibility > 0 for visibility in annotation.keypoints[2::3])
    return row


def box_outline(bbox: Sequence[float]) -> list[float]:
    """Returns the box (x, y, width, height) as a polygon."""
    x, y, width, height = bbox
    return [x, y, x + width, y, x + width, y + height, x, y + height]
