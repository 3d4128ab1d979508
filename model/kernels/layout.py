"""What the implementations of an operator agree on: the dtypes and level counts each serves, how results lie in memory, and how
a slow one is announced.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

BAG_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FARTHEST = 1 << 20
"""Feature pixels: a RoI that reaches farther from the map's corner is no region of any image, and pools to zeros."""
TRITON_LEVELS = 5  # P2 to P6: each is a pointer argument of the kernels


def empty_pooled(features: Sequence[Tensor], rois: int, output_size: int) -> Tensor:
    """An uninitialised (R, C, P, P) in channels_last memory, whatever the features' own order is."""
    return features[0].new_empty((rois, output_size, output_size, features[0].shape[1])).permute(0, 3, 1, 2)


def empty_gradient(feature: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised gradient of a level, in channels_last memory whatever the level's own order is."""
    batch, channels, height, width = feature.shape
    return feature.new_empty((batch, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


@cache
def warn_once(message: str) -> None:
    """Warn of a fallback, the first time only: it would be said for every batch."""
    warnings.warn(message, stacklevel=2)
