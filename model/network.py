"""The learned parts of Mask R-CNN, built from one configuration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from masklake.model.backbones.backbone import make_backbone
from masklake.model.backbones.resnet import STAGES, make_stage
from masklake.model.config import ModelConfig
from masklake.model.heads.box import BoxHead
from masklake.model.heads.keypoint import KeypointHead
from masklake.model.heads.mask import make_mask_head
from masklake.model.proposals.rpn import RegionProposalNetwork, Regions
from masklake.model.rois.features import roi_features


class Network(nn.Module):
    """Backbone, region proposal network (on that backbone or its own) and the branches, for training and inference alike."""

    keypoint_counts: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = make_backbone(config)
        self.rpn = RegionProposalNetwork(config)
        if config.features == "c4":
            self.roi_stage = make_stage(config.backbone, STAGES - 1, config.roi_stage_stride)
        self.box_head = BoxHead(config)
        if "mask" in config.tasks:
            self.mask_head = make_mask_head(config)
        if "keypoint" in config.tasks:
            self.keypoint_head = KeypointHead(config)
        counts = [0, *(len(category.keypoints) for category in config.categories)]
        self.register_buffer("keypoint_counts", torch.tensor(counts), persistent=False)
        if config.rpn_backbone == "own":
            self.rpn_backbone = make_backbone(config)

    def proposal_maps(self, pixels: Tensor, features: Sequence[Tensor] | None = None) -> Sequence[Tensor]:
        """Returns the maps for proposals: of the RPN's own backbone, else `features`, the detector's (None: not computed
        yet).
        """
        if self.config.rpn_backbone == "own":
            return self.rpn_backbone(pixels)
        return self.backbone(pixels) if features is None else features

    def box_input(self, features: Sequence[Tensor], regions: Regions) -> Tensor:
        """Returns the input of the box branch for each region, (R, C, P, P); with C4 the fifth stage has run on it (figure 4,
        left).
        """
        pooled = roi_features(features, regions, self.config.box_pool, self.config)
        return self.roi_stage(pooled) if self.config.features == "c4" else pooled

    def mask_input(self, features: Sequence[Tensor], regions: Regions) -> Tensor:
        """Returns the input of the mask branch for each region; with C4 that of the box branch."""
        if self.config.features == "c4":
            return self.box_input(features, regions)
        return roi_features(features, regions, self.config.mask_pool, self.config)

    def keypoint_input(self, features: Sequence[Tensor], regions: Regions) -> Tensor:
        """Returns the input of the keypoint branch for each region."""
        return roi_features(features, regions, self.config.keypoint_pool, self.config)
