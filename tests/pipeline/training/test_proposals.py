"""Stored proposals reach the training sample of their image, moved as the image is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from masklake.model.config import Category
from masklake.pipeline.blocks import packed
from masklake.pipeline.coco.reading import parse_coco
from masklake.pipeline.errors import AnnotationError, InputNotFoundError
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.training.augmentation import Augmentation, SampleSpec, make_sample
from masklake.pipeline.training.loader import load_samples, training_rows
from masklake.pipeline.training.proposals import PROPOSAL_SCHEMA, read_proposals
from masklake.pipeline.training.proposer import Proposer
from masklake.pipeline.training.samples import sample_rows, to_training

CAT = Category(id=9, name="cat")


def spec(**changes: Any) -> SampleSpec:
    return SampleSpec((CAT,), masks=False, keypoints=0, augmentation=Augmentation(**changes), seed=0)


def annotation(x: float, y: float, w: float, h: float) -> dict[str, Any]:
    return {"category_id": 9, "bbox": [x, y, w, h], "segmentation": None, "keypoints": ()}


def stored(**changes: Any) -> pa.Table:
    rows = [{"file_name": f"{n}.png", "width": 48, "height": 24, "boxes": [n, 2, 20, 12]} for n in (2, 0, 1)]
    return pa.Table.from_pylist([{**row, **changes} for row in rows], schema=PROPOSAL_SCHEMA)


def dataset() -> Any:
    images = [{"id": 10 + n, "file_name": f"{n}.png", "width": 48, "height": 24} for n in range(3)]
    rows = [{"image_id": 10 + n, "category_id": 9, "bbox": [4, 3, 8, 8], "area": 64} for n in range(3)]
    return parse_coco({"images": images, "annotations": rows, "categories": [{"id": 9, "name": "cat"}]}, "cats.json")


@pytest.mark.parametrize("changes", [{}, {"flip_vertical": True}, {"scale": (0.5, 2.0)}, {"crop": 40}])
def test_a_proposal_on_an_object_stays_on_it(changes: dict[str, Any]) -> None:
    """However the image is changed: what becomes of an instance's box becomes of the same box among the proposals."""
    box = np.array([[20.0, 30, 61, 52]])
    sizes = set()
    for n in range(20):
        sample = make_sample(
            torch.zeros(3, 90, 120, dtype=torch.uint8), [annotation(20, 30, 41, 22)], spec(**changes), (0, 0, n), box
        )
        np.testing.assert_array_equal(sample.proposals, sample.boxes)
        sizes.add(tuple(sample.boxes.ravel()))
    assert len(sizes) > 1, "the augmentation did something"


def test_proposals_outside_of_the_window_go_and_the_order_stays() -> None:
    boxes = np.array([[0.0, 0, 30, 30], [500, 0, 540, 30], [2, 3, 40, 50], [0, 0, 0.5, 40]])
    image = torch.zeros(3, 100, 600, dtype=torch.uint8)
    sample = make_sample(image, [annotation(2, 3, 30, 30)], spec(flip=False, crop=64), (0,), boxes)
    assert sample.proposals is not None
    assert len(sample.proposals) == 2
    assert (sample.proposals[0][2:] <= sample.proposals[1][2:]).all()
    none = make_sample(image, [annotation(2, 3, 30, 30)], spec(flip=False, crop=64), (0,), np.zeros((0, 4)))
    assert none.proposals is not None
    assert none.proposals.shape == (0, 4)


def test_they_travel_to_the_model(tmp_path: Path) -> None:
    for n in range(3):
        Image.new("RGB", (48, 24)).save(tmp_path / f"{n}.png")
    rows = training_rows(dataset(), str(tmp_path), spec(flip=False), proposals=stored())
    batch = sample_rows(load_samples(rows, [(0, 0, n) for n in range(3)], spec(flip=False), Storage()))
    _, targets = to_training(batch, spec())
    assert [target.proposals.tolist() for target in targets] == [[[n, 2, 20, 12]] for n in range(3)]
    without = sample_rows(load_samples(rows.drop(["proposals"]), [(0, 0, n) for n in range(3)], spec(), Storage()))
    assert [target.proposals for target in to_training(without, spec())[1]] == [None] * 3


def test_an_image_of_another_size_than_its_row_has_no_proposals(tmp_path: Path) -> None:
    """A remote image whose size stands far behind its beginning is decoded here first."""
    Image.new("RGB", (48, 24)).save(tmp_path / "a.png")
    proposer = object.__new__(Proposer)
    proposer._storage = Storage()
    proposer._model = SimpleNamespace(propose=lambda images: [np.array([[1, 2, 3, 4]], np.float32)])
    row = {"file_name": "a.png", "uri": str(tmp_path / "a.png"), "width": 48, "height": 24}
    block = pa.Table.from_pylist([row, {**row, "width": 24, "height": 48}])
    right, wrong = proposer(pa.Table.from_pylist([packed(block)])).to_pylist()
    assert (right["boxes"], right["error"]) == ([1, 2, 3, 4], None)
    assert (wrong["boxes"], wrong["error"]) == (None, "the upright image is 48 x 24 pixels, its annotations are for 24 x 48")


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    pq.write_table(stored(), tmp_path / "good.parquet")
    assert read_proposals(Storage(), str(tmp_path / "good.parquet")).equals(stored())
    with pytest.raises(InputNotFoundError):
        read_proposals(Storage(), str(tmp_path / "none.parquet"))
    pq.write_table(pa.table({"file_name": ["a"]}), tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("no Parquet")
    for name in ("other", "text"):
        with pytest.raises(AnnotationError, match=r"holds no proposals.*masklake propose"):
            read_proposals(Storage(), str(tmp_path / f"{name}.parquet"))
    with pytest.raises(AnnotationError, match=r"1 of the 3 images has no proposals: 1\.png"):
        training_rows(dataset(), str(tmp_path), spec(), proposals=stored().slice(0, 2))
    with pytest.raises(AnnotationError, match=r"0\.png: its proposals are of an image of another size"):
        training_rows(dataset(), str(tmp_path), spec(), proposals=stored(width=47))


@pytest.mark.parametrize("boxes", [None, [1, 2, 3], [1, 2, 3, float("nan")], [1, 2, None, 4], [0, 0, float("inf"), 1]])
def test_boxes_that_are_none_are_refused_by_image(tmp_path: Path, boxes: list[float] | None) -> None:
    rows = [*stored().to_pylist(), {"file_name": "x.png", "width": 48, "height": 24, "boxes": boxes}]
    pq.write_table(pa.Table.from_pylist(rows, schema=PROPOSAL_SCHEMA), tmp_path / "p.parquet")
    with pytest.raises(AnnotationError, match=r"1 of the 4 images has proposals .* not boxes of four finite numbers: x\.png"):
        read_proposals(Storage(), str(tmp_path / "p.parquet"))


def test_images_without_any_proposal_are_taken(tmp_path: Path) -> None:
    rows = [{"file_name": "x.png", "width": 48, "height": 24, "boxes": []}]
    for table in (pa.Table.from_pylist(rows, schema=PROPOSAL_SCHEMA), PROPOSAL_SCHEMA.empty_table()):
        pq.write_table(table, tmp_path / "p.parquet")
        assert read_proposals(Storage(), str(tmp_path / "p.parquet")).equals(table)
