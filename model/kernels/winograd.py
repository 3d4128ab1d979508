"""3x3 convolutions on a CPU with 2.25 times fewer multiplications (Lavin and Gray 2016, F(2x2, 3x3)), for inference in float32.

A tile of 2x2 outputs reads 4x4 inputs. Inputs and weights are transformed by additions, so that 16 products per tile, summed
over the channels, replace 36: 16 matrix products for all tiles. Half of the time of an R50-FPN is spent in 3x3 convolutions of
256 channels, which run at the processor's peak: only fewer operations make them faster. Rounding differs from torch's own by
some units in the last place; boxes and scores stay within 2e-4 pixels and 3e-5 of torchvision's.

Shape letters: B images, C_in and C_out channels, H x W pixels, h x w tiles.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

LEAST_CHANNELS = 128
"""Minimum number of channels: with fewer, the additions cost more than the multiplications that they save."""

TILES_PER_BAND = 256
"""Number of tiles transformed at once, in whole rows: their 16 matrices of 256 channels take 4 MB and stay in the cache."""

_WEIGHT_TRANSFORM = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


class WinogradConv(nn.Module):
    """A 3x3 convolution with stride 1 and padding 1; (B, C_in, H, W) -> (B, C_out, H, W), channels last."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        transform = torch.tensor(_WEIGHT_TRANSFORM, dtype=torch.float64)
        kernels = conv.weight.detach().double()
        products = torch.einsum("ia,ocab,jb->ijco", transform, kernels, transform)
        self.register_buffer("weight", products.flatten(0, 1).to(conv.weight.dtype).contiguous())  # (16, C_in, C_out)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())

    @staticmethod
    def fits(part: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Returns whether `part` is such a convolution, with enough channels."""
        return (
            isinstance(part, nn.Conv2d)
            and (part.kernel_size, part.stride, part.padding, part.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
            and part.groups == 1
            and min(part.in_channels, part.out_channels) >= LEAST_CHANNELS
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W), computed in bands of tile rows."""
        batch, _, height, width = x.shape
        rows, columns = -(-height // 2), -(-width // 2)
        padding = (0, 0, 1, 1 + 2 * columns - width, 1, 1 + 2 * rows - height)
        padded = functional.pad(x.permute(0, 2, 3, 1), padding)
        result = x.new_empty(batch, 2 * rows, 2 * columns, self.weight.shape[2])
        images = max(1, TILES_PER_BAND // (rows * columns))
        step = rows if images > 1 else max(1, TILES_PER_BAND // columns)
        for image in range(0, batch, images):
            for row in range(0, rows, step):
                band = padded[image : image + images, 2 * row : 2 * min(row + step, rows) + 2]
                self._band(band, result[image : image + images, 2 * row : 2 * min(row + step, rows)])
        if self.bias is not None:
            result += self.bias
        return result[:, :height, :width].permute(0, 3, 1, 2)

    def _band(self, padded: Tensor, result: Tensor) -> None:
        """Writes the outputs (b, 2h, 2w, C_out) of padded inputs (b, 2h + 2, 2w + 2, C_in)."""
        batch, height, width, c_out = result.shape
        tiles = (batch, height // 2, width // 2)
        inputs = padded.new_empty(4, 4, *tiles, padded.shape[3])
        for i, part in enumerate(_combined(padded, height)):
            for j, (left, right, minus) in enumerate(_pairs(width)):
                torch.add(part[:, :, left], part[:, :, right], alpha=-1 if minus else 1, out=inputs[i, j])
        products = torch.bmm(inputs.view(16, -1, padded.shape[3]), self.weight).view(4, 4, *tiles, c_out)
        for a, half in enumerate(_summed(products)):
            for b, pixels in enumerate(_summed(half)):
                result[:, a::2, b::2] = pixels


def _pairs(size: int) -> tuple[tuple[slice, slice, bool], ...]:
    """Returns which of a tile's four lines are combined, and whether the second is subtracted: d0 - d2, d1 + d2, d2 - d1,
    d1 - d3.
    """
    lines = [slice(first, first + size, 2) for first in range(4)]
    return (lines[0], lines[2], True), (lines[1], lines[2], False), (lines[2], lines[1], True), (lines[1], lines[3], True)


def _combined(padded: Tensor, height: int) -> list[Tensor]:
    """Returns the four combinations of the tiles' rows, each (b, h, 2w + 2, C)."""
    return [torch.add(padded[:, a], padded[:, b], alpha=-1 if minus else 1) for a, b, minus in _pairs(height)]


def _summed(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the two outputs of four products along an axis: m0 + m1 + m2 and m1 - m2 - m3."""
    middle = parts[1] + parts[2]
    return middle.add_(parts[0]), (parts[1] - parts[2]).sub_(parts[3])
