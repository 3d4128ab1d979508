"""The generated data set: valid COCO, true masks, reproducible."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
from PIL import Image
from pycocotools.coco import COCO

from masklake.jobs import shapes


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())).hexdigest()


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        shapes.generate(tmp_path / name, images=4, size=96, seed=seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_pycocotools_reads_it_and_every_row_agrees_with_its_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = COCO(str(shapes.generate(tmp_path, images=20, size=128, seed=1)))
    assert {annotation["category_id"] for annotation in coco.anns.values()} == {shapes.DISK, shapes.TRIANGLE, shapes.ARROW}
    for image in coco.imgs.values():
        with Image.open(tmp_path / "images" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
        masks = [coco.annToMask(annotation) for annotation in coco.imgToAnns[image["id"]]]
        assert np.sum(masks, axis=0).max() == 1, "a pixel shows one shape"
    for annotation in coco.anns.values():
        assert annotation["area"] == coco.annToMask(annotation).sum()
        np.testing.assert_array_equal(annotation["bbox"], pycocotools.mask.toBbox(coco.annToRLE(annotation)))


def test_arrows_alone_have_keypoints_and_a_visible_tip_lies_on_the_mask(tmp_path: Path) -> None:
    document = json.loads(shapes.generate(tmp_path, images=30, size=160, seed=2).read_text())
    for annotation in document["annotations"]:
        assert ("keypoints" in annotation) == (annotation["category_id"] == shapes.ARROW)
        for x, y, flag in zip(*[iter(annotation.get("keypoints", []))] * 3, strict=True):
            left, top, width, height = annotation["bbox"]
            if flag == 2:
                assert left - 3 <= x <= left + width + 3
                assert top - 3 <= y <= top + height + 3


def test_an_arrow_has_its_left_wing_on_its_left() -> None:
    up = shapes.arrow(np.zeros(2), 10, -np.pi / 2)  # image y points down
    assert up.keypoints is not None
    tip, left_wing, right_wing, tail = up.keypoints
    assert tip[1] < tail[1]
    assert left_wing[0] < right_wing[0]
