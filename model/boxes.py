"""Operations on boxes: xyxy in pixels, x2 and y2 exclusive, in float32 at any precision of the network.

bfloat16 has 8 bits of mantissa: near 1,000 pixels its steps are 4 pixels wide. So deltas are converted to float32, and boxes
are never converted to fewer bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from masklake.model.devices import constant
from masklake.model.kernels.suppression import survivors
from masklake.model.torchvision_ops import batched_nms, box_iou

__all__ = [
    "BoxCoder",
    "box_iou",
    "clip_boxes",
    "decode_boxes",
    "encode_boxes",
    "has_area",
    "suppress",
    "top_per_image",
    "wide_enough",
]

Weights = tuple[float, float, float, float]


class BoxCoder(NamedTuple):
    """Encodes boxes as deltas from anchors or regions. weights: factors of dx, dy, dw, dh; clamp: maximum dw, dh before exp."""

    weights: Weights
    clamp: float

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Returns `encode_boxes` with these weights."""
        return encode_boxes(boxes, anchors, self.weights)

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Returns `decode_boxes` with these weights and this clamp."""
        return decode_boxes(deltas, anchors, self.weights, self.clamp)


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: Weights) -> Tensor:
    """Returns the deltas (..., 4) that turn `anchors` into `boxes` (Girshick et al. 2014, appendix C), times `weights`.

    All sides must be greater than zero.
    """
    size = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + 0.5 * size
    box_size = boxes[..., 2:] - boxes[..., :2]
    box_centre = boxes[..., :2] + 0.5 * box_size
    deltas = torch.cat([(box_centre - centre) / size, (box_size / size).log()], dim=-1)
    return deltas * constant(weights, deltas.device).to(deltas.dtype)


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: Weights, clamp: float) -> Tensor:
    """Inverse of `encode_boxes`: returns float32 (..., 4). dw and dh are limited to `clamp`, so that exp cannot overflow."""
    deltas = deltas.float() / constant(weights, deltas.device)
    size = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + 0.5 * size
    box_centre = deltas[..., :2] * size + centre
    half = 0.5 * (deltas[..., 2:].clamp(max=clamp).exp() * size)
    return torch.cat([box_centre - half, box_centre + half], dim=-1)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Returns boxes (..., 4) clipped to images of `sizes`, float32 (..., 2) as height, width."""
    limit = torch.stack([sizes[..., 1], sizes[..., 0], sizes[..., 1], sizes[..., 0]], dim=-1)
    return torch.minimum(boxes.clamp(min=0), limit)


def wide_enough(boxes: Tensor, side: float) -> Tensor:
    """Returns bool (...): whether both sides of boxes (..., 4) are at least `side` pixels. False for non-finite corners."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= side).all(dim=-1) & boxes.isfinite().all(dim=-1)


def has_area(boxes: Tensor) -> Tensor:
    """Returns bool (...): whether both sides of boxes (..., 4) are longer than 0."""
    return (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)


def suppress(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    images: Tensor,
    iou: float,
    wanted: Tensor | None = None,
    most: int | None = None,
) -> Tensor:
    """Performs non-maximum suppression within each group (class or level) of each image.

    boxes: float32 (N, 4); scores: float32 (N,); groups, images: int64 (N,), images sorted ascending. iou: a box is suppressed
    by a better one of its group if they overlap more. wanted: bool (N,), the boxes to consider; the others may have any values.
    most: maximum number of boxes to keep per image. Returns int64 indices of the kept boxes, image by image, best score first
    within each.
    """
    wanted = torch.ones_like(images, dtype=torch.bool) if wanted is None else wanted
    most = len(boxes) if most is None else most
    if boxes.is_cuda:
        return _suppress_by_group(boxes, scores, groups, images, iou, wanted, most)
    rows = torch.where(wanted)[0]
    keep = rows[_suppress_image_by_image(boxes[rows], scores[rows], groups[rows], images[rows], iou)]
    return keep[top_per_image(images[keep], most)]


def _suppress_image_by_image(boxes: Tensor, scores: Tensor, groups: Tensor, images: Tensor, iou: float) -> Tensor:
    """Calls the CPU operator once per image, because it visits every pair of boxes: 4 images in one call would cost 16 times
    one image.

    batched_nms separates few boxes by an offset that costs them 0.01 pixels, and many exactly; image by image it keeps the same
    boxes as torchvision.
    """
    counts = torch.bincount(images).tolist() if len(images) else []
    kept, start = [torch.empty(0, dtype=torch.int64)], 0
    for count in counts:
        part = slice(start, start + count)
        kept.append(batched_nms(boxes[part], scores[part], groups[part], iou) + start)
        start += count
    return torch.cat(kept)


def _suppress_by_group(
    boxes: Tensor, scores: Tensor, groups: Tensor, images: Tensor, iou: float, wanted: Tensor, most: int
) -> Tensor:
    """Suppresses all groups of all images in one launch (`model.kernels.suppression`). The host waits once, for the number of
    kept boxes.

    Unwanted boxes stay in the table, where they suppress nothing: to remove them, the host would have to wait for their number,
    too.
    """
    if not len(boxes):
        return images
    by_score = scores.argsort(descending=True, stable=True)
    keys = images * (groups.max() + 1) + groups
    order = by_score[keys[by_score].argsort(stable=True)]  # the groups one after another, best first within each
    keys = keys[order]
    kept = torch.empty_like(wanted)
    kept[order] = survivors(boxes[order], wanted[order], torch.searchsorted(keys, keys, right=True), iou)
    order = by_score[images[by_score].argsort(stable=True)]  # the images one after another, best first within each
    kept = kept[order]
    so_far = kept.cumsum(dim=0)
    before = (so_far - kept.long())[torch.searchsorted(images, images)]
    return order[kept & (so_far - before <= most)]


def top_per_image(images: Tensor, count: int) -> Tensor:
    """Returns bool (N,): whether an entry is among the first `count` of its image. images: int64 (N,), sorted ascending."""
    place = torch.arange(len(images), device=images.device)
    return place - torch.searchsorted(images, images) < count
