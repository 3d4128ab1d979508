"""Packed masks are the masks, and an instance without one trains everything but the mask branch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from masklake.model import create_model
from masklake.model.heads import mask as mask_head
from masklake.model.heads.mask import mask_targets
from masklake.model.instances import Target
from masklake.model.masks.bit_masks import BitMasks
from masklake.model.proposals.rpn import Regions
from masklake.model.rois.targets import Truth, sample_regions
from masklake.model.sampling import SampleRule


@pytest.mark.parametrize("height", [1, 7, 8, 9, 40])
def test_unpacking_gives_the_masks_back(height: int) -> None:
    masks = torch.from_numpy(np.random.default_rng(height).integers(0, 2, (3, height, 5), dtype=np.uint8))
    packed = BitMasks.pack(masks)
    assert packed.shape == (3, height, 5)
    assert packed.bits.shape == (3, 5, -(-height // 8))
    assert torch.equal(packed.unpack(), masks)
    assert torch.equal(packed[torch.tensor([True, False, True])].unpack(), masks[[0, 2]])
    assert BitMasks.pack(masks[:0]).unpack().shape == (0, height, 5)


def test_targets_are_the_same_bit_by_bit_however_many_masks_are_unpacked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    masks = BitMasks.pack(torch.from_numpy(random.integers(0, 2, (6, 30, 50), dtype=np.uint8)))
    corners = torch.from_numpy(random.uniform(0, 25, (40, 2)).astype(np.float32))
    boxes = torch.cat([corners, corners + torch.from_numpy(random.uniform(1, 20, (40, 2)).astype(np.float32))], dim=1)
    index = torch.from_numpy(random.choice([0, 2, 3, 5], 40))
    whole = mask_targets(masks, boxes, index, 14)
    assert whole.unique().numel() > 100
    monkeypatch.setattr(mask_head, "PIXELS_AT_ONCE", 2 * 30 * 50)
    assert torch.equal(mask_targets(masks, boxes, index, 14), whole)


def test_few_masks_are_unpacked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 masks of 2000 x 2000 pixels would be 960 MB as floats."""
    pixels: list[int] = []
    unpack = BitMasks.unpack

    def counting(masks: BitMasks) -> torch.Tensor:
        unpacked = unpack(masks)
        pixels.append(unpacked.numel())
        return unpacked

    monkeypatch.setattr(BitMasks, "unpack", counting)
    masks = BitMasks.of([None] * 60, (2000, 2000), 60)
    assert masks.bits.nbytes == 60 * 2000 * 2000 / 8
    mask_targets(masks, torch.tensor([[10.0, 10, 90, 90]]).repeat(60, 1), torch.arange(60), 28)
    assert sum(pixels) == 60 * 2000 * 2000
    assert max(pixels) <= mask_head.PIXELS_AT_ONCE


def test_regions_of_instances_without_a_mask_are_not_in_the_mask_loss() -> None:
    rule = SampleRule(0.5, 0.5, 512, 0.25)
    boxes = torch.tensor([[0.0, 0, 20, 20], [30, 30, 60, 60]])
    masks = BitMasks.of([np.ones((64, 64), np.uint8), None], (64, 64), 2)
    truth = Truth(boxes, torch.tensor([1, 2]), masks, None, torch.ones(2), None)
    torch.manual_seed(0)
    samples = sample_regions(Regions(torch.tensor([[80.0, 80, 90, 90]]), torch.zeros(1, dtype=torch.int64)), [truth], rule)
    assert sorted(zip(samples.labels.tolist(), samples.outlined.tolist(), strict=True)) == [(0, False), (1, True), (2, False)]
    without = sample_regions(
        Regions(boxes, torch.zeros(2, dtype=torch.int64)),
        [
            Truth(
                boxes[:0],
                torch.zeros(0, dtype=torch.int64),
                masks[torch.tensor([], dtype=torch.int64)],
                None,
                torch.ones(2),
                None,
            )
        ],
        rule,
    )
    assert not without.outlined.any()


@pytest.mark.parametrize("known", [[True, False], [False, False]])
def test_a_step_learns_from_what_is_known(known: list[bool]) -> None:
    torch.manual_seed(0)
    model = create_model("tiny").train()
    labels = torch.tensor([category.id for category in model.config.categories[:2]])
    boxes = torch.tensor([[4.0, 4, 40, 40], [50, 50, 90, 90]])
    mask = np.zeros((96, 96), np.uint8)
    mask[4:40, 4:40] = 1
    masks = BitMasks.of([mask if there else None for there in known], (96, 96), 2)
    keypoints = torch.zeros(2, model.config.num_keypoints, 3) if "keypoint" in model.config.tasks else None
    losses = model([torch.zeros(3, 96, 96, dtype=torch.uint8)], [Target(boxes, labels, masks, keypoints)])
    assert (losses["mask"] > 0) == any(known)
    assert losses["classifier"] > 0
    torch.stack(list(losses.values())).sum().backward()
    assert all(weight.grad is not None for weight in model.network.mask_head.parameters())
