"""Anchors: reference boxes of the region proposal network (Ren et al. 2015; FPN section 4.1).

The index of an anchor in a level is (y * W + x) * A + a, the order in which the RPN head's maps are flattened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from masklake.model.config import ModelConfig


def cell_anchors(
    sizes: Sequence[float], ratios: Sequence[float], rounding: bool, order: Literal["ratio", "size"] = "ratio"
) -> Tensor:
    """Returns float32 (A, 4): xyxy around the origin, area size^2, ratio height / width.

    order: by ratio, then by size, or the other way round.
    """
    roots = torch.tensor(ratios, dtype=torch.float32).sqrt()
    scales = torch.tensor(sizes, dtype=torch.float32)
    heights, widths = roots[:, None] * scales, (1 / roots)[:, None] * scales
    cells = torch.stack([-widths, -heights, widths, heights], dim=2) / 2
    cells = (cells if order == "ratio" else cells.transpose(0, 1)).reshape(-1, 4)
    return cells.round() if rounding else cells


def level_strides(config: ModelConfig, canvas: tuple[int, int], maps: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns canvas pixels between cells, (vertical, horizontal), of each level. `maps` are the levels' (H, W)."""
    if config.anchor_stride == "fixed":
        return [(stride, stride) for stride in config.rpn_strides]
    return [(canvas[0] // height, canvas[1] // width) for height, width in maps]


def anchors_at(index: Tensor, cells: Tensor, width: int, stride: tuple[int, int]) -> Tensor:
    """Returns the anchors of one level at these indices.

    index: int64 (...); cells: float32 (A, 4); width: of the level's map; stride: (vertical, horizontal) canvas pixels. Returns
    float32 (..., 4), xyxy in canvas pixels. Only the requested anchors are computed; there is no grid of all anchors.
    """
    place = index.div(len(cells), rounding_mode="floor")
    x = (place % width) * stride[1]
    y = place.div(width, rounding_mode="floor") * stride[0]
    return cells[index % len(cells)] + torch.stack([x, y, x, y], dim=-1).to(cells.dtype)
