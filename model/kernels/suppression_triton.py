"""Non-maximum suppression on the GPU: one Triton launch for all groups of all images.

torchvision's kernel compares every box with every other, of all images and levels, and one block then processes the whole
table: the time grows with the square of the batch. Here each group (the boxes of one level or class in one image) has its own
program, and the groups run in parallel.

A program processes its group in tiles. The boxes of a tile are first compared with the survivors of all earlier tiles. Within
the tile, a box is suppressed if a surviving better one overlaps it, which is repeated until nothing changes. This gives the
greedy result: after k rounds at least the first k boxes are final.

Comparisons follow torchvision's CPU operator, operation by operation in float32: no fused multiply-adds, divisions rounded to
nearest.
"""

# mypy: disable-error-code="no-untyped-def"
# (the types of a kernel's arguments are known to Triton's compiler only)

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # boxes
# What `tl.max` reduces by. That is a kernel itself, which the interpreter cannot call if Triton was imported before it began.
larger_of = tl.standard._elementwise_max


@triton.jit
def _corners(boxes, rows, inside):
    """Returns x1, y1, x2, y2 of boxes; zeros outside the table."""
    at = boxes + rows * 4
    return (
        tl.load(at, mask=inside, other=0.0),
        tl.load(at + 1, mask=inside, other=0.0),
        tl.load(at + 2, mask=inside, other=0.0),
        tl.load(at + 3, mask=inside, other=0.0),
    )


@triton.jit
def _overlap(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, iou):
    """Returns bool (a, b): whether boxes overlap by more than `iou`."""
    width = tl.minimum(ax2[:, None], bx2[None, :]) - tl.maximum(ax1[:, None], bx1[None, :])
    height = tl.minimum(ay2[:, None], by2[None, :]) - tl.maximum(ay1[:, None], by1[None, :])
    common = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    union = ((ax2 - ax1) * (ay2 - ay1))[:, None] + ((bx2 - bx1) * (by2 - by1))[None, :] - common
    return tl.div_rn(common, tl.where(union > 0.0, union, 1.0)) > iou


@triton.jit
def _survivors_kernel(boxes, wanted, ends, kept, iou, TILE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64)
    end = tl.load(ends + first)
    # Every row has a program, so that the host need not know the number of groups; only the first of a group has work to do.
    before = tl.load(ends + tl.maximum(first - 1, 0))
    end = tl.where((first == 0) | (before == first), end, first)
    for base in range(first, end, TILE):
        columns = base + tl.arange(0, TILE)
        inside = columns < end
        bx1, by1, bx2, by2 = _corners(boxes, columns, inside)
        alive = tl.load(wanted + columns, mask=inside, other=0).to(tl.int32)
        for above in range(first, base, TILE):
            rows = above + tl.arange(0, TILE)
            ax1, ay1, ax2, ay2 = _corners(boxes, rows, rows < end)
            lives = tl.load(kept + rows).to(tl.int32)
            hit = _overlap(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, iou).to(tl.int32) * lives[:, None]
            alive = alive * (1 - tl.reduce(hit, 0, larger_of))
        better = tl.arange(0, TILE)[:, None] < tl.arange(0, TILE)[None, :]
        hits = (_overlap(bx1, by1, bx2, by2, bx1, by1, bx2, by2, iou) & better).to(tl.int32)
        lives = alive
        changed = tl.reduce(alive, 0, larger_of)
        while changed > 0:
            after = alive * (1 - tl.reduce(hits * lives[:, None], 0, larger_of))
            changed = tl.reduce(tl.abs(after - lives), 0, larger_of)
            lives = after
        tl.store(kept + columns, lives.to(tl.int8), mask=inside)
        tl.debug_barrier()  # the next tiles read what other threads have written


def survivors_triton(boxes: Tensor, wanted: Tensor, ends: Tensor, iou: float) -> Tensor:
    """Suppresses all groups in one launch, in float32; see `survivors` for arguments and result."""
    kept = torch.zeros(len(boxes), dtype=torch.int8, device=boxes.device)
    if len(boxes):
        with torch.cuda.device_of(boxes):  # Triton launches on the current device
            _survivors_kernel[(len(boxes),)](
                boxes.float().contiguous(),
                wanted.to(torch.int8),
                ends.contiguous(),
                kept,
                _rounded_down(iou),
                TILE=TILE,
                num_warps=8,
                num_stages=1,
                enable_fp_fusion=False,
            )
    return kept.bool()


def _rounded_down(value: float) -> float:
    """Returns the largest float32 that is not above a value: a float32 exceeds both or neither."""
    rounded = np.float32(value)
    return float(np.nextafter(rounded, np.float32(-np.inf))) if float(rounded) > value else float(rounded)
