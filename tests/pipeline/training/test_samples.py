"""Samples: what the model gets is what was drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from masklake.model.masks.bit_masks import BitMasks
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.training.augmentation import Augmentation, make_sample
from masklake.pipeline.training.loader import load_samples, training_rows
from masklake.pipeline.training.samples import sample_rows, to_training
from tests.pipeline.training.scenes import annotation, dataset_of, painted, spec


def test_the_batch_is_what_was_drawn(tmp_path: Path) -> None:
    rows = training_rows(dataset_of(tmp_path, 3), str(tmp_path), spec())
    batch = sample_rows(load_samples(rows, [(0, 0, n) for n in range(3)], spec(), Storage()))
    images, targets = to_training(batch, spec())
    for n, (image, target) in enumerate(zip(images, targets, strict=True)):
        assert image.shape == (3, 24, 48)
        assert isinstance(target.masks, BitMasks)
        assert target.keypoints is not None
        assert torch.equal(target.masks.unpack()[0].bool(), image[0] > 0)
        assert target.masks.known.all()
        assert target.boxes.tolist() == [[2 + n, 3, 10 + n, 11]]
        assert target.keypoints.shape == (1, 3, 3)
    assert [target.labels.tolist() for target in targets] == [[9]] * 3


def test_an_image_without_instances_is_an_empty_target(tmp_path: Path) -> None:
    rows = training_rows(dataset_of(tmp_path, 2, empty=1), str(tmp_path), spec(), keep_empty=True)
    _, targets = to_training(sample_rows(load_samples(rows, [(0, 0, 0), (0, 0, 1)], spec(), Storage())), spec())
    assert targets[0].boxes.shape == (0, 4)
    assert targets[0].masks is not None
    assert targets[0].masks.shape == (0, 24, 48)


@pytest.mark.parametrize("outline", [None, [[0.2, 0.2, 0.3, 0.2, 0.3, 0.3]]])
@pytest.mark.parametrize("crop", [None, 32])
def test_an_instance_without_an_outline_keeps_its_box_and_has_no_mask(outline: Any, crop: int | None) -> None:
    """Also one whose outline is thinner than any pixel: the box is cut and moved like every other."""
    rows = [annotation(3, 2, 10, 5), {**annotation(12, 4, 6, 9), "segmentation": outline}]
    own = spec(Augmentation(flip=False, crop=crop))
    batch = sample_rows([(0, make_sample(painted(20, 40, rows[:1]), rows, own, (0, 0, 1)))])
    _, [target] = to_training(batch, own)
    assert isinstance(target.masks, BitMasks)
    assert target.labels.tolist() == [9, 9]
    assert target.masks.known.tolist() == [True, False]
    assert target.masks.unpack()[0].any()
    assert not target.masks.unpack()[1].any()
    assert (target.boxes[1, 2:] - target.boxes[1, :2]).tolist() == [6, 9]
