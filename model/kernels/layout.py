"""Shared by all implementations of an operator: supported dtypes and numbers of levels, the memory layout of results, and
warnings.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor

BAG_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FARTHEST = 1 << 20
"""Maximum coordinate of a RoI, in feature pixels: one that reaches farther cannot belong to an image, and its bins are zero."""
TRITON_LEVELS = 5  # P2 to P6: each is a pointer argument of the kernels


def empty_pooled(features: Sequence[Tensor], rois: int, output_size: int) -> Tensor:
    """Returns an uninitialised tensor (R, C, P, P) in channels_last memory, for any memory format of the features."""
    return features[0].new_empty((rois, output_size, output_size, features[0].shape[1])).permute(0, 3, 1, 2)


def empty_gradient(feature: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns an uninitialised gradient of a level, in channels_last memory for any memory format of the level."""
    batch, channels, height, width = feature.shape
    return feature.new_empty((batch, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


@cache
def warn_once(message: str) -> None:
    """Warns of a fallback, only the first time: otherwise every batch would repeat it."""
    warnings.warn(message, stacklevel=2)


def triton_or_reference(device: str, lack: str) -> Literal["triton", "reference"]:
    """Returns the implementation of an operator for this device; warns once if it is the slow one. lack: what the operator
    does, for the warning.
    """
    if device == "cuda":
        return "triton"
    warn_once(f"no kernel {lack} on {device}: falling back to the slow reference")
    return "reference"
