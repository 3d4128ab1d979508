"""The learned parts of Mask R-CNN as one module. `model.build` makes the parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from masklake.model.backbones.backbone import PyramidBackbone, SingleMapBackbone
from masklake.model.heads.box import BoxHead
from masklake.model.heads.keypoint import KeypointHead
from masklake.model.heads.mask import MaskHead
from masklake.model.proposals.rpn import RegionProposalNetwork, Regions
from masklake.model.rois.features import RegionFeatures


class Network(nn.Module):
    """Backbone, region proposal network (on that backbone or its own) and the heads, for training and inference alike."""

    keypoint_counts: Tensor

    def __init__(
        self,
        *,
        backbone: PyramidBackbone | SingleMapBackbone,
        rpn: RegionProposalNetwork,
        box_features: RegionFeatures,
        roi_stage: nn.Module | None,
        box_head: BoxHead,
        mask_features: RegionFeatures,
        mask_head: MaskHead | None,
        keypoint_features: RegionFeatures,
        keypoint_head: KeypointHead | None,
        keypoint_counts: Sequence[int],
        rpn_backbone: nn.Module | None,
    ) -> None:
        """roi_stage: runs on each region before the box and mask heads, which then share its output (C4). keypoint_counts: of
        each category. rpn_backbone: the RPN's own, or None if it works on the detector's maps.
        """
        super().__init__()
        self.box_features, self.mask_features, self.keypoint_features = box_features, mask_features, keypoint_features
        self.has_roi_stage, self.has_rpn_backbone = roi_stage is not None, rpn_backbone is not None
        self.backbone = backbone
        self.rpn = rpn
        if roi_stage is not None:
            self.roi_stage = roi_stage
        self.box_head = box_head
        if mask_head is not None:
            self.mask_head = mask_head
        if keypoint_head is not None:
            self.keypoint_head = keypoint_head
        self.register_buffer("keypoint_counts", torch.tensor([0, *keypoint_counts]), persistent=False)
        if rpn_backbone is not None:
            self.rpn_backbone = rpn_backbone

    def proposal_maps(self, pixels: Tensor, features: Sequence[Tensor] | None = None) -> Sequence[Tensor]:
        """Returns the maps for proposals: of the RPN's own backbone, else `features`, the detector's (None: not computed
        yet).
        """
        if self.has_rpn_backbone:
            return self.rpn_backbone(pixels)
        return self.backbone(pixels) if features is None else features

    def box_input(self, features: Sequence[Tensor], regions: Regions) -> Tensor:
        """Returns the input of the box head for each region, (R, C, P, P); with C4 the fifth stage has run on it (figure 4,
        left).
        """
        pooled = self.box_features(features, regions)
        return self.roi_stage(pooled) if self.has_roi_stage else pooled

    def mask_input(self, features: Sequence[Tensor], regions: Regions) -> Tensor:
        """Returns the input of the mask head for each region; with C4 that of the box head."""
        return self.box_input(features, regions) if self.has_roi_stage else self.mask_features(features, regions)

    def keypoint_input(self, features: Sequence[Tensor], regions: Regions) -> Tensor:
        """Returns the input of the keypoint head for each region."""
        return self.keypoint_features(features, regions)
