"""Finds where pasted masks change: one operator for the masks of a whole batch, Triton on CUDA and the reference elsewhere.

Run-length encodings follow from these changes, so no mask has to leave the device. Registered with torch as
`torch.ops.masklake.mask_edges`. On a CPU, `model.masks.rle` computes the same edges with less work.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from masklake.model.kernels.layout import triton_or_reference
from masklake.model.kernels.mask_rle_reference import mask_edges_reference
from masklake.model.kernels.operators import register

Path = Literal["triton", "reference"]


def mask_edges(masks: Tensor, boxes: Tensor, sizes: Tensor, threshold: float, widest: int, room: int) -> tuple[Tensor, Tensor]:
    """Returns the pixels at which masks, pasted into their images and thresholded, change between 0 and 1.

    masks: floating point (N, m, m); resized in float32. boxes: (N, 4), xyxy in pixels of the images. sizes: int64 (N, 2),
    height and width of each mask's image, on the masks' device. A pixel is set if the mask, padded by a cell of zeros and
    resized bilinearly to its box (enlarged likewise and truncated to whole pixels: torchvision's convention), is greater than
    `threshold`. widest: the largest width in `sizes`. room: maximum number of edges to return.

    Returns counts, int64 (N,), the number of edges of each mask, and edges, int64 (room,): their positions in column-major
    order (x * height + y), ascending within a mask, mask after mask, then zeros. If the counts sum to more than `room`, the
    remaining edges are missing. A run that reaches the last pixel of the image has no edge at its end. Masks whose box is not
    finite or lies outside the image have no edges. Raises ValueError for shapes that do not fit.
    """
    if masks.dim() != 3 or masks.shape[1] != masks.shape[2] or boxes.shape != (len(masks), 4) or sizes.shape != (len(masks), 2):
        raise ValueError(
            f"masks must be (N, m, m), boxes (N, 4) and sizes (N, 2), "
            f"got {tuple(masks.shape)}, {tuple(boxes.shape)} and {tuple(sizes.shape)}"
        )
    if masks.shape[1] < 1 or widest < 1 or room < 0:
        raise ValueError(f"masks and images need a pixel and room cannot be negative, got {masks.shape[1]}, {widest}, {room}")
    counts, edges = _OPERATOR(masks.detach(), boxes.detach(), sizes, threshold, widest, room)
    return counts, edges


def _mask_edges(masks: Tensor, boxes: Tensor, sizes: Tensor, threshold: float, widest: int, room: int) -> tuple[Tensor, Tensor]:
    if choose_path(masks.device.type) == "triton":
        # Imported where it runs: Triton exists on Linux only.
        from masklake.model.kernels.mask_rle_triton import mask_edges_triton

        return mask_edges_triton(masks, boxes, sizes, threshold, widest, room)
    return mask_edges_reference(masks, boxes, sizes, threshold, widest, room)


def _fake(masks: Tensor, boxes: Tensor, sizes: Tensor, threshold: float, widest: int, room: int) -> tuple[Tensor, Tensor]:
    return masks.new_empty((masks.shape[0],), dtype=torch.int64), masks.new_empty((room,), dtype=torch.int64)


_OPERATOR = register(_mask_edges, _fake)


def choose_path(device: str) -> Path:
    """Returns the implementation for masks on this device; warns once if it is the slow one."""
    return triton_or_reference(device, "finds the edges of masks")
