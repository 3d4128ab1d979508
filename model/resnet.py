"""Residual network: the backbone's bottom-up part (He et al. 2016; section 3 "Network Architecture")."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from model.config import BackboneConfig
from model.layers import ConvNorm, Norm, backbone_norm


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1, and the shortcut."""

    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        c_out = width * self.expansion
        self.reduce = ConvNorm(c_in, width, 1, 1, norm)
        self.spatial = ConvNorm(width, width, 3, stride, norm)
        self.expand = ConvNorm(width, c_out, 1, 1, norm)
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

    def __init__(self, c_in: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.first = ConvNorm(c_in, width, 3, stride, norm)
        self.second = ConvNorm(width, width, 3, 1, norm)
        self.shortcut = ConvNorm(c_in, width, 1, stride, norm) if stride > 1 or c_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, width, H / stride, W / stride)."""
        y = functional.relu(self.first(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return functional.relu(self.second(y).add_(shortcut), inplace=True)


class ResNet(nn.Module):
    """Images to the four maps C2..C5."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        block = Bottleneck if config.block == "bottleneck" else BasicBlock
        norm = backbone_norm(config)
        self.stem = ConvNorm(3, config.stem_channels, config.stem_kernel, 2, norm)
        self.stages = nn.ModuleList()
        self.channels: list[int] = []
        c_in = config.stem_channels
        for index, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            stage = nn.Sequential()
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                stage.append(block(c_in, width, stride, norm))
                c_in = width * block.expansion
            self.stages.append(stage)
            self.channels.append(c_in)
        for part in [self.stem, *self.stages][: config.frozen_stages]:
            part.requires_grad_(False)

    def forward(self, canvas: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> maps of strides 4, 8, 16 and 32."""
        x = functional.relu(self.stem(canvas), inplace=True)
        x = functional.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps
