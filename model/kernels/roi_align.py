"""RoIAlign's one dispatch point: Triton on CUDA, an embedding bag on the CPU, the reference for what neither supports."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from model.kernels.roi_align_cpu import roi_align_cpu
from model.kernels.roi_align_reference import roi_align_reference

PoolMode = Literal["avg", "max"]

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: int,
    sampling_ratio: int = 2,
    aligned: bool = False,
    mode: PoolMode = "avg",
) -> Tensor:
    """Pool each RoI to P x P bins by bilinear sampling without any quantisation (Mask R-CNN, section 3, "RoIAlign").

    features: pyramid levels, (B, C, Hl, Wl) each, of one dtype and device; channels_last memory is fastest.
    rois: (R, 5) as image index, x1, y1, x2, y2 in canvas pixels. levels: int64 (R,), each RoI's index into ``features``.
    scales: feature pixels per canvas pixel of each level. output_size: P.
    sampling_ratio: samples along a bin's side, 0 for as many as the bin has feature pixels.
    aligned: shift by half a pixel so that pixel centres lie at .5 (Detectron2); without it RoIs are at least one feature
    pixel large (torchvision's Mask R-CNN). mode: mean or largest of a bin's samples.

    Returns (R, C, P, P) in the features' dtype. RoIs that are not finite give zeros, as do samples farther than a pixel
    outside the map. Differentiable in the features. Raises ValueError for shapes that do not fit together.
    """
    _validate(features, rois, levels, scales, output_size, sampling_ratio, mode)
    implementation = _implementation(features[0])
    return implementation(features, rois, levels, scales, output_size, sampling_ratio, aligned, mode)


def _implementation(feature: Tensor) -> Callable[..., Tensor]:
    if feature.device.type == "cpu" and feature.dtype in _CPU_DTYPES:
        return roi_align_cpu
    _warn_once(feature.device.type, feature.dtype)
    return roi_align_reference


@cache
def _warn_once(device: str, dtype: torch.dtype) -> None:
    warnings.warn(f"no fast RoIAlign for {dtype} on {device}: falling back to the slow reference", stacklevel=4)


def _validate(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: int,
    sampling_ratio: int,
    mode: str,
) -> None:
    if not features or len(features) != len(scales):
        raise ValueError(f"roi_align needs one scale per feature level: {len(features)} levels, {len(scales)} scales")
    first = features[0]
    for feature in features:
        if feature.dim() != 4 or feature.shape[:2] != first.shape[:2]:
            raise ValueError(f"features must be (B, C, H, W) with equal B and C, got {[tuple(f.shape) for f in features]}")
        if feature.dtype != first.dtype or feature.device != first.device:
            raise ValueError("features must share one dtype and one device")
    if rois.dim() != 2 or rois.shape[1] != 5 or levels.shape != rois.shape[:1]:
        raise ValueError(f"rois must be (R, 5) and levels (R,), got {tuple(rois.shape)} and {tuple(levels.shape)}")
    if output_size < 1 or sampling_ratio < 0:
        raise ValueError(f"output_size must be at least 1 and sampling_ratio at least 0, got {output_size}, {sampling_ratio}")
    if mode not in ("avg", "max"):
        raise ValueError(f"unknown pooling mode {mode!r}: avg or max")
