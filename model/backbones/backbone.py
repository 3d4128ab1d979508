"""Backbones: the feature maps for proposals and regions, in each form of the paper (section 3, table 2)."""

from __future__ import annotations

from torch import Tensor, nn

from masklake.model.backbones.fpn import FeaturePyramid
from masklake.model.backbones.resnet import ResNet


class PyramidBackbone(nn.Module):
    """A residual network with a feature pyramid."""

    def __init__(self, body: ResNet, fpn: FeaturePyramid) -> None:
        super().__init__()
        self.body = body
        self.fpn = fpn
        self.channels = fpn.channels

    def forward(self, canvas: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> P2..P6. P6 is P5 subsampled by 2; only proposals use it."""
        levels = self.fpn(self.body(canvas))
        return [*levels, levels[-1][:, :, ::2, ::2]]


class SingleMapBackbone(nn.Module):
    """The last map of a residual network: C4 (its fifth stage then runs on the regions), C5, or dilated C5."""

    def __init__(self, body: ResNet) -> None:
        super().__init__()
        self.body = body
        self.channels = body.channels[-1]

    def forward(self, canvas: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map, (B, C, H / stride, W / stride)."""
        return self.body(canvas)[-1:]
