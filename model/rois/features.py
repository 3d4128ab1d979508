"""Features of regions of interest: pyramid level by size (FPN equation 1), then RoIAlign, RoIPool or RoIWarp (section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from masklake.model.config import PoolKind
from masklake.model.kernels.roi_align import roi_align
from masklake.model.proposals.rpn import Regions
from masklake.model.rois.pooling import roi_pool, snap_to_cells

FINEST_LEVEL, COARSEST_LEVEL = 2, 5
"""Pyramid levels for regions, P2 to P5; P6 is used for proposals only."""


@dataclass(frozen=True, kw_only=True)
class RegionFeatures:
    """Pools the input of a head: `bins` x `bins` cells of each region, from the pyramid level that its size selects.

    strides: canvas pixels between the cells of each map that regions come from. canonical_size: side, in canvas pixels, of the
    square that belongs to pyramid level `canonical_level`. The other fields are those of `ModelConfig` named `roi_...`.
    """

    bins: int
    strides: tuple[int, ...]
    canonical_size: float
    canonical_level: int
    level_rule: Literal["torchvision", "detectron2"]
    pool: PoolKind
    mode: Literal["avg", "max"]
    sampling_ratio: int
    aligned: bool

    def __call__(self, features: Sequence[Tensor], regions: Regions) -> Tensor:
        """Returns (R, C, bins, bins) in the features' dtype. features: of the backbone, each (B, C, H / stride, W / stride).

        Scales are 1 / stride by construction (torchvision infers them from the first image that it sees, which differs on
        images thinner than a few strides: vision issue 3747).
        """
        rois = torch.cat([regions.images[:, None].to(regions.boxes.dtype), regions.boxes], dim=1)
        maps, levels = features[: len(self.strides)], self.levels(regions.boxes)
        scales = [1 / stride for stride in self.strides]
        if self.pool == "pool":
            return roi_pool(maps, rois, levels, scales, self.bins, self.mode)
        if self.pool == "warp":
            rois = snap_to_cells(rois, levels, scales)
        return roi_align(
            maps, rois, levels, scales, self.bins, sampling_ratio=self.sampling_ratio, aligned=self.aligned, mode=self.mode
        )

    def levels(self, boxes: Tensor) -> Tensor:
        """Returns int64 (R,): the index into P2..P5 for boxes float32 (R, 4) in canvas pixels; larger boxes use coarser maps.

        0 for all if there is only one map.
        """
        if len(self.strides) == 1:
            return torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        ratio = side / self.canonical_size
        if self.level_rule == "detectron2":
            level = torch.floor(self.canonical_level + torch.log2(ratio + 1e-8))
        else:
            level = torch.floor(self.canonical_level + torch.log2(ratio) + 1e-6)
        return (level.clamp(FINEST_LEVEL, COARSEST_LEVEL) - FINEST_LEVEL).long()
