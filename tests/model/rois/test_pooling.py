"""RoIPool and RoIWarp (table 2c): torchvision's operators and a slow loop as oracles."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from masklake.model.kernels.roi_align import roi_align
from masklake.model.rois.pooling import roi_pool, snap_to_cells

SCALES = [1 / 4, 1 / 8]


@pytest.fixture
def inputs() -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 5, 24, 32, generator=generator), torch.randn(2, 5, 12, 16, generator=generator)]
    corners = torch.rand(40, 2, 2, generator=generator) * torch.tensor([128.0, 96.0])
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    boxes[0] = torch.tensor([-20.0, -12.0, 30.0, 20.0])  # beyond the image
    boxes[1] = torch.tensor([6.0, 10.0, 6.0, 10.0])  # without an area, on halves of a cell
    rois = torch.cat([torch.randint(0, 2, (40, 1), generator=generator).float(), boxes], dim=1)
    return features, rois, torch.randint(0, 2, (40,), generator=generator)


def each_level(features: list[Tensor], rois: Tensor, levels: Tensor, pool: object) -> Tensor:
    """The oracle of one level, level by level."""
    out = torch.zeros(len(rois), features[0].shape[1], 7, 7)
    for level, scale in enumerate(SCALES):
        members = levels == level
        out[members] = pool(features[level], rois[members], scale)
    return out


def test_the_largest_pixel_is_torchvisions(inputs: tuple[list[Tensor], Tensor, Tensor]) -> None:
    expected = each_level(*inputs, lambda f, r, s: torchvision.ops.roi_pool(f, r, 7, s))
    assert torch.equal(roi_pool(*inputs, SCALES, 7), expected)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_images_and_levels_that_do_not_exist_give_zeros(inputs: tuple[list[Tensor], Tensor, Tensor], mode: str) -> None:
    features, rois, levels = inputs
    expected = roi_pool(features, rois, levels, SCALES, 7, mode=mode)
    rois[0, 0], rois[1, 0], levels[2] = -1, 2, 2
    expected[:3] = 0
    assert torch.equal(roi_pool(features, rois, levels, SCALES, 7, mode=mode), expected)


def mean_by_loops(feature: Tensor, rois: Tensor, scale: float) -> Tensor:
    """Fast R-CNN's bins, written down one by one."""
    height, width = feature.shape[-2:]
    out = torch.zeros(len(rois), feature.shape[1], 7, 7)
    for row, roi in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (int(math.copysign(math.floor(abs(v * scale) + 0.5), v)) for v in roi[1:])
        for py in range(7):
            for px in range(7):
                rows, columns = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
                top, bottom = y1 + math.floor(py * rows / 7), y1 + math.ceil((py + 1) * rows / 7)
                left, right = x1 + math.floor(px * columns / 7), x1 + math.ceil((px + 1) * columns / 7)
                part = feature[
                    int(roi[0]), :, max(top, 0) : max(min(bottom, height), 0), max(left, 0) : max(min(right, width), 0)
                ]
                if part.numel():
                    out[row, :, py, px] = part.mean(dim=(1, 2))
    return out


def test_the_mean_is_of_the_same_bins(inputs: tuple[list[Tensor], Tensor, Tensor]) -> None:
    torch.testing.assert_close(roi_pool(*inputs, SCALES, 7, "avg"), each_level(*inputs, mean_by_loops))


def test_a_pixel_that_is_not_finite_spoils_its_own_bins_alone(inputs: tuple[list[Tensor], Tensor, Tensor]) -> None:
    features, rois, levels = inputs
    expected = each_level(features, rois, levels, mean_by_loops)
    spoilt = [feature.clone() for feature in features]
    for feature in spoilt:
        feature[:, 0, 3, 3], feature[:, 1, 5, 2] = torch.inf, torch.nan
    looped, pooled = each_level(spoilt, rois, levels, mean_by_loops), roi_pool(spoilt, rois, levels, SCALES, 7, "avg")
    assert torch.equal(pooled.isfinite(), looped.isfinite())
    assert not looped.isfinite().all()
    torch.testing.assert_close(pooled.where(pooled.isfinite(), 0), expected.where(pooled.isfinite(), 0))


@pytest.mark.parametrize("mode", ["max", "avg"])
def test_gradients_are_exact(inputs: tuple[list[Tensor], Tensor, Tensor], mode: str) -> None:
    features, rois, levels = inputs
    doubles = [feature[:, :2].double().requires_grad_() for feature in features]
    assert torch.autograd.gradcheck(
        lambda *f: roi_pool(f, rois[:6].double(), levels[:6], SCALES, 3, mode), doubles, fast_mode=True
    )


def test_the_gradient_needs_no_package_of_torchvisions() -> None:
    """A training never imports it, and the compiled operator alone lets no gradient through."""
    code = """
import sys, torch
from masklake.model.rois.pooling import roi_pool
feature = torch.randn(1, 2, 8, 8, dtype=torch.float64, requires_grad=True)
rois = torch.tensor([[0.0, 4, 4, 100, 100], [0, 0, 0, 60, 60]], dtype=torch.float64)
levels = torch.zeros(2, dtype=torch.int64)
assert torch.autograd.gradcheck(lambda f: roi_pool([f], rois, levels, [1 / 16], 3), (feature,))
assert "torchvision" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_half_precision_keeps_its_type(inputs: tuple[list[Tensor], Tensor, Tensor]) -> None:
    features, rois, levels = inputs
    for mode in ("max", "avg"):
        pooled = roi_pool([f.bfloat16() for f in features], rois, levels, SCALES, 7, mode)
        assert pooled.dtype == torch.bfloat16
        torch.testing.assert_close(pooled.float(), roi_pool(features, rois, levels, SCALES, 7, mode), rtol=2e-2, atol=2e-2)


def test_warp_is_align_of_a_rounded_region(inputs: tuple[list[Tensor], Tensor, Tensor]) -> None:
    features, rois, levels = inputs
    snapped = snap_to_cells(rois, levels, SCALES)
    cells = snapped[:, 1:] * torch.tensor(SCALES)[levels][:, None]
    assert torch.equal(cells, cells.round())
    assert (snapped - rois).abs().amax() <= 0.5 / min(SCALES)
    assert snapped[1, 1:].tolist() == [8, 8, 8, 8] if levels[1] else [8, 12, 8, 12]
    expected = each_level(features, snapped, levels, lambda f, r, s: torchvision.ops.roi_align(f, r, 7, s, 2))
    torch.testing.assert_close(roi_align(features, snapped, levels, SCALES, 7), expected)
