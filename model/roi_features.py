"""Features of regions of interest: pyramid level by size (FPN equation 1), then RoIAlign (section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kernels.roi_align import roi_align
from model.rpn import Regions

ROI_LEVELS = (2, 3, 4, 5)
"""Pyramid levels that regions are taken from; P6 serves proposals alone."""


def pyramid_level(boxes: Tensor, config: ModelConfig) -> Tensor:
    """int64 (R,): index into P2..P5 for boxes float32 (R, 4) in canvas pixels; larger boxes from coarser maps."""
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    level = torch.floor(config.roi_canonical_level + torch.log2(side / config.roi_canonical_size) + 1e-6)
    return (level.clamp(ROI_LEVELS[0], ROI_LEVELS[-1]) - ROI_LEVELS[0]).long()


def roi_features(features: Sequence[Tensor], regions: Regions, bins: int, config: ModelConfig) -> Tensor:
    """(R, C, bins, bins) in the features' dtype. features: P2..P6, each (B, C, H / stride, W / stride).

    Scales are 1/4 to 1/32 by construction (torchvision infers them from the first image that it sees, which differs on
    images thinner than a few strides: vision issue 3747).
    """
    rois = torch.cat([regions.images[:, None].to(regions.boxes.dtype), regions.boxes], dim=1)
    return roi_align(
        features[: len(ROI_LEVELS)],
        rois,
        pyramid_level(regions.boxes, config),
        [1 / 2**level for level in ROI_LEVELS],
        bins,
        sampling_ratio=config.roi_sampling_ratio,
        aligned=config.roi_aligned,
    )
