"""Anchors: reference boxes of the region proposal network (Ren et al. 2015; FPN section 4.1).

The index of an anchor in a level is (y * W + x) * A + a, the order in which the RPN head's maps are flattened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn


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


class Anchors(nn.Module):
    """The anchors of every level: `per_cell` of them at each cell of its map."""

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        ratios: Sequence[float],
        rounding: bool,
        order: Literal["ratio", "size"],
        strides: Sequence[int] | None,
    ) -> None:
        """sizes: canvas pixels, equally many at each level; ratios, rounding, order: as of `cell_anchors`; strides: as of
        `level_strides`.
        """
        super().__init__()
        self.strides = strides
        self.per_cell = len(sizes[0]) * len(ratios)
        for level, of_level in enumerate(sizes):
            self.register_buffer(f"cells{level}", cell_anchors(of_level, ratios, rounding, order), persistent=False)

    def levels(self, maps: Sequence[Tensor], canvas: tuple[int, int]) -> list[tuple[Tensor, int, tuple[int, int]]]:
        """Returns for each map (B, C, H, W) the arguments of `anchors_at`: cell anchors, the map's width, the stride."""
        shapes = [(level.shape[-2], level.shape[-1]) for level in maps]
        strides = level_strides(self.strides, canvas, shapes)
        return [
            (self.get_buffer(f"cells{index}"), width, stride)
            for index, ((_, width), stride) in enumerate(zip(shapes, strides, strict=True))
        ]


def level_strides(
    strides: Sequence[int] | None, canvas: tuple[int, int], maps: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Returns canvas pixels between cells, (vertical, horizontal), of each level. `maps` are the levels' (H, W).

    strides: of each level; None for the side of the canvas divided by that of the map, rounded down.
    """
    if strides is not None:
        return [(stride, stride) for stride in strides]
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
