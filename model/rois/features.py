"""Features of regions of interest: pyramid level by size (FPN equation 1), then RoIAlign, RoIPool or RoIWarp (section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from masklake.model.config import ModelConfig
from masklake.model.kernels.roi_align import roi_align
from masklake.model.proposals.rpn import Regions
from masklake.model.rois.pooling import roi_pool, snap_to_cells

FINEST_LEVEL, COARSEST_LEVEL = 2, 5
"""Pyramid levels for regions, P2 to P5; P6 is used for proposals only."""


def pyramid_level(boxes: Tensor, config: ModelConfig) -> Tensor:
    """Returns int64 (R,): the index into P2..P5 for boxes float32 (R, 4) in canvas pixels; larger boxes use coarser maps.

    0 for all if there is only one map.
    """
    if len(config.roi_strides) == 1:
        return torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    ratio = side / config.roi_canonical_size
    if config.roi_level_rule == "detectron2":
        level = torch.floor(config.roi_canonical_level + torch.log2(ratio + 1e-8))
    else:
        level = torch.floor(config.roi_canonical_level + torch.log2(ratio) + 1e-6)
    return (level.clamp(FINEST_LEVEL, COARSEST_LEVEL) - FINEST_LEVEL).long()


def roi_features(features: Sequence[Tensor], regions: Regions, bins: int, config: ModelConfig) -> Tensor:
    """Returns (R, C, bins, bins) in the features' dtype. features: of the backbone, each (B, C, H / stride, W / stride).

    Scales are 1 / stride by construction (torchvision infers them from the first image that it sees, which differs on images
    thinner than a few strides: vision issue 3747).
    """
    rois = torch.cat([regions.images[:, None].to(regions.boxes.dtype), regions.boxes], dim=1)
    maps, levels = features[: len(config.roi_strides)], pyramid_level(regions.boxes, config)
    scales = [1 / stride for stride in config.roi_strides]
    if config.roi_pool == "pool":
        return roi_pool(maps, rois, levels, scales, bins, config.roi_pool_mode)
    if config.roi_pool == "warp":
        rois = snap_to_cells(rois, levels, scales)
    return roi_align(
        maps,
        rois,
        levels,
        scales,
        bins,
        sampling_ratio=config.roi_sampling_ratio,
        aligned=config.roi_aligned,
        mode=config.roi_pool_mode,
    )
