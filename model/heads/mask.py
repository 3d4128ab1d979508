"""The mask branch: a small network on each region that segments the object (section 3 "Mask Representation", tables 2b, 2e)."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from masklake.model.config import MaskOutput
from masklake.model.devices import sent
from masklake.model.kernels.roi_align import roi_align
from masklake.model.layers import ConvNorm, Norm, init_relu_conv
from masklake.model.masks.bit_masks import BitMasks

PIXELS_AT_ONCE = 1 << 25
"""Maximum number of unpacked mask pixels: 128 MB as floats, all masks of an ordinary image."""


class MaskHead(nn.Module, ABC):
    """Base class of mask heads: selects one mask out of those of several classes, and computes the loss.

    bins, side: P and m, the sides of a region and of a mask. channels: number of output masks per region. With one per class,
    channel i is class i (sigmoids never use that of the background; for the softmax it is "outside").
    """

    def __init__(self, bins: int, side: int, classes: int, output: MaskOutput) -> None:
        """classes: with the background."""
        super().__init__()
        self.bins = bins
        self.side = side
        self.output = output
        self.masks = 1 if output == "agnostic" else classes

    @abstractmethod
    def one_channel(self, regions: Tensor, channels: Tensor) -> Tensor:
        """(R, C, P, P) and int64 (R,) -> logits of that channel of each region, (R, m, m)."""

    @abstractmethod
    def all_channels(self, regions: Tensor) -> Tensor:
        """(R, C, P, P) -> logits (R, masks, m, m)."""

    def forward(self, regions: Tensor, labels: Tensor) -> Tensor:
        """(R, C, P, P) and classes int64 (R,) -> (R, m, m), whose sigmoid is the probability to be in the object's mask."""
        if self.output != "softmax":
            return self.one_channel(regions, labels if self.output == "sigmoid" else torch.zeros_like(labels))
        logits = self.all_channels(regions)
        own = torch.arange(logits.shape[1], device=labels.device) == labels[:, None]
        others = logits.masked_fill(own[:, :, None, None], -torch.inf).logsumexp(dim=1)
        return logits[torch.arange(len(labels), device=labels.device), labels] - others  # the odds of a softmax's winner

    def loss(self, regions: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """Returns L_mask of the positive regions: the mean over their pixels. targets float32 (R, m, m) in 0..1.

        Binary cross-entropy of the mask of the own class (section 3). With a softmax: cross-entropy to that class inside the
        mask and to the background outside (table 2b).
        """
        if not len(regions):  # zero, and still a function of the parameters: every worker must see every gradient
            return self.all_channels(regions).sum()
        if self.output != "softmax":
            return functional.binary_cross_entropy_with_logits(self(regions, labels).float(), targets)
        chances = self.all_channels(regions).float().log_softmax(dim=1)
        inside = chances[torch.arange(len(labels), device=labels.device), labels]
        return -(targets * inside + (1 - targets) * chances[:, 0]).mean()


class ConvMaskHead(MaskHead):
    """Fully convolutional: 3x3 convolutions, a 2x2 stride 2 deconvolution, and a 1x1 convolution (figure 4, right).

    Its masks have 2P pixels per side; for another m they are resized bilinearly, so that every pixel keeps its place in the
    region.
    """

    def __init__(
        self,
        channels: int,
        bins: int,
        classes: int,
        output: MaskOutput,
        convs: Sequence[int],
        deconv: int,
        norm: Norm,
        side: int | None = None,
    ) -> None:
        """channels, bins: of a region; convs, deconv: widths of the convolutions and the deconvolution; norm: of the
        convolutions; side: m, by default twice the bins.
        """
        super().__init__(bins, side or 2 * bins, classes, output)
        widths = (channels, *convs)
        self.convs = nn.ModuleList(ConvNorm(c_in, c_out, 3, 1, norm) for c_in, c_out in itertools.pairwise(widths))
        self.deconv = nn.ConvTranspose2d(widths[-1], deconv, 2, stride=2)
        self.logits = nn.Conv2d(deconv, self.masks, 1)
        for layer in (self.deconv, self.logits):
            init_relu_conv(layer)

    def one_channel(self, regions: Tensor, channels: Tensor) -> Tensor:
        """Computes only the requested channel of the last layer."""
        weight, bias = self._predictor()
        logits = torch.bmm(self._pixels(regions), weight[channels][:, :, None]) + bias[channels][:, None, None]
        return self._as_maps(logits)[:, 0]

    def all_channels(self, regions: Tensor) -> Tensor:
        """Computes the last layer on every pixel."""
        return self._as_maps(functional.linear(self._pixels(regions), *self._predictor()))

    def _predictor(self) -> tuple[Tensor, Tensor]:
        return self.logits.weight.flatten(1), cast(Tensor, self.logits.bias)

    def _pixels(self, regions: Tensor) -> Tensor:
        """(R, C, P, P) -> (R, P * P * 4, hidden): the four pixels of each bin side by side.

        The strides of the deconvolution do not overlap, so it is one matrix product from a bin to its 2x2 pixels, and neither
        direction copies the large map into another memory order.
        """
        for conv in self.convs:
            regions = functional.relu(conv(regions), inplace=True)
        count, channels, height, width = regions.shape
        bins = regions.permute(0, 2, 3, 1).reshape(-1, channels)
        spread = self.deconv.weight.permute(0, 2, 3, 1).reshape(channels, -1)
        hidden = functional.relu(torch.addmm(cast(Tensor, self.deconv.bias).repeat(4), bins, spread), inplace=True)
        return hidden.view(count, height * width * 4, self.deconv.out_channels)

    def _as_maps(self, logits: Tensor) -> Tensor:
        """(R, P * P * 4, K), pixels in the order of `_pixels` -> (R, K, m, m)."""
        count, _, masks = logits.shape
        maps = logits.view(count, self.bins, self.bins, 2, 2, masks).permute(0, 5, 1, 3, 2, 4)
        maps = maps.reshape(count, masks, 2 * self.bins, 2 * self.bins)
        return maps if self.side == 2 * self.bins else functional.interpolate(maps, (self.side, self.side), mode="bilinear")


class FullyConnectedMaskHead(MaskHead):
    """An MLP that predicts all pixels from all bins at once; the paper's comparison (table 2e)."""

    def __init__(self, channels: int, bins: int, classes: int, output: MaskOutput, hidden: Sequence[int], side: int) -> None:
        """channels, bins: of a region; hidden: widths of the layers before the last one; side: m."""
        super().__init__(bins, side, classes, output)
        widths = (channels * bins**2, *hidden)
        self.hidden = nn.ModuleList(nn.Linear(c_in, c_out) for c_in, c_out in itertools.pairwise(widths))
        self.logits = nn.Linear(widths[-1], self.masks * side**2)

    def one_channel(self, regions: Tensor, channels: Tensor) -> Tensor:
        """Returns one of the output channels of the last layer."""
        return self.all_channels(regions)[torch.arange(len(channels), device=channels.device), channels]

    def all_channels(self, regions: Tensor) -> Tensor:
        """Fully connected layers with ReLU between them."""
        hidden = regions.flatten(1)
        for layer in self.hidden:
            hidden = functional.relu(layer(hidden), inplace=True)
        logits: Tensor = self.logits(hidden)
        return logits.view(-1, self.masks, self.side, self.side)


def mask_targets(masks: BitMasks, boxes: Tensor, index: Tensor, side: int) -> Tensor:
    """Returns the intersection of each region and its ground truth mask, as RoIAlign of the mask (section 3.1).

    masks: (G, H, W); boxes: float32 (R, 4) in the masks' own pixels; index: int64 (R,) into masks, on the host. Returns float32
    (R, side, side) in 0..1.
    """
    used, place = torch.unique(index, return_inverse=True)
    device = boxes.device
    at_once = max(1, PIXELS_AT_ONCE // max(1, masks.shape[1] * masks.shape[2]))
    if len(used) <= at_once:
        return _align(masks[sent(used, device)], boxes, sent(place, device), side)
    targets = boxes.new_zeros(len(boxes), side, side)
    for first in range(0, len(used), at_once):
        here = torch.where((place >= first) & (place < first + at_once))[0]
        rows, some = sent(here, device), masks[sent(used[first : first + at_once], device)]
        targets[rows] = _align(some, boxes[rows], sent(place[here] - first, device), side)
    return targets


def _align(masks: BitMasks, boxes: Tensor, index: Tensor, side: int) -> Tensor:
    rois = torch.cat([index[:, None].to(boxes.dtype), boxes], dim=1)
    level = torch.zeros(len(rois), dtype=torch.int64, device=boxes.device)
    return roi_align([masks.unpack()[:, None].float()], rois, level, [1.0], side, sampling_ratio=0)[:, 0]
