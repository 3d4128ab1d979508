"""Copies a network for inference: norms folded into convolutions, channels last, in the requested precision."""

from __future__ import annotations

import copy

import torch
from torch import nn

from masklake.model.fields import Precision
from masklake.model.heads.box import BoxHead
from masklake.model.kernels.winograd import WinogradConv
from masklake.model.layers import ConvNorm, Pointwise

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def for_inference(network: nn.Module, precision: Precision) -> nn.Module:
    """Returns a frozen copy of `network` (any module built from this package's layers), for inference only."""
    prepared = copy.deepcopy(network).eval().requires_grad_(False)
    for part in prepared.modules():
        if isinstance(part, ConvNorm):
            part.fold()
    for part in list(prepared.modules()):
        for name, child in part.named_children():
            if Pointwise.fits(child):
                setattr(part, name, Pointwise.of(child))
            elif DTYPES[precision] == torch.float32 and WinogradConv.fits(child) and child.weight.device.type == "cpu":
                setattr(part, name, WinogradConv(child))  # a GPU's library chooses such algorithms itself
    exact = {layer for part in prepared.modules() if isinstance(part, BoxHead) for layer in part.predictors}
    for part in prepared.modules():
        if part not in exact:
            _convert(part, DTYPES[precision])
    return prepared


def _convert(part: nn.Module, dtype: torch.dtype) -> None:
    """Changes the precision of layers; buffers of coordinates (anchors) are never changed."""
    if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
        part.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stub
    elif isinstance(part, nn.Linear | nn.GroupNorm | nn.BatchNorm2d):
        part.to(dtype=dtype)


def fingerprint(network: nn.Module) -> tuple[tuple[int, int], ...]:
    """Returns a value that changes whenever a weight does: in place, by loading, or by moving to another device."""
    tensors = [*network.parameters(), *network.buffers()]
    # Tensors made in inference mode count no versions: they cannot be trained either.
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)
