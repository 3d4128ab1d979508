"""Operators without the package: the same numbers as torchvision's functions, and no import of it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from masklake.model import torchvision_ops


def random_boxes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=random) * 200
    boxes = torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=random) * 80], dim=1)
    scores = (torch.rand(count, generator=random) * 50).round() / 50  # with ties
    return boxes, scores, torch.randint(0, 5, (count,), generator=random)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 60), iou=st.sampled_from([0.3, 0.5, 0.7]))
def test_few_boxes(seed: int, count: int, iou: float) -> None:
    boxes, scores, groups = random_boxes(count, seed)
    assert torch.equal(
        torchvision_ops.batched_nms(boxes, scores, groups, iou), torchvision.ops.batched_nms(boxes, scores, groups, iou)
    )


@pytest.mark.parametrize("seed", range(3))
def test_many_boxes(seed: int) -> None:
    boxes, scores, groups = random_boxes(1500, seed)
    assert boxes.numel() > torchvision_ops.FEW_COORDINATES
    assert torch.equal(
        torchvision_ops.batched_nms(boxes, scores, groups, 0.5), torchvision.ops.batched_nms(boxes, scores, groups, 0.5)
    )


def test_box_iou() -> None:
    left, right = random_boxes(40, 1)[0], random_boxes(30, 2)[0]
    torch.testing.assert_close(torchvision_ops.box_iou(left, right), torchvision.ops.box_iou(left, right), rtol=0, atol=0)
    assert torchvision_ops.box_iou(left[:0], right).shape == (0, 30)


def test_a_model_predicts_without_the_package_and_without_torchs_compiler() -> None:
    code = (
        "import sys, torch; from masklake.model import create_model; "
        "create_model('tiny').predict([torch.zeros(3, 64, 64).byte()]);"
        "sys.exit(not {'torchvision', 'torch._dynamo'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
