"""Normalisation layers, and folding a frozen one into the convolution before it.

Shape letters in this package: B images, C channels, H x W pixels of a map or canvas, A anchors of a cell, R regions of
interest, N detections, G ground-truth instances, K keypoints, m mask side.
"""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from masklake.model.config import BackboneConfig, NormKind


class FrozenBatchNorm(nn.Module):
    """Batch normalisation with stored statistics that are never updated; (B, C, H, W) in and out."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), with one multiply-add per value."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None])


class Norm(NamedTuple):
    """A kind of normalisation layer: its name, the epsilon added to the variance, and the groups of a group norm."""

    kind: NormKind
    eps: float
    groups: int


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """Returns the normalisation layer for this number of channels."""
    if norm.kind == "frozen":
        return FrozenBatchNorm(channels, norm.eps)
    if norm.kind == "batch":
        return nn.BatchNorm2d(channels, eps=norm.eps)
    if norm.kind == "group":
        return nn.GroupNorm(norm.groups, channels, eps=norm.eps)
    return nn.Identity()


def backbone_norm(config: BackboneConfig) -> Norm:
    """Returns the norm after the backbone's convolutions."""
    return Norm(config.norm, config.norm_eps, config.norm_groups)


class ConvNorm(nn.Sequential):
    """Convolution `0`, then normalisation `1`; (B, C, H, W) in and out. The convolution has a bias if there is no norm."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, norm: Norm, groups: int = 1, dilation: int = 1) -> None:
        padding, bias = dilation * (kernel // 2), norm.kind == "none"
        conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation=dilation, groups=groups, bias=bias)
        init_relu_conv(conv)
        super().__init__(conv, make_norm(norm, c_out))

    def fold(self) -> None:
        """Merges the normalisation into the convolution, in place, if that is exact (inference only)."""
        conv, norm = self[0], self[1]
        if isinstance(conv, nn.Conv2d) and (folded := fold_batch_norm(conv, norm)) is not None:
            self[0], self[1] = folded, nn.Identity()


class Pointwise(nn.Linear):
    """A 1x1 convolution computed as a matrix product, for inference; (B, C, H, W) in and out, channels last.

    With a single thread, torch runs 1x1 convolutions by code that copies the maps to another memory order and leaves them
    there, which slows down the layers that follow.
    """

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Pointwise:
        """Returns a layer with the same weights."""
        layer = cls(conv.in_channels, conv.out_channels, bias=conv.bias is not None, device="meta")
        layer.weight = nn.Parameter(conv.weight.detach().flatten(1), requires_grad=False)
        if conv.bias is not None:
            layer.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
        return layer

    @staticmethod
    def fits(part: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Returns whether `part` is a convolution that a matrix product can compute without moving pixels."""
        return isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) == part.stride and part.groups == 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C_out, H, W). Nothing is copied, because channels are the last dimension in memory."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def fold_batch_norm(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d | None:
    """Returns one convolution that computes both, for inference; None if `norm` depends on its input."""
    if isinstance(norm, nn.Identity):
        return conv
    if not isinstance(norm, FrozenBatchNorm | nn.BatchNorm2d):
        return None
    folded = nn.BatchNorm2d(norm.weight.shape[0], eps=norm.eps, device=norm.weight.device)
    folded.load_state_dict(norm.state_dict(), strict=False)  # not strict: a frozen norm counts no batches
    return fuse_conv_bn_eval(conv.eval(), folded.eval())


def init_relu_conv(conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """He initialisation for a convolution that feeds a ReLU; bias 0."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    init_bias(conv)


def init_bias(conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Sets the bias, if any, to 0."""
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
