"""Backbones: the feature maps for proposals and regions, in each form of the paper (section 3, table 2)."""

from __future__ import annotations

from torch import Tensor, nn

from masklake.model.backbones.fpn import FeaturePyramid
from masklake.model.backbones.resnet import STAGES, ResNet, stage_channels
from masklake.model.config import ModelConfig
from masklake.model.layers import head_norm


class PyramidBackbone(nn.Module):
    """A residual network with a feature pyramid."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.body = ResNet(config.backbone)
        self.fpn = FeaturePyramid(self.body.channels, config.fpn_channels, head_norm(config))

    def forward(self, canvas: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> P2..P6. P6 is P5 subsampled by 2; only proposals use it."""
        levels = self.fpn(self.body(canvas))
        return [*levels, levels[-1][:, :, ::2, ::2]]


class SingleMapBackbone(nn.Module):
    """The last map of a residual network: C4 (its fifth stage then runs on the regions), C5, or dilated C5."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        stages = STAGES - 1 if config.features == "c4" else STAGES
        self.body = ResNet(config.backbone, stages, dilate_last=config.features == "dc5")

    def forward(self, canvas: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map, (B, C, H / stride, W / stride)."""
        return self.body(canvas)[-1:]


def make_backbone(config: ModelConfig) -> nn.Module:
    """Returns the backbone for `config.features`."""
    return PyramidBackbone(config) if config.features == "fpn" else SingleMapBackbone(config)


def map_channels(config: ModelConfig) -> int:
    """Returns the number of channels of the backbone's maps."""
    if config.features == "fpn":
        return config.fpn_channels
    return stage_channels(config.backbone, STAGES - (2 if config.features == "c4" else 1))


def region_channels(config: ModelConfig) -> int:
    """Returns the number of channels of a region in the input of the box branch (and, with C4, the mask branch)."""
    return stage_channels(config.backbone, STAGES - 1) if config.features == "c4" else map_channels(config)
