"""Dispatches non-maximum suppression within sorted groups: Triton on CUDA, the reference elsewhere.

Registered with torch as `torch.ops.masklake.survivors`. A CPU does not come here: `model.boxes` calls torchvision's operator
image by image there.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from masklake.model.kernels.layout import triton_or_reference
from masklake.model.kernels.operators import register
from masklake.model.kernels.suppression_reference import survivors_reference

Path = Literal["triton", "reference"]


def survivors(boxes: Tensor, wanted: Tensor, ends: Tensor, iou: float) -> Tensor:
    """Performs greedy non-maximum suppression within each group of a sorted table.

    boxes: float32 (N, 4), xyxy; the boxes of a group follow one another, best score first. wanted: bool (N,), the boxes to
    consider; the others may have any values. ends: int64 (N,), for each box one past the last row of its group. iou: a box is
    suppressed by a better one of its group if their intersection over union, computed in float32, is greater.

    Returns bool (N,): whether a box is wanted and not suppressed, the same as `torchvision.ops.nms` of each group. Boxes
    without an area overlap nothing. Raises ValueError for shapes that do not fit.
    """
    if boxes.dim() != 2 or boxes.shape[1] != 4 or wanted.shape != boxes.shape[:1] or ends.shape != boxes.shape[:1]:
        raise ValueError(
            "boxes must be (N, 4), wanted and ends (N,), "
            f"got {tuple(boxes.shape)}, {tuple(wanted.shape)} and {tuple(ends.shape)}"
        )
    kept: Tensor = _OPERATOR(boxes.detach(), wanted, ends, iou)
    return kept


def _survivors(boxes: Tensor, wanted: Tensor, ends: Tensor, iou: float) -> Tensor:
    if choose_path(boxes.device.type) == "triton":
        # Imported where it runs: Triton exists on Linux only.
        from masklake.model.kernels.suppression_triton import survivors_triton

        return survivors_triton(boxes, wanted, ends, iou)
    return survivors_reference(boxes, wanted, ends, iou)


def _fake(boxes: Tensor, wanted: Tensor, ends: Tensor, iou: float) -> Tensor:
    return torch.empty_like(wanted)


_OPERATOR = register(_survivors, _fake)


def choose_path(device: str) -> Path:
    """Returns the implementation for boxes on this device; warns once if it is the slow one."""
    return triton_or_reference(device, "suppresses boxes")
