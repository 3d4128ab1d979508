"""Predecessors of RoIAlign for the paper's ablation (section 3 "RoIAlign", table 2c): RoIPool, and RoIWarp's rounding.

RoIPool (Girshick 2015, Fast R-CNN) rounds a region to whole feature pixels, and then its bins. RoIWarp (Dai et al. 2016) rounds
the region and then samples it bilinearly: it is RoIAlign of a rounded region.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from masklake.model import torchvision_ops
from masklake.model.devices import constant


def roi_pool(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: int,
    mode: Literal["avg", "max"] = "max",
) -> Tensor:
    """Returns the largest, or mean, feature pixel of each of P x P bins. Arguments are those of `roi_align`.

    Returns (R, C, P, P) in the features' dtype. Empty bins are 0, as is a RoI of an image or level that does not exist.
    Differentiable in the features.
    """
    known = (rois[:, 0] >= 0) & (rois[:, 0] < len(features[0]))
    pooled = features[0].new_zeros((len(rois), features[0].shape[1], output_size, output_size))
    pool = _largest if mode == "max" else _mean
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        members = torch.where((levels == level) & known)[0]
        if len(members) or feature.requires_grad:  # every level stays in the graph: workers average gradients of all weights
            pooled = pooled.index_add(0, members, pool(feature, rois[members], scale, output_size))
    return pooled


def snap_to_cells(rois: Tensor, levels: Tensor, scales: Sequence[float]) -> Tensor:
    """Returns RoIWarp's regions: corners (R, 5) rounded to whole pixels of their level's map, halves away from zero as in
    RoIPool.
    """
    scale = constant(scales, rois.device).to(rois.dtype)[levels][:, None]
    return torch.cat([rois[:, :1], _round(rois[:, 1:] * scale) / scale], dim=1)


def _round(values: Tensor) -> Tensor:
    """Rounds to the nearest integer, halves away from zero, like C's `round` in the original operator."""
    return values.sign() * (values.abs() + 0.5).floor()


def _largest(feature: Tensor, rois: Tensor, scale: float, bins: int) -> Tensor:
    """Returns the maximum of each bin by torchvision's operator, computed in at least float32."""
    pooled = torchvision_ops.roi_pool(feature.float() if feature.dtype != torch.float64 else feature, rois, scale, bins)
    return pooled.to(feature.dtype)


def _mean(feature: Tensor, rois: Tensor, scale: float, bins: int) -> Tensor:
    """Returns the means of the same bins; NaN if a pixel is not finite."""
    height, width = feature.shape[2:]
    corners = _round(rois[:, 1:].double() * scale).long()
    first_x, last_x = _bins(corners[:, 0], corners[:, 2], bins, width)
    first_y, last_y = _bins(corners[:, 1], corners[:, 3], bins, height)
    image = rois[:, 0].long()[:, None, None]

    def totals(values: Tensor) -> Tensor:
        """Returns the sum of each bin, (R, P, P, C), from the integral image at its four corners."""
        sums = torch.nn.functional.pad(values.double().cumsum(2).cumsum(3), (1, 0, 1, 0)).permute(0, 2, 3, 1)

        def at(y: Tensor, x: Tensor) -> Tensor:
            return sums[image, y[:, :, None], x[:, None, :]]

        return at(last_y, last_x) - at(first_y, last_x) - at(last_y, first_x) + at(first_y, first_x)

    area = (last_y - first_y)[:, :, None] * (last_x - first_x)[:, None, :]
    finite = feature.isfinite()
    means = totals(feature.where(finite, 0)) / area.clamp(min=1)[..., None]
    if not bool(finite.all()):  # they would spoil the sums of all pixels behind them
        means = means.masked_fill(totals(~finite) > 0, torch.nan)
    return means.permute(0, 3, 1, 2).to(feature.dtype)


def _bins(first: Tensor, last: Tensor, bins: int, size: int) -> tuple[Tensor, Tensor]:
    """Returns the borders, int64 (R, P), of the bins along an axis of `size` pixels; both corners of a region belong to it."""
    extent = (last - first + 1).clamp(min=1)[:, None]
    number = torch.arange(bins, device=first.device)
    low = first[:, None] + (number * extent).div(bins, rounding_mode="floor")
    high = first[:, None] - ((-(number + 1) * extent).div(bins, rounding_mode="floor"))
    low, high = low.clamp(0, size), high.clamp(0, size)
    return low, torch.maximum(low, high)
