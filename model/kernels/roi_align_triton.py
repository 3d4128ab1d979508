"""RoIAlign on the GPU: one Triton launch for all RoIs of all pyramid levels.

Each program pools one row of P bins of one RoI for a block of channels. It looks up the level of the RoI itself, so RoIs are
not sorted or gathered by level. Values of any supported dtype are accumulated in float32; addresses are 64-bit.

Strides come from a table, because they differ between levels, so the compiler cannot know that channels are contiguous. WIDE
tells it that they are, and that all other strides are multiples of 16: threads then load and add 16 bytes at once instead of
one element.

Shape letters: R RoIs, B images, C channels, L levels, P output bins per side.
"""

# mypy: disable-error-code="no-untyped-def"
# (the types of a kernel's arguments are known to Triton's compiler only)

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from masklake.model.kernels.layout import FARTHEST, TRITON_LEVELS, empty_gradient, empty_pooled

FAR = tl.constexpr(FARTHEST)
FORWARD_ELEMENTS = 4096
"""Bins times channels of a program: as many as registers can hold."""
BACKWARD_ELEMENTS = 1024
"""Bins times channels of a program: four per thread of at most eight warps. A thread then reads the gradients of the four sums
that it adds at once, and they are not shuffled between threads for every sample.
"""


@triton.jit
def _level_pointer(f0, f1, f2, f3, f4, level):
    """Returns the pointer to the feature map of a level; levels that do not exist repeat the first one."""
    pointer = f0
    if level == 1:
        pointer = f1
    if level == 2:
        pointer = f2
    if level == 3:
        pointer = f3
    if level == 4:
        pointer = f4
    return pointer


@triton.jit
def _layout(geometry, level, WIDE: tl.constexpr):
    """Returns the strides of a level's image, channel, row and column."""
    stride_b = tl.load(geometry + level * 6 + 2)
    stride_c = tl.load(geometry + level * 6 + 3)
    stride_y = tl.load(geometry + level * 6 + 4)
    stride_x = tl.load(geometry + level * 6 + 5)
    if WIDE:
        stride_b = tl.multiple_of(stride_b, 16)
        stride_c = 1
        stride_y = tl.multiple_of(stride_y, 16)
        stride_x = tl.multiple_of(stride_x, 16)
    return stride_b, stride_c, stride_y, stride_x


@triton.jit
def _roi_geometry(rois, scales, roi, level, P: tl.constexpr, SAMPLING: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns first corner and bin size of one RoI in feature pixels, its samples per bin, and whether it is near the map."""
    scale = tl.load(scales + level)
    offset = 0.5 if ALIGNED else 0.0
    x1 = tl.load(rois + roi * 5 + 1) * scale
    y1 = tl.load(rois + roi * 5 + 2) * scale
    x2 = tl.load(rois + roi * 5 + 3) * scale
    y2 = tl.load(rois + roi * 5 + 4) * scale
    # False for NaN, too.
    near = (tl.abs(x1) <= FAR) & (tl.abs(y1) <= FAR) & (tl.abs(x2) <= FAR) & (tl.abs(y2) <= FAR)
    x1 = tl.where(near, x1, 0.0) - offset
    y1 = tl.where(near, y1, 0.0) - offset
    width = tl.where(near, x2, 0.0) - offset - x1
    height = tl.where(near, y2, 0.0) - offset - y1
    if not ALIGNED:
        width = tl.maximum(width, 1.0)
        height = tl.maximum(height, 1.0)
    bin_w = width / P
    bin_h = height / P
    grid_w = SAMPLING
    grid_h = SAMPLING
    if SAMPLING == 0:
        grid_w = tl.ceil(bin_w).to(tl.int32)
        grid_h = tl.ceil(bin_h).to(tl.int32)
    return x1, y1, bin_w, bin_h, grid_w, grid_h, near


@triton.jit
def _place(rois, levels, roi, images, num_levels):
    """Returns image and level of a RoI, and whether both exist; otherwise both are 0."""
    level = tl.load(levels + roi)
    number = tl.load(rois + roi * 5)
    known = (level >= 0) & (level < num_levels) & (number >= 0) & (number < images)
    return tl.where(known, number, 0.0).to(tl.int64), tl.where(known, level, 0), known


@triton.jit
def _corners(at, size):
    """Returns both neighbours, their weights and whether the sample counts, along one axis of `size` pixels."""
    counts = (at >= -1.0) & (at <= size)
    at = tl.minimum(tl.maximum(at, 0.0), (size - 1).to(tl.float32))
    low = at.to(tl.int64)
    high = tl.minimum(low + 1, size - 1)
    upper = at - low.to(tl.float32)
    return low, high, 1.0 - upper, upper, counts


@triton.jit
def _interpolate(feature, wanted, y, x, height, width, stride_y, stride_x):
    """Returns values (P2, BLOCK_C) at the points y, x (P2,); zero for points and elements that do not count."""
    y_low, y_high, wy_low, wy_high, y_counts = _corners(y, height)
    x_low, x_high, wx_low, wx_high, x_counts = _corners(x, width)
    read = wanted & (y_counts & x_counts)[:, None]
    top_left = tl.load(feature + (y_low * stride_y + x_low * stride_x)[:, None], mask=read, other=0.0).to(tl.float32)
    top_right = tl.load(feature + (y_low * stride_y + x_high * stride_x)[:, None], mask=read, other=0.0).to(tl.float32)
    bottom_left = tl.load(feature + (y_high * stride_y + x_low * stride_x)[:, None], mask=read, other=0.0).to(tl.float32)
    bottom_right = tl.load(feature + (y_high * stride_y + x_high * stride_x)[:, None], mask=read, other=0.0).to(tl.float32)
    top = top_left * wx_low[:, None] + top_right * wx_high[:, None]
    bottom = bottom_left * wx_low[:, None] + bottom_right * wx_high[:, None]
    return top * wy_low[:, None] + bottom * wy_high[:, None]


@triton.jit
def _scatter(gradient, value, wanted, y, x, height, width, stride_y, stride_x):
    """Adds `value` (P2, BLOCK_C), weighted, to the four corners of the points y, x (P2,)."""
    y_low, y_high, wy_low, wy_high, y_counts = _corners(y, height)
    x_low, x_high, wx_low, wx_high, x_counts = _corners(x, width)
    write = wanted & (y_counts & x_counts)[:, None]
    top_left = gradient + (y_low * stride_y + x_low * stride_x)[:, None]
    top_right = gradient + (y_low * stride_y + x_high * stride_x)[:, None]
    bottom_left = gradient + (y_high * stride_y + x_low * stride_x)[:, None]
    bottom_right = gradient + (y_high * stride_y + x_high * stride_x)[:, None]
    tl.atomic_add(top_left, value * (wy_low * wx_low)[:, None], mask=write, sem="relaxed")
    tl.atomic_add(top_right, value * (wy_low * wx_high)[:, None], mask=write, sem="relaxed")
    tl.atomic_add(bottom_left, value * (wy_high * wx_low)[:, None], mask=write, sem="relaxed")
    tl.atomic_add(bottom_right, value * (wy_high * wx_high)[:, None], mask=write, sem="relaxed")


@triton.jit
def _forward_kernel(
    # pointers
    out,
    f0,
    f1,
    f2,
    f3,
    f4,
    rois,
    levels,
    geometry,
    scales,
    # sizes
    channels,
    images,
    num_levels,
    # strides
    out_roi,
    out_c,
    out_y,
    out_x,
    # constants
    P: tl.constexpr,
    P2: tl.constexpr,
    SAMPLING: tl.constexpr,
    ALIGNED: tl.constexpr,
    MAX: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    roi = row // P
    ph = (row % P).to(tl.float32)
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    pw = tl.arange(0, P2)
    image, level, known = _place(rois, levels, roi, images, num_levels)
    x1, y1, bin_w, bin_h, grid_w, grid_h, near = _roi_geometry(rois, scales, roi, level, P, SAMPLING, ALIGNED)
    height = tl.load(geometry + level * 6)
    width = tl.load(geometry + level * 6 + 1)
    stride_b, stride_c, stride_y, stride_x = _layout(geometry, level, WIDE)
    feature = _level_pointer(f0, f1, f2, f3, f4, level) + image * stride_b + (channel * stride_c)[None, :]
    bins = tl.where(known & near, P, 0)
    wanted = (pw < bins)[:, None] & (channel < channels)[None, :]

    pooled = tl.full((P2, BLOCK_C), float("-inf") if MAX else 0.0, tl.float32)
    for iy in range(grid_h):
        # One y for all bins, but as a block: the interpreter loses the type of a scalar comparison when it is broadcast.
        y = y1 + ph * bin_h + (iy + 0.5) * bin_h / grid_h + tl.full((P2,), 0.0, tl.float32)
        for ix in range(grid_w):
            x = x1 + pw * bin_w + (ix + 0.5) * bin_w / grid_w
            value = _interpolate(feature, wanted, y, x, height, width, stride_y, stride_x)
            if MAX:
                pooled = tl.maximum(pooled, value, propagate_nan=tl.PropagateNan.ALL)
            else:
                pooled += value
    samples = tl.maximum(grid_h, 0) * tl.maximum(grid_w, 0)
    pooled = tl.where(wanted & (samples > 0), pooled, 0.0) if MAX else pooled / tl.maximum(samples, 1)
    target = out + roi * out_roi + channel[None, :] * out_c + (row % P) * out_y + pw[:, None].to(tl.int64) * out_x
    tl.store(target, pooled.to(out.dtype.element_ty), mask=(pw < P)[:, None] & (channel < channels)[None, :])


@triton.jit
def _backward_kernel(
    # pointers
    grad,
    f0,
    f1,
    f2,
    f3,
    f4,
    g0,
    g1,
    g2,
    g3,
    g4,
    rois,
    levels,
    geometry,
    gradient_geometry,
    scales,
    # sizes
    channels,
    images,
    num_levels,
    # strides
    grad_roi,
    grad_c,
    grad_y,
    grad_x,
    # constants
    P: tl.constexpr,
    P2: tl.constexpr,
    SAMPLING: tl.constexpr,
    ALIGNED: tl.constexpr,
    MAX: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_GRADIENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    roi = row // P
    ph = (row % P).to(tl.float32)
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    pw = tl.arange(0, P2)
    image, level, known = _place(rois, levels, roi, images, num_levels)
    x1, y1, bin_w, bin_h, grid_w, grid_h, near = _roi_geometry(rois, scales, roi, level, P, SAMPLING, ALIGNED)
    height = tl.load(geometry + level * 6)
    width = tl.load(geometry + level * 6 + 1)
    bins = tl.where(known & near, P, 0)
    wanted = (pw < bins)[:, None] & (channel < channels)[None, :]
    source = grad + roi * grad_roi + channel[None, :] * grad_c + (row % P) * grad_y + pw[:, None].to(tl.int64) * grad_x
    value = tl.load(source, mask=wanted, other=0.0).to(tl.float32)

    winner = tl.full((P2, BLOCK_C), 0, tl.int32)
    if MAX:  # find the largest sample again: cheaper than storing its index for every output
        stride_b, stride_c, stride_y, stride_x = _layout(geometry, level, WIDE)
        feature = _level_pointer(f0, f1, f2, f3, f4, level) + image * stride_b + (channel * stride_c)[None, :]
        pooled = tl.full((P2, BLOCK_C), float("-inf"), tl.float32)
        for iy in range(grid_h):
            y = y1 + ph * bin_h + (iy + 0.5) * bin_h / grid_h + tl.full((P2,), 0.0, tl.float32)
            for ix in range(grid_w):
                x = x1 + pw * bin_w + (ix + 0.5) * bin_w / grid_w
                sample = _interpolate(feature, wanted, y, x, height, width, stride_y, stride_x)
                # NaN is the largest value, as in torch.
                larger = (sample > pooled) | ((sample != sample) & (pooled == pooled))
                winner = tl.where(larger, iy * grid_w + ix, winner)
                pooled = tl.where(larger, sample, pooled)
    else:
        value = value / tl.maximum(tl.maximum(grid_h, 0) * tl.maximum(grid_w, 0), 1)

    into_b, into_c, into_y, into_x = _layout(gradient_geometry, level, WIDE_GRADIENT)
    gradient = _level_pointer(g0, g1, g2, g3, g4, level) + image * into_b + (channel * into_c)[None, :]
    for iy in range(grid_h):
        y = y1 + ph * bin_h + (iy + 0.5) * bin_h / grid_h + tl.full((P2,), 0.0, tl.float32)
        for ix in range(grid_w):
            x = x1 + pw * bin_w + (ix + 0.5) * bin_w / grid_w
            chosen = wanted
            if MAX:
                chosen = wanted & (winner == iy * grid_w + ix)
            _scatter(gradient, value, chosen, y, x, height, width, into_y, into_x)


def roi_align_triton(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: int,
    sampling_ratio: int = 2,
    aligned: bool = False,
    mode: str = "avg",
) -> Tensor:
    """Pools every RoI from its level in one launch; see `roi_align` for the arguments.

    features: at most TRITON_LEVELS levels, of one of TRITON_DTYPES, with any strides. Returns (R, C, P, P) in the features'
    dtype and channels_last memory. Not differentiable by itself.
    """
    out = empty_pooled(features, len(rois), output_size)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(out):  # Triton launches on the current device
        _forward_kernel[_grid(rois, features[0].shape[1], output_size, FORWARD_ELEMENTS)](
            out,
            *_arguments(features),
            *_roi_arguments(rois, levels),
            *_level_tables(features, tuple(scales)),
            features[0].shape[1],
            features[0].shape[0],
            len(features),
            *out.stride(),
            **_constants(features, output_size, sampling_ratio, aligned, mode, FORWARD_ELEMENTS),
        )
    return out


def roi_align_triton_backward(
    grad: Tensor,
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: int,
    sampling_ratio: int = 2,
    aligned: bool = False,
    mode: str = "avg",
) -> list[Tensor]:
    """Returns the gradients of the levels for `grad` (R, C, P, P), in channels_last memory, from one launch that adds
    atomically in float32.

    The order of additions, and with it the last bits, differs from run to run; `roi_align_cpu_backward` is deterministic.
    """
    sums = [empty_gradient(f, torch.float32).zero_() for f in features]
    if grad.numel() == 0:
        return [s.to(f.dtype) for s, f in zip(sums, features, strict=True)]
    geometry, scale_table = _level_tables(features, tuple(scales))
    constants = _constants(features, output_size, sampling_ratio, aligned, mode, BACKWARD_ELEMENTS)
    with torch.cuda.device_of(grad):
        _backward_kernel[_grid(rois, features[0].shape[1], output_size, BACKWARD_ELEMENTS)](
            grad,
            *_arguments(features),
            *_arguments(sums),
            *_roi_arguments(rois, levels),
            geometry,
            _level_tables(sums, tuple(scales))[0],
            scale_table,
            features[0].shape[1],
            features[0].shape[0],
            len(features),
            *grad.stride(),
            WIDE_GRADIENT=_is_wide(sums),
            num_warps=max(1, constants["P2"] * constants["BLOCK_C"] // 128),
            **constants,
        )
    return [s.to(f.dtype) for s, f in zip(sums, features, strict=True)]


def _grid(rois: Tensor, channels: int, output_size: int, elements: int) -> tuple[int, int]:
    return len(rois) * output_size, triton.cdiv(channels, _channel_block(channels, output_size, elements))


def _channel_block(channels: int, output_size: int, elements: int) -> int:
    """Returns the number of channels of a program: at most 256, and at most `elements` together with a row of bins."""
    return min(256, triton.next_power_of_2(channels), max(1, elements // triton.next_power_of_2(output_size)))


def _is_wide(features: Sequence[Tensor]) -> bool:
    """Returns whether channels can be read 16 bytes at a time: they are contiguous, and every row of them is aligned."""
    return all(
        f.stride(1) == 1 and f.data_ptr() % 16 == 0 and not any(f.stride(axis) % 16 for axis in (0, 2, 3)) for f in features
    )


def _constants(
    features: Sequence[Tensor], output_size: int, sampling_ratio: int, aligned: bool, mode: str, elements: int
) -> dict[str, Any]:
    return {
        "P": output_size,
        "P2": triton.next_power_of_2(output_size),
        "SAMPLING": sampling_ratio,
        "ALIGNED": aligned,
        "MAX": mode == "max",
        "WIDE": _is_wide(features),
        "BLOCK_C": _channel_block(features[0].shape[1], output_size, elements),
        "enable_fp_fusion": True,
    }


def _roi_arguments(rois: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    return rois.to(torch.float32).contiguous(), levels.to(torch.int64).contiguous()


def _level_tables(features: Sequence[Tensor], scales: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Returns sizes and strides, int64 (L, 6) as H, W, image, channel, row, column, and scales, float32 (L,), on the device."""
    sizes = tuple((f.shape[2], f.shape[3], *f.stride()) for f in features)
    return _device_tables(sizes, scales, features[0].device)


@lru_cache(maxsize=256)
def _device_tables(
    sizes: tuple[tuple[int, ...], ...], scales: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns the tables on the device. Cached: canvases repeat, and a copy for each call would cost more than the launch."""
    return torch.tensor(sizes, dtype=torch.int64, device=device), torch.tensor(scales, dtype=torch.float32, device=device)


def _arguments(features: Sequence[Tensor]) -> list[Tensor]:
    """Returns the levels as the kernels' pointer arguments."""
    return [*features, *[features[0]] * (TRITON_LEVELS - len(features))]
