"""Residual networks: the backbone's bottom-up part (He et al. 2016; Xie et al. 2017; section 3 "Network Architecture")."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from masklake.model.config import BackboneConfig
from masklake.model.layers import ConvNorm, backbone_norm

STAGES = 4
"""Number of stages after the stem: C2 to C5."""


class Bottleneck(nn.Module):
    """1x1, 3x3 (in groups in a ResNeXt), 1x1, and the shortcut."""

    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int, dilation: int, config: BackboneConfig) -> None:
        super().__init__()
        norm, c_out = backbone_norm(config), width * self.expansion
        inner = width * config.group_width // 64 * config.groups
        first, second = (stride, 1) if config.stride_in == "1x1" else (1, stride)
        self.reduce = ConvNorm(c_in, inner, 1, first, norm)
        self.spatial = ConvNorm(inner, inner, 3, second, norm, config.groups, dilation)
        self.expand = ConvNorm(inner, c_out, 1, 1, norm)
        self.shortcut = ConvNorm(c_in, c_out, 1, stride, norm) if stride > 1 or c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, 4 width, H / stride, W / stride)."""
        y = functional.relu(self.reduce(x), inplace=True)
        y = functional.relu(self.spatial(y), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return functional.relu(self.expand(y).add_(shortcut), inplace=True)


class BasicBlock(nn.Module):
    """3x3 (with the stride), 3x3, and the shortcut."""

    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int, dilation: int, config: BackboneConfig) -> None:
        super().__init__()
        norm = backbone_norm(config)
        self.first = ConvNorm(c_in, width, 3, stride, norm, dilation=dilation)
        self.second = ConvNorm(width, width, 3, 1, norm, dilation=dilation)
        self.shortcut = ConvNorm(c_in, width, 1, stride, norm) if stride > 1 or c_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, width, H / stride, W / stride)."""
        y = functional.relu(self.first(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return functional.relu(self.second(y).add_(shortcut), inplace=True)


def stage_channels(config: BackboneConfig, index: int) -> int:
    """Returns the number of output channels of stage `index` (0 to 3, C2 to C5)."""
    block = Bottleneck if config.block == "bottleneck" else BasicBlock
    return config.widths[index] * block.expansion


def make_stage(config: BackboneConfig, index: int, stride: int, dilation: int = 1) -> nn.Sequential:
    """Returns stage `index` (0 to 3); its first block has the stride, all its 3x3 convolutions the dilation."""
    block = Bottleneck if config.block == "bottleneck" else BasicBlock
    c_in = stage_channels(config, index - 1) if index else config.stem_channels
    blocks = []
    for position in range(config.depths[index]):
        blocks.append(block(c_in, config.widths[index], stride if position == 0 else 1, dilation, config))
        c_in = stage_channels(config, index)
    return nn.Sequential(*blocks)


class ResNet(nn.Module):
    """A residual network; returns the maps C2 to C5, or fewer of them."""

    def __init__(self, config: BackboneConfig, stages: int = STAGES, dilate_last: bool = False) -> None:
        """stages: number of stages; dilate_last: the last one keeps the stride of the previous one and is dilated (DC5)."""
        super().__init__()
        self.stem = ConvNorm(3, config.stem_channels, config.stem_kernel, 2, backbone_norm(config))
        self.stages = nn.ModuleList()
        for index in range(stages):
            dilated = dilate_last and index == stages - 1
            stride = 1 if index == 0 or dilated else 2
            self.stages.append(make_stage(config, index, stride, dilation=2 if dilated else 1))
        self.channels = [stage_channels(config, index) for index in range(stages)]
        for part in [self.stem, *self.stages][: config.frozen_stages]:
            part.requires_grad_(False)

    def forward(self, canvas: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> maps of strides 4, 8, 16 and 32, one per stage."""
        x = functional.relu(self.stem(canvas), inplace=True)
        x = functional.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps
