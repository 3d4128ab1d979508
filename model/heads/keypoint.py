"""The keypoint branch: one heat map per keypoint, with a one-hot target over its pixels (section 5)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from masklake.model.layers import ConvNorm, Norm, init_relu_conv


class KeypointHead(nn.Module):
    """3x3 convolutions, a 4x4 stride 2 deconvolution, then bilinear upsampling by 2: 14 bins become 56 pixels."""

    def __init__(self, channels: int, convs: Sequence[int], keypoints: int, norm: Norm) -> None:
        """channels: of a region; convs: widths of the 3x3 convolutions; keypoints: K; norm: of the convolutions."""
        super().__init__()
        self.keypoints = keypoints
        widths = itertools.pairwise((channels, *convs))
        self.convs = nn.ModuleList(ConvNorm(c_in, c_out, 3, 1, norm) for c_in, c_out in widths)
        self.deconv = nn.ConvTranspose2d(convs[-1], keypoints, 4, stride=2, padding=1)
        init_relu_conv(self.deconv)

    def forward(self, regions: Tensor) -> Tensor:
        """(R, C, 14, 14) -> float32 logits (R, K, 56, 56)."""
        for conv in self.convs:
            regions = functional.relu(conv(regions), inplace=True)
        maps = self.deconv(regions).float()
        return functional.interpolate(maps, scale_factor=2.0, mode="bilinear", align_corners=False)


def keypoint_targets(keypoints: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Returns the pixel of each keypoint in the heat map of its region.

    keypoints: float32 (R, K, 3) as x, y, visibility; boxes: float32 (R, 4), both in canvas pixels. Returns pixel int64 (R, K)
    in 0..side*side, and valid bool (R, K): annotated, and inside the region.
    """
    origin, size = boxes[:, None, :2], (boxes[:, 2:] - boxes[:, :2])[:, None]
    place = ((keypoints[..., :2] - origin) * (side / size.clamp(min=1e-6))).floor()
    on_edge = keypoints[..., :2] == boxes[:, None, 2:]  # the far edge belongs to the last pixel
    place = torch.where(on_edge, side - 1.0, place)
    valid = ((place >= 0) & (place < side)).all(dim=-1) & (keypoints[..., 2] > 0)
    pixel = (place[..., 1] * side + place[..., 0]).long()
    return torch.where(valid, pixel, 0), valid


def keypoint_loss(logits: Tensor, pixels: Tensor, valid: Tensor) -> Tensor:
    """Returns the mean cross-entropy over the S*S pixels of each valid keypoint. logits (R, K, S, S), the others (R, K)."""
    rows = torch.where(valid)  # once: the host waits for its length
    if not len(rows[0]):
        return logits.sum() * 0  # zero, and still a function of the parameters
    return functional.cross_entropy(logits.flatten(2)[rows], pixels[rows])
