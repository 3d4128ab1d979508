"""Dispatches RoIAlign: Triton on CUDA, an embedding bag on the CPU, and a general implementation for everything else.

The operator is registered with torch (`torch.ops.masklake.roi_align`), so that it works with autograd, torch.compile and
export.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from masklake.model.kernels.layout import BAG_DTYPES, TRITON_DTYPES, TRITON_LEVELS, empty_gradient, empty_pooled, warn_once
from masklake.model.kernels.operators import NAMESPACE, register
from masklake.model.kernels.roi_align_cpu import roi_align_cpu, roi_align_cpu_backward
from masklake.model.kernels.roi_align_reference import roi_align_reference

PoolMode = Literal["avg", "max"]
Path = Literal["triton", "bag", "reference"]


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
    """Pools each RoI to P x P bins by bilinear sampling without any quantisation (Mask R-CNN, section 3, "RoIAlign").

    features: pyramid levels, (B, C, Hl, Wl) each, of one dtype and device; channels_last memory is fastest.
    rois: (R, 5) as image index, x1, y1, x2, y2 in canvas pixels. levels: int64 (R,), each RoI's index into `features`.
    scales: feature pixels per canvas pixel of each level. output_size: P.
    sampling_ratio: samples along each side of a bin; 0 or less (torchvision's -1): as many as the bin has feature pixels.
    aligned: whether to shift by half a pixel, so that pixel centres lie at .5 (Detectron2); without it, RoIs are at least one
    feature pixel large (torchvision's Mask R-CNN). mode: mean or maximum of the samples of a bin.

    Returns (R, C, P, P) in the features' dtype and channels_last memory. Bins are zero for RoIs that are not finite, reach
    farther than FARTHEST, or belong to an image or a level that does not exist; samples farther than a pixel outside the map
    are zero. Differentiable in the features; gradients are reproducible bit by bit on the CPU, and on CUDA under
    `torch.use_deterministic_algorithms`. Autocast does not change dtypes here. Raises ValueError for arguments that do not fit
    together.
    """
    _validate(features, rois, levels, scales, output_size, mode)
    pooled: Tensor = _FORWARD(
        list(features), rois.detach(), levels, [float(s) for s in scales], output_size, sampling_ratio, aligned, mode
    )
    return pooled


def _roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
    mode: str,
) -> Tensor:
    forward = _forward(choose_path(features[0].device.type, features[0].dtype, len(features)))
    pooled = forward(features, rois, levels, scales, output_size, max(sampling_ratio, 0), aligned, mode)
    expected = empty_pooled(features, len(rois), output_size)
    return pooled if pooled.stride() == expected.stride() else expected.copy_(pooled)


def _fake(
    features: Sequence[Tensor], rois: Tensor, levels: Tensor, scales: Sequence[float], output_size: int, *_: Any
) -> Tensor:
    return empty_pooled(features, rois.shape[0], output_size)


def _roi_align_backward(
    grad: Tensor,
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
    mode: str,
) -> list[Tensor]:
    path = choose_path(features[0].device.type, features[0].dtype, len(features))
    path = choose_backward_path(path, torch.are_deterministic_algorithms_enabled())
    return _backward(path)(grad, features, rois, levels, scales, output_size, max(sampling_ratio, 0), aligned, mode)


def _fake_backward(grad: Tensor, features: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [empty_gradient(f, f.dtype) for f in features]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, levels, scales, *options = inputs
    ctx.save_for_backward(rois, levels, *features)
    ctx.scales, ctx.options = scales, options


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rois, levels, *features = ctx.saved_tensors
    grads = _BACKWARD(grad, features, rois, levels, ctx.scales, *ctx.options)
    return (grads, *[None] * 7)


_FORWARD = register(_roi_align, _fake, _keep_for_backward, _differentiate)
_BACKWARD = register(_roi_align_backward, _fake_backward)

_AUTOCAST = torch.library.Library(NAMESPACE, "FRAGMENT")


def _run_without_autocast(operator: Any, device: str) -> None:
    """Registers the operator for autocast, without any conversion of its arguments.

    Coordinates in half precision would be wrong by pixels, and the features' dtype is the caller's choice.
    """

    def run(*arguments: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return operator(*arguments)

    _AUTOCAST.impl(operator, run, f"Autocast{device.upper()}")


for _operator in (_FORWARD, _BACKWARD):
    for _device in ("cpu", "cuda"):
        _run_without_autocast(_operator, _device)


def choose_path(device: str, dtype: torch.dtype, levels: int) -> Path:
    """Returns the implementation for features of this device and dtype; warns once if it is not the fast one."""
    if device == "cpu" and dtype in BAG_DTYPES:
        return "bag"
    if device == "cuda" and dtype in TRITON_DTYPES and levels <= TRITON_LEVELS:
        return "triton"
    path: Path = "bag" if dtype in BAG_DTYPES else "reference"
    warn_once(f"no fast RoIAlign for {dtype} on {device} (levels: {levels}): falling back to the slower {path}")
    return path


def choose_backward_path(path: Path, deterministic: bool) -> Path:
    """Returns the implementation for the gradient, given that of the forward pass: only the bag is deterministic on a GPU."""
    return "bag" if deterministic and path == "triton" else path


def _forward(path: Path) -> Callable[..., Tensor]:
    if path == "triton":
        # Imported where it runs: Triton exists on Linux only.
        from masklake.model.kernels.roi_align_triton import roi_align_triton

        return roi_align_triton
    return roi_align_cpu if path == "bag" else roi_align_reference


def _backward(path: Path) -> Callable[..., list[Tensor]]:
    if path == "triton":
        from masklake.model.kernels.roi_align_triton import roi_align_triton_backward

        return roi_align_triton_backward
    return roi_align_cpu_backward if path == "bag" else _reference_backward


def _reference_backward(grad: Tensor, features: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    """Returns the gradients for dtypes that the bag does not support, computed in float32."""
    grads = roi_align_cpu_backward(grad.float(), [f.float() for f in features], *arguments)
    return [g.to(f.dtype) for g, f in zip(grads, features, strict=True)]


def _validate(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: int,
    mode: str,
) -> None:
    if not features or len(features) != len(scales):
        raise ValueError(f"roi_align needs one scale per feature level: {len(scales)} given for {len(features)}")
    first = features[0]
    for feature in features:
        if feature.dim() != 4 or feature.shape[:2] != first.shape[:2]:
            raise ValueError(f"features must be (B, C, H, W) with equal B and C, got {[tuple(f.shape) for f in features]}")
        if feature.dtype != first.dtype or feature.device != first.device or not feature.is_floating_point():
            raise ValueError(f"features must share one floating dtype and one device, got {feature.dtype} on {feature.device}")
        if feature.shape[2] < 1 or feature.shape[3] < 1:
            raise ValueError(f"a level without pixels cannot be sampled, got {[tuple(f.shape) for f in features]}")
    if rois.device != first.device or levels.device != first.device:
        raise ValueError(f"features, rois and levels must share a device, got {first.device}, {rois.device}, {levels.device}")
    if rois.dim() != 2 or rois.shape[1] != 5 or levels.shape != rois.shape[:1]:
        raise ValueError(f"rois must be (R, 5) and levels (R,), got {tuple(rois.shape)} and {tuple(levels.shape)}")
    if output_size < 1:
        raise ValueError(f"output_size must be at least 1, got {output_size}")
    if mode not in ("avg", "max"):
        raise ValueError(f"unknown pooling mode {mode!r}: avg or max")
