"""Feature pyramid network: the backbone's top-down part (Lin et al. 2017, FPN)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from masklake.model.layers import ConvNorm, Norm


class FeaturePyramid(nn.Module):
    """C2..C5 to P2..P5: a 1x1 lateral convolution, the nearest upsampled level above, and a 3x3 convolution."""

    def __init__(self, channels_in: Sequence[int], channels: int, norm: Norm) -> None:
        super().__init__()
        self.channels = channels
        self.lateral = nn.ModuleList(ConvNorm(c_in, channels, 1, 1, norm) for c_in in channels_in)
        self.output = nn.ModuleList(ConvNorm(channels, channels, 3, 1, norm) for _ in channels_in)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):  # no ReLU follows
                nn.init.kaiming_uniform_(part.weight, a=1)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (B, c_in, H / s, W / s) -> four maps (B, channels, H / s, W / s)."""
        merged = [self.lateral[-1](maps[-1])]
        for lateral, finer in zip(reversed(self.lateral[:-1]), reversed(maps[:-1]), strict=True):
            merged.insert(0, add_upsampled(lateral(finer), merged[0]))
        return [output(level) for output, level in zip(self.output, merged, strict=True)]


def add_upsampled(finer: Tensor, coarser: Tensor) -> Tensor:
    """Returns finer (B, C, H, W) plus coarser, upsampled by nearest neighbour; overwrites `finer`.

    At exactly twice the size, as on every canvas that is a multiple of 32, no upsampled map is written to memory.
    """
    batch, channels, height, width = coarser.shape
    if finer.shape[-2:] != (2 * height, 2 * width):
        return finer.add_(functional.interpolate(coarser, size=finer.shape[-2:], mode="nearest"))
    finer.view(batch, channels, height, 2, width, 2).add_(coarser[:, :, :, None, :, None])
    return finer
