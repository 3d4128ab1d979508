"""The mask branch: a small fully convolutional network on each region (section 3 "Mask Representation", figure 4)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import ModelConfig
from model.kernels.roi_align import roi_align
from model.layers import ConvNorm, head_norm, init_relu_conv


class MaskHead(nn.Module):
    """3x3 convolutions, a 2x2 stride 2 deconvolution, and one mask for each class (logits; no competition among classes)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.mask_channels
        self.convs = nn.ModuleList(
            ConvNorm(c_in, c_out, 3, 1, head_norm(config))
            for c_in, c_out in zip((config.fpn_channels, *channels[:-1]), channels, strict=True)
        )
        self.deconv = nn.ConvTranspose2d(channels[-1], channels[-1], 2, stride=2)
        self.logits = nn.Conv2d(channels[-1], config.num_classes, 1)
        for layer in (self.deconv, self.logits):
            init_relu_conv(layer)

    def forward(self, regions: Tensor, labels: Tensor) -> Tensor:
        """(R, C, 14, 14) and classes int64 (R,) -> logits of each region's own class, (R, 28, 28)."""
        for conv in self.convs:
            regions = functional.relu(conv(regions), inplace=True)
        # The strides of the deconvolution do not overlap: it is one matrix product from a bin to its 2x2 pixels. Of the last
        # layer only the region's own class is computed. Neither needs a copy in another memory order, forward or backward.
        count, channels, height, width = regions.shape
        bins = regions.permute(0, 2, 3, 1).reshape(-1, channels)
        spread = self.deconv.weight.permute(0, 2, 3, 1).reshape(channels, -1)
        hidden = functional.relu(torch.addmm(cast(Tensor, self.deconv.bias).repeat(4), bins, spread), inplace=True)
        own = self.logits.weight[labels].flatten(1)[:, :, None]
        logits = torch.bmm(hidden.view(count, 4 * height * width, own.shape[1]), own).view(count, height, width, 2, 2)
        logits = logits + cast(Tensor, self.logits.bias)[labels].view(-1, 1, 1, 1, 1)
        return logits.permute(0, 1, 3, 2, 4).reshape(count, 2 * height, 2 * width)


def mask_targets(masks: Tensor, boxes: Tensor, index: Tensor, side: int) -> Tensor:
    """The intersection of each region and its ground truth mask, as RoIAlign of the mask (section 3.1).

    masks: uint8 (G, H, W); boxes: float32 (R, 4) in the masks' own pixels; index: int64 (R,) into masks.
    Returns float32 (R, side, side) in 0..1.
    """
    used, place = torch.unique(index, return_inverse=True)
    rois = torch.cat([place[:, None].to(boxes.dtype), boxes], dim=1)
    level = torch.zeros(len(rois), dtype=torch.int64, device=boxes.device)
    return roi_align([masks[used, None].float()], rois, level, [1.0], side, sampling_ratio=0)[:, 0]


def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy over the pixels of the positive regions (section 3: L_mask); both (R, m, m)."""
    if not len(logits):
        return logits.sum()  # zero, and still a function of the parameters: every worker must see every gradient
    return functional.binary_cross_entropy_with_logits(logits.float(), targets)
