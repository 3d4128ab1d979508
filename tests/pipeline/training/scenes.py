"""Painted images and their annotations, for the tests of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pycocotools.mask
import torch
from PIL import Image

from masklake.model.config import Category
from masklake.pipeline.coco.document import to_rle
from masklake.pipeline.coco.reading import parse_coco
from masklake.pipeline.training.augmentation import Augmentation, SampleSpec

BIRD = Category(id=4, name="bird", keypoints=("beak", "left_wing", "right_wing"), flip_pairs=((1, 2),))
CAT = Category(id=9, name="cat")
PLAIN = Augmentation(flip=False)


def spec(augmentation: Augmentation = PLAIN, masks: bool = True, seed: int = 0) -> SampleSpec:
    return SampleSpec((BIRD, CAT), masks=masks, keypoints=3, augmentation=augmentation, seed=seed)


def polygon(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def annotation(x: float, y: float, w: float, h: float, category: int = 9, keypoints: Any = ()) -> dict[str, Any]:
    return {"category_id": category, "bbox": [x, y, w, h], "segmentation": polygon(x, y, w, h), "keypoints": keypoints}


def painted(height: int, width: int, annotations: list[dict[str, Any]]) -> torch.Tensor:
    """Black, each instance's pixels 200."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for row in annotations:
        image[:, torch.from_numpy(pycocotools.mask.decode(to_rle(row["segmentation"], height, width))).bool()] = 200
    return image


def dataset_of(tmp_path: Path, images: int, empty: int = 0) -> Any:
    document: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 9, "name": "cat"}]}
    for n in range(images):
        rows = [] if n < empty else [annotation(2 + n, 3, 8, 8)]
        Image.fromarray(painted(24, 48, rows).permute(1, 2, 0).numpy()).save(tmp_path / f"{n}.png")
        document["images"].append({"id": n, "file_name": f"{n}.png", "width": 48, "height": 24})
        document["annotations"] += [
            {"image_id": n, "area": 64, **{k: v for k, v in r.items() if k != "keypoints"}} for r in rows
        ]
    return parse_coco(document, "cats.json")
