"""The backbone: the maps that proposals and regions come from, in each of the paper's forms (section 3, table 2)."""

from __future__ import annotations

from torch import Tensor, nn

from masklake.model.backbones.fpn import FeaturePyramid
from masklake.model.backbones.resnet import STAGES, ResNet, stage_channels
from masklake.model.config import ModelConfig
from masklake.model.layers import head_norm


class PyramidBackbone(nn.Module):
    """Residual network and feature pyramid."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.body = ResNet(config.backbone)
        self.fpn = FeaturePyramid(self.body.channels, config.fpn_channels, head_norm(config))

    def forward(self, canvas: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> P2..P6. P6 is P5 at every second place; proposals use it, regions of interest do not."""
        levels = self.fpn(self.body(canvas))
        return [*levels, levels[-1][:, :, ::2, ::2]]


class SingleMapBackbone(nn.Module):
    """A residual network's last map: C4 (its fifth stage then runs on the regions), C5, or dilated C5."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        stages = STAGES - 1 if config.features == "c4" else STAGES
        self.body = ResNet(config.backbone, stages, dilate_last=config.features == "dc5")

    def forward(self, canvas: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map, (B, C, H / stride, W / stride)."""
        return self.body(canvas)[-1:]


def make_backbone(config: ModelConfig) -> nn.Module:
    """The backbone that `config.features` names."""
    return PyramidBackbone(config) if config.features == "fpn" else SingleMapBackbone(config)


def map_channels(config: ModelConfig) -> int:
    """Channels of the backbone's maps."""
    if config.features == "fpn":
        return config.fpn_channels
    return stage_channels(config.backbone, STAGES - (2 if config.features == "c4" else 1))


def region_channels(config: ModelConfig) -> int:
    """Channels of a region as the box branch (and, with C4, the mask branch) gets it."""
    return stage_channels(config.backbone, STAGES - 1) if config.features == "c4" else map_channels(config)
