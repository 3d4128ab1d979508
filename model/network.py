"""The learned parts of Mask R-CNN, built from one configuration."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.box_head import BoxHead
from model.config import ModelConfig
from model.fpn import ResNetFPN
from model.keypoint_head import KeypointHead
from model.mask_head import MaskHead
from model.rpn import RegionProposalNetwork


class Network(nn.Module):
    """Backbone, region proposal network and the branches; training and inference run the same parts."""

    keypoint_counts: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ResNetFPN(config)
        self.rpn = RegionProposalNetwork(config)
        self.box_head = BoxHead(config)
        if "mask" in config.tasks:
            self.mask_head = MaskHead(config)
        if "keypoint" in config.tasks:
            self.keypoint_head = KeypointHead(config)
        counts = [0, *(len(category.keypoints) for category in config.categories)]
        self.register_buffer("keypoint_counts", torch.tensor(counts), persistent=False)
