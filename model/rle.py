"""COCO run-length encodings straight from m x m mask probabilities and boxes, without full-image masks.

A run-length encoding (RLE) lists the lengths of alternating runs of 0 and 1 in column-major order, starting with 0; COCO
packs the list into a string of 5-bit groups. Mask R-CNN predicts an m x m mask per box (section 3, "Mask
Representation") that is resized to the box and cut at a threshold; only that region can hold ones.

Shape letters: N masks, m mask side, H x W the image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

PADDING = 1  # zero cells around the mask before it is resized, torchvision's convention


def encode_boxed_masks(
    probs: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5, convention: str = "torchvision"
) -> tuple[list[bytes], NDArray[np.int64]]:
    """Encode masks as they would look pasted into the image, at a cost that follows the boxes' area.

    probs: float32 (N, m, m) in 0..1. boxes: float32 (N, 4), xyxy in the image's pixels. size: (H, W). A pixel is set where
    the resized mask is greater than ``threshold``. convention: "torchvision" pads the mask by one cell, grows the box
    alike, truncates it to whole pixels and resizes bilinearly.

    Returns COCO compressed counts, byte-identical to `pycocotools.mask.encode` of the pasted masks, and each mask's pixels.
    Masks whose box lies outside the image are empty. Raises ValueError for an unknown convention or shapes that do not fit.
    """
    _validate(probs, boxes, size, convention)
    height, width = size
    corners = _pixel_boxes(boxes.detach().float().cpu(), probs.shape[-1]).numpy()
    masks = F.pad(probs.detach().float().cpu(), (PADDING,) * 4)
    edges = [_edges_of_one(mask, box, height, width, threshold) for mask, box in zip(masks, corners, strict=True)]
    runs = [_runs(e, height * width) for e in edges]
    lengths = np.array([len(r) for r in runs], dtype=np.int64)
    areas = np.array([r[1::2].sum() for r in runs], dtype=np.int64)
    return pack_counts(np.concatenate(runs) if runs else np.zeros(0, np.int64), lengths), areas


def encode(bitmap: NDArray[np.uint8]) -> bytes:
    """Compressed counts of one mask: (H, W) of zeros and ones (anything non-zero is set)."""
    flat = (np.asarray(bitmap) != 0).ravel(order="F")
    runs = _runs(np.flatnonzero(np.diff(flat, prepend=False)), flat.size)
    return pack_counts(runs, np.array([len(runs)]))[0]


def decode(counts: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The mask of compressed counts: uint8 (H, W) of 0 and 1. Raises ValueError if they do not fill ``size``."""
    runs = unpack_counts(counts)
    if runs.sum() != size[0] * size[1] or (runs < 0).any():
        raise ValueError(f"run lengths sum to {runs.sum()}, not to the {size[0]} x {size[1]} pixels of the image")
    return np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8).reshape(size, order="F")


def pack_counts(runs: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[bytes]:
    """COCO strings of several masks at once.

    runs: run lengths of all masks, one after another. lengths: how many belong to each mask. From a mask's fourth run on,
    the difference to the run before the last is written, in groups of five bits, lowest first; a group's sixth bit says
    that more follow, its fifth is the sign of the last one. 48 is added to make it printable.
    """
    ends = np.cumsum(lengths)
    within = np.arange(len(runs)) - np.repeat(ends - lengths, lengths)
    values = runs.astype(np.int64, copy=True)
    later = np.flatnonzero(within > 2)
    values[later] -= runs[later - 2]
    groups = _group_counts(values)
    group_ends = np.cumsum(groups)
    packed = np.empty(int(groups.sum()), dtype=np.uint8)
    for number in range(int(groups.max(initial=0))):
        rest = np.flatnonzero(groups > number)
        more = (groups[rest] > number + 1).astype(np.int64)
        packed[group_ends[rest] - groups[rest] + number] = ((values[rest] >> (5 * number)) & 31 | (more << 5)) + 48
    text = packed.tobytes()
    bounds = np.concatenate(([0], group_ends))[np.concatenate(([0], ends))].tolist()
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


def unpack_counts(counts: bytes) -> NDArray[np.int64]:
    """Run lengths of one COCO string. Raises ValueError where it is cut short or holds other characters."""
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    if ((codes < 0) | (codes > 63)).any() or (len(codes) and codes[-1] & 32):
        raise ValueError("not a COCO run-length string: it holds foreign characters or ends within a number")
    last = np.flatnonzero((codes & 32) == 0)
    first = np.concatenate(([0], last[:-1] + 1)) if len(last) else last
    place = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    parts = (codes & 31) << (5 * place)
    values = np.add.reduceat(parts, first) if len(first) else parts
    negative = (codes[last] & 16) != 0
    values = np.where(negative, values - (np.int64(1) << (5 * (last - first + 1))), values)
    # Differences to the run before the last, from the fourth on: two interleaved running sums.
    for parity in (1, 2):
        values[parity::2] = np.cumsum(values[parity::2])
    return values


def _validate(probs: Tensor, boxes: Tensor, size: Sequence[int], convention: str) -> None:
    if convention != "torchvision":
        raise ValueError(f"unknown mask convention {convention!r}: only 'torchvision' is known")
    if probs.dim() != 3 or probs.shape[1] != probs.shape[2] or boxes.shape != (probs.shape[0], 4):
        raise ValueError(f"probs must be (N, m, m) and boxes (N, 4), got {tuple(probs.shape)} and {tuple(boxes.shape)}")
    if min(size) < 1:
        raise ValueError(f"an image of {size[0]} x {size[1]} pixels holds no mask")


def _pixel_boxes(boxes: Tensor, side: int) -> Tensor:
    """Whole-pixel boxes (N, 4) int64, both corners inclusive, grown by the mask's padding and truncated towards zero."""
    scale = float(side + 2 * PADDING) / side
    half_w = (boxes[:, 2] - boxes[:, 0]) * 0.5 * scale
    half_h = (boxes[:, 3] - boxes[:, 1]) * 0.5 * scale
    centre_x = (boxes[:, 2] + boxes[:, 0]) * 0.5
    centre_y = (boxes[:, 3] + boxes[:, 1]) * 0.5
    grown = torch.stack((centre_x - half_w, centre_y - half_h, centre_x + half_w, centre_y + half_h), dim=1)
    return grown.to(torch.int64)


def _edges_of_one(mask: Tensor, box: NDArray[np.int64], height: int, width: int, threshold: float) -> NDArray[np.int64]:
    """Column-major positions in the image where a resized mask (m+2, m+2) switches between 0 and 1."""
    x0, y0, x1, y1 = box.tolist()
    left, right, top, bottom = max(x0, 0), min(x1 + 1, width), max(y0, 0), min(y1 + 1, height)
    if left >= right or top >= bottom:
        return np.zeros(0, np.int64)
    size = (max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1))
    resized = F.interpolate(mask[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    region = (resized[top - y0 : bottom - y0, left - x0 : right - x0] > threshold).numpy()
    columns = np.zeros((right - left, bottom - top + 2), dtype=bool)  # a zero above and below each column
    columns[:, 1:-1] = region.T
    x, y = np.nonzero(columns[:, 1:] != columns[:, :-1])
    edges = (x + left) * height + y + top
    return _cancel_pairs(edges)


def _cancel_pairs(edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sorted edges without those that meet: a run that ends where the next one starts is one run."""
    twice = np.flatnonzero(edges[1:] == edges[:-1])
    keep = np.ones(len(edges), dtype=bool)
    keep[twice] = keep[twice + 1] = False
    return edges[keep]


def _runs(edges: NDArray[np.int64], pixels: int) -> NDArray[np.int64]:
    """Run lengths of a mask from its edges; a run that reaches the last pixel needs no run of zeros after it."""
    if len(edges) and edges[-1] == pixels:
        edges = edges[:-1]
    return np.diff(edges, prepend=0, append=pixels)


def _group_counts(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many groups of five bits each signed value needs."""
    magnitude = np.where(values < 0, ~values, values)
    groups = np.ones(len(values), dtype=np.int64)
    bits = 4
    while (magnitude >> bits).any():
        groups += (magnitude >> bits) > 0
        bits += 5
    return groups
