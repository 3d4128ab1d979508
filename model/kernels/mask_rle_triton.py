"""Finds where pasted masks change on the GPU: two Triton launches that walk down the columns of all masks at once.

Each thread follows a stretch of one image column of one mask downwards and interpolates the small mask there; no pasted pixel
is ever stored. The first launch counts the changes of each stretch, a prefix sum gives the position of its first change, and
the second launch walks again and writes them. A pixel costs some tens of instructions and no memory traffic, because the mask
stays in the first-level cache.

The arithmetic repeats torch's CPU resizing operation by operation in float32, with divisions rounded to nearest and with fused
multiply-adds exactly where torch's code has them, so that a pixel near the threshold falls on the same side on both devices.
torch uses other code for outputs whose sides sum to at most 128, so there are two orders of operations. Both were found by
comparing bits with torch 2.15 on x86 (AVX2, AVX-512). If torch was compiled with other fused operations (x86 without FMA, other
processors), a pixel within a unit in the last place of the threshold may differ.

Shape letters: N masks, m mask side, E edges.
"""

# mypy: disable-error-code="no-untyped-def"
# (the types of a kernel's arguments are known to Triton's compiler only)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FAR = 1e9  # pixels; coordinates are clamped to it so that integer arithmetic cannot overflow
COLUMNS = 16  # image columns per program: few threads are idle beside a narrow box
MAX_STRETCHES = 1 << 24  # maximum number counted at once, 12 bytes each: limits the memory for many masks in wide images
STRETCHES = 8  # per column, walked in parallel: the length of a walk determines the time of a launch


@triton.jit
def _fused(a, b, c):
    """Returns a * b + c, rounded once to float32: the product is exact in float64.

    Not `tl.fma`, which the interpreter rounds twice. The rounding of the sum in float64 changes one result in about 2**28.
    """
    return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)


@triton.jit
def _neighbours(pixel, pixels, small, SIDE: tl.constexpr):
    """Returns the cells of the padded mask on both sides of a pixel of the box, and their weights. pixels: size of the box."""
    step = tl.div_rn(tl.full(pixel.shape, SIDE + 2, tl.float32), pixels.to(tl.float32))
    centre = pixel.to(tl.float32) + 0.5
    at = step * centre - 0.5
    if small:
        at = _fused(centre, step, tl.full(pixel.shape, -0.5, tl.float32))
    at = tl.maximum(at, 0.0)
    low = tl.minimum(at.to(tl.int64), SIDE + 1)
    # Equal sizes are copied: the next cell has no weight, but it might be NaN.
    high = tl.where(pixels == SIDE + 2, low, tl.minimum(low + 1, SIDE + 1))
    upper = tl.minimum(tl.maximum(at - low.to(tl.float32), 0.0), 1.0)
    return low, high, 1.0 - upper, upper


@triton.jit
def _cell(mask, mask_y, mask_x, y, x, wanted, SIDE: tl.constexpr):
    """Returns cells of the mask, padded by one zero on each side."""
    inside = wanted & (y >= 1) & (y <= SIDE) & (x >= 1) & (x <= SIDE)
    return tl.load(mask + (y - 1) * mask_y + (x - 1) * mask_x, mask=inside, other=0.0)


@triton.jit
def _above(
    mask,
    mask_y,
    mask_x,
    y0,
    box_h,
    top,
    bottom,
    row,
    x_low,
    x_high,
    x_lower,
    x_upper,
    wanted,
    small,
    threshold,
    SIDE: tl.constexpr,
):
    """Returns int32: 1 if the pixel of a row and column is set; 0 if not, or outside the visible part of the box."""
    visible = wanted & (row >= top) & (row < bottom)
    y_low, y_high, y_lower, y_upper = _neighbours(row - y0, box_h, small, SIDE)
    top_left = _cell(mask, mask_y, mask_x, y_low, x_low, visible, SIDE)
    top_right = _cell(mask, mask_y, mask_x, y_low, x_high, visible, SIDE)
    bottom_left = _cell(mask, mask_y, mask_x, y_high, x_low, visible, SIDE)
    bottom_right = _cell(mask, mask_y, mask_x, y_high, x_high, visible, SIDE)
    if small:
        value = _fused(top_left, y_lower * x_lower, top_right * (y_lower * x_upper))
        value = _fused(bottom_left, y_upper * x_lower, value)
        value = _fused(bottom_right, y_upper * x_upper, value)
    else:
        upper_row = _fused(top_left, x_lower, top_right * x_upper)
        lower_row = _fused(bottom_left, x_lower, bottom_right * x_upper)
        value = _fused(upper_row, y_lower, lower_row * y_upper)
    return (visible & (value > threshold)).to(tl.int32)


@triton.jit
def _walk_kernel(
    # pointers
    masks,
    regions,
    counts,
    ends,
    edges,
    # sizes
    columns,
    room,
    threshold,
    # strides
    mask_n,
    mask_y,
    mask_x,
    # constants
    SIDE: tl.constexpr,
    WRITE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRETCHES: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1).to(tl.int64) * (COLUMNS * STRETCHES) + tl.arange(0, COLUMNS * STRETCHES)
    zero = tl.full((COLUMNS * STRETCHES,), 0, tl.int64)
    # Blocks instead of scalars: the interpreter loses the type of a scalar comparison when it is broadcast.
    region = regions + number * 10 + zero
    x0, y0 = tl.load(region), tl.load(region + 1)
    box_w, box_h = tl.load(region + 2), tl.load(region + 3)
    left, right = tl.load(region + 4), tl.load(region + 5)
    top, bottom = tl.load(region + 6), tl.load(region + 7)
    height, width = tl.load(region + 8), tl.load(region + 9)
    small = tl.load(regions + number * 10 + 2) + tl.load(regions + number * 10 + 3) <= 128
    # The row below the visible ones belongs to the walk: runs end there.
    length = tl.load(regions + number * 10 + 7) - tl.load(regions + number * 10 + 6) + 1
    length = (length + STRETCHES - 1) // STRETCHES
    if tl.program_id(1) * COLUMNS >= tl.load(regions + number * 10 + 5) - tl.load(regions + number * 10 + 4):
        length = length * 0  # beside the box: nothing to walk
    mask = masks + number * mask_n
    column = left + lane // STRETCHES
    start = top + lane % STRETCHES * length
    wanted = column < right

    x_low, x_high, x_lower, x_upper = _neighbours(column - x0, box_w, small, SIDE)
    a_low, a_high, a_lower, a_upper = _neighbours(column - 1 - x0, box_w, small, SIDE)
    b_low, b_high, b_lower, b_upper = _neighbours(column + 1 - x0, box_w, small, SIDE)
    # A run that reaches the image's last row goes on in the first one of the next column: no edge on either side.
    before = _above(
        mask, mask_y, mask_x, y0, box_h, top, bottom, height - 1, a_low, a_high, a_lower, a_upper,
        wanted & (column > left) & (top == 0), small, threshold, SIDE,
    )  # fmt: skip
    after = _above(
        mask, mask_y, mask_x, y0, box_h, top, bottom, zero, b_low, b_high, b_lower, b_upper,
        (column + 1 < right) & (bottom == height), small, threshold, SIDE,
    )  # fmt: skip
    # Nor is there one behind the image's last pixel.
    no_foot = (after == 1) | (column * height + bottom >= height * width)
    previous = _above(
        mask, mask_y, mask_x, y0, box_h, top, bottom, start - 1, x_low, x_high, x_lower, x_upper, wanted, small, threshold, SIDE
    )
    slot = number * columns * STRETCHES + lane
    kept = lane // STRETCHES < columns  # an int of 1 is a constant to Triton, without methods
    if WRITE:
        begin = tl.load(ends + slot, mask=kept, other=0) - tl.load(counts + slot, mask=kept, other=0)
    found = tl.full((COLUMNS * STRETCHES,), 0, tl.int32)
    for step in range(length):
        row = start + step
        current = _above(
            mask, mask_y, mask_x, y0, box_h, top, bottom, row, x_low, x_high, x_lower, x_upper, wanted, small, threshold, SIDE
        )
        joined = ((row == top) & (before == 1)) | ((row == bottom) & no_foot)
        edge = (current != previous) & ~joined
        if WRITE:
            tl.store(edges + begin + found, column * height + row, mask=edge & (begin + found < room))
        found += edge.to(tl.int32)
        previous = current
    if not WRITE:
        tl.store(counts + slot, found, mask=kept)


def mask_edges_triton(
    masks: Tensor, boxes: Tensor, sizes: Tensor, threshold: float, widest: int, room: int
) -> tuple[Tensor, Tensor]:
    """Finds where every pasted mask changes, with two launches per MAX_STRETCHES; see `mask_edges`."""
    edges = masks.new_zeros((room,), dtype=torch.int64)
    if len(masks) == 0:
        return edges.new_zeros(0), edges
    regions = _regions(boxes.float(), sizes, masks.shape[-1])
    each, found = max(1, MAX_STRETCHES // (widest * STRETCHES)), edges.new_zeros(())
    totals = []
    for values, some in zip(torch.split(masks.float(), each), torch.split(regions, each), strict=True):
        counts = edges.new_empty((len(values), widest * STRETCHES), dtype=torch.int32)
        arguments = (values, some, counts, widest, room, threshold)
        _walk(*arguments, ends=edges, edges=edges, write=False)
        ends = counts.view(-1).cumsum(0) + found
        _walk(*arguments, ends=ends, edges=edges, write=True)
        totals.append(counts.sum(1))
        found = ends[-1]
    return torch.cat(totals), edges


def _walk(
    masks: Tensor,
    regions: Tensor,
    counts: Tensor,
    widest: int,
    room: int,
    threshold: float,
    *,
    ends: Tensor,
    edges: Tensor,
    write: bool,
) -> None:
    """Launches the kernel once, which counts the changes of each stretch or writes them. ends: one past the last of each."""
    with torch.cuda.device_of(masks):  # Triton launches on the current device
        _walk_kernel[len(masks), triton.cdiv(widest, COLUMNS)](
            masks,
            regions,
            counts,
            ends,
            edges,
            widest,
            room,
            threshold,
            *masks.stride(),
            SIDE=masks.shape[-1],
            WRITE=write,
            COLUMNS=COLUMNS,
            STRETCHES=STRETCHES,
            enable_fp_fusion=False,
        )


def _regions(boxes: Tensor, sizes: Tensor, side: int) -> Tensor:
    """Returns int64 (N, 10) for boxes float32 (N, 4) and image sizes int64 (N, 2): x, y, width and height of the box in whole
    pixels, first and last visible column, first and last visible row (the last ones exclusive; equal if nothing is visible),
    height and width of the image.

    Boxes are enlarged like their padded masks and truncated towards zero, both corners inclusive. Computed with torch,
    operation by operation: a fused operation would round once less and could move a box by a pixel.
    """
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * (float(side + 2) / side)
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    grown = torch.cat((centre - half, centre + half), dim=1)
    finite = torch.isfinite(grown).all(1, keepdim=True)
    corners = torch.where(finite, grown, -FAR).clamp(-FAR, FAR).to(torch.int64)
    extent = sizes.flip(1)  # width, height: as x and y
    first = corners[:, :2].clamp(min=0)
    last = torch.minimum(corners[:, 2:] + 1, extent)
    seen = (last > first).all(1, keepdim=True)
    first, last = first * seen, last * seen
    pixels = (corners[:, 2:] - corners[:, :2] + 1).clamp(min=1)
    visible = torch.stack((first, last), dim=2).flatten(1)
    return torch.cat((corners[:, :2], pixels, visible, sizes), dim=1)
