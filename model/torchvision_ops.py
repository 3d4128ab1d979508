"""torchvision's compiled operators without torchvision's package, whose import costs more than torch's own.

Measured with torch 2.15 and torchvision 0.29 on 2 cores: 4.5 CPU seconds in every driver, labelling actor and training worker,
against 3 ms for the library alone.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FEW_COORDINATES = 4000
"""Maximum number of coordinates for which torchvision separates groups by an offset in a single call on a CPU; with more, it
calls NMS once per group.
"""


def _load() -> None:
    """Registers the operators: from the library file of the package, or by importing the package if the file has another
    name.
    """
    if hasattr(torch.ops.torchvision, "nms"):
        return
    found = importlib.util.find_spec("torchvision")
    if found is not None and found.origin is not None:
        for library in sorted(Path(found.origin).parent.glob("_C*.so")):
            torch.ops.load_library(library)
    if not hasattr(torch.ops.torchvision, "nms"):
        importlib.import_module("torchvision")


_load()


def nms(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """Returns int64 indices of the boxes that non-maximum suppression keeps, best first. boxes (N, 4) xyxy, scores (N,)."""
    return torch.ops.torchvision.nms(boxes, scores, iou)


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    """Returns `nms` within each group, int64 (N,), of one image, with the same result as `torchvision.ops.batched_nms` on a
    CPU.

    A few boxes are separated by an offset per group, which costs their coordinates some last bits; many are processed group by
    group, exactly. The choice can change the result, so the limit is torchvision's.
    """
    if not len(boxes):
        return groups.new_empty(0)
    if boxes.numel() <= FEW_COORDINATES:
        offsets = groups.to(boxes) * (boxes.max() + 1)
        return nms(boxes + offsets[:, None], scores, iou)
    members = [torch.where(groups == group)[0] for group in torch.unique(groups)]
    kept = torch.cat([part[nms(boxes[part], scores[part], iou)] for part in members]).sort().values
    return kept[scores[kept].sort(descending=True).indices]


def box_iou(left: Tensor, right: Tensor) -> Tensor:
    """Returns the intersection over union of every pair: (N, 4) and (M, 4) xyxy -> (N, M); nan if both boxes are empty."""
    corner = torch.maximum(left[:, None, :2], right[None, :, :2])
    size = (torch.minimum(left[:, None, 2:], right[None, :, 2:]) - corner).clamp(min=0)
    common = size.prod(dim=2)
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (left, right)]
    return common / (areas[0][:, None] + areas[1] - common)


class _RoIPool(torch.autograd.Function):
    """The operator with its gradient, which the library leaves to the package's Python (since torchvision 0.29)."""

    @staticmethod
    def forward(ctx: Any, feature: Tensor, rois: Tensor, scale: float, bins: int) -> Tensor:
        """Returns the largest pixels, and remembers their positions."""
        pooled, largest = torch.ops.torchvision.roi_pool(feature, rois, scale, bins, bins)
        ctx.save_for_backward(rois, largest)
        ctx.shape, ctx.scale, ctx.bins = feature.shape, scale, bins
        return pooled

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Passes the gradient of each bin to its largest pixel."""
        rois, largest = ctx.saved_tensors
        backward = torch.ops.torchvision._roi_pool_backward
        return backward(gradients[0], rois, largest, ctx.scale, ctx.bins, ctx.bins, *ctx.shape), None, None, None


def roi_pool(feature: Tensor, rois: Tensor, scale: float, bins: int) -> Tensor:
    """RoIPool of one map: (B, C, H, W) and rois (R, 5) in canvas pixels -> (R, C, bins, bins); differentiable in the map."""
    pooled: Tensor = _RoIPool.apply(feature, rois.to(feature.dtype), scale, bins)
    return pooled
