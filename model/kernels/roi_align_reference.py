"""RoIAlign, slow and obvious: one RoI and one bin at a time (Mask R-CNN, section 3, "RoIAlign").

The definition that the CPU path and the Triton kernel are tested against. Shape letters: R RoIs, B images, C channels, Hl x Wl
pixels of a pyramid level, P output bins per side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from masklake.model.kernels.layout import FARTHEST


def roi_align_reference(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: int,
    sampling_ratio: int = 2,
    aligned: bool = False,
    mode: str = "avg",
) -> Tensor:
    """Samples the bins of each RoI bilinearly and pools the samples; see `roi_align` for the arguments.

    Returns (R, C, P, P) in the features' dtype, computed in float32 (float64 for float64 features). Differentiable in
    the features through ordinary torch operations.
    """
    compute = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    empty = features[0].new_zeros((0, features[0].shape[1], output_size, output_size))
    pooled = []
    for roi, level in zip(rois.to(compute), levels.tolist(), strict=True):
        if not (0 <= level < len(features) and 0 <= roi[0] < len(features[0])):
            pooled.append(features[0].new_zeros(empty.shape[1:], dtype=compute))
            continue
        image = features[level][int(roi[0])].to(compute)
        pooled.append(_align_one(image, roi[1:], scales[level], output_size, sampling_ratio, aligned, mode))
    return torch.stack(pooled).to(features[0].dtype) if pooled else empty


def _align_one(
    image: Tensor, box: Tensor, scale: float, output_size: int, sampling_ratio: int, aligned: bool, mode: str
) -> Tensor:
    """Pools one box (x1, y1, x2, y2 in canvas pixels) of one feature map (C, H, W) to (C, P, P)."""
    zeros = image.new_zeros((image.shape[0], output_size, output_size))
    if not bool(((box * scale).abs() <= FARTHEST).all()):  # also for NaN
        return zeros
    x1, y1, x2, y2 = (box * scale - (0.5 if aligned else 0.0)).unbind()
    width, height = x2 - x1, y2 - y1
    if not aligned:  # the original operator forces RoIs to be at least one feature pixel large
        width, height = width.clamp(min=1.0), height.clamp(min=1.0)
    bin_w, bin_h = width / output_size, height / output_size
    grid_w = sampling_ratio if sampling_ratio > 0 else math.ceil(bin_w)
    grid_h = sampling_ratio if sampling_ratio > 0 else math.ceil(bin_h)
    if grid_w <= 0 or grid_h <= 0:
        return zeros
    rows = []
    for ph in range(output_size):
        bins = []
        for pw in range(output_size):
            samples = [
                _bilinear(image, y1 + ph * bin_h + (iy + 0.5) * bin_h / grid_h, x1 + pw * bin_w + (ix + 0.5) * bin_w / grid_w)
                for iy in range(grid_h)
                for ix in range(grid_w)
            ]
            stacked = torch.stack(samples)
            bins.append(stacked.amax(0) if mode == "max" else stacked.sum(0) / (grid_h * grid_w))
        rows.append(torch.stack(bins, dim=-1))
    return torch.stack(rows, dim=-2)


def _bilinear(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Returns the value (C,) of a map (C, H, W) at one point; zero if it lies more than one pixel outside, else clamped."""
    height, width = image.shape[-2:]
    if y < -1 or y > height or x < -1 or x > width:
        return image.new_zeros(image.shape[0])
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    dy, dx = y - y0, x - x0
    top = image[:, y0, x0] * (1 - dx) + image[:, y0, x1] * dx
    bottom = image[:, y1, x0] * (1 - dx) + image[:, y1, x1] * dx
    return top * (1 - dy) + bottom * dy
