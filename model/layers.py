"""Normalisation layers, and folding a frozen one into the convolution before it.

Shape letters in this package: B images, C channels, H x W pixels of a map or canvas, A anchors of a cell, R regions of
interest, N detections, G ground-truth instances, K keypoints, m mask side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.config import NormKind


class FrozenBatchNorm(nn.Module):
    """Batch normalisation by stored statistics that are never updated; (B, C, H, W) in and out."""

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
        """One multiply-add a value."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None])


def make_norm(kind: NormKind, channels: int, eps: float, groups: int) -> nn.Module:
    """The normalisation layer of that kind."""
    if kind == "frozen":
        return FrozenBatchNorm(channels, eps)
    if kind == "batch":
        return nn.BatchNorm2d(channels, eps=eps)
    if kind == "group":
        return nn.GroupNorm(groups, channels, eps=eps)
    return nn.Identity()


def fold_batch_norm(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d | None:
    """One convolution that does the work of both, for inference; None where `norm` depends on its input."""
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
    """Bias 0, where there is one."""
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
