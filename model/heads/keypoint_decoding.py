"""Decodes keypoints from heat maps (Mask R-CNN, section 3, "Mask R-CNN for Human Pose Estimation").

A keypoint is at the maximum of its heat map after bicubic resizing to the person's box. The maps are never resized: between
four neighbouring values the interpolation is one cubic patch, a patch stays below its Bezier control points, and only the few
patches that could contain the maximum are evaluated at the box's pixels.

Shape letters: N people, n of them, K keypoints, S heat map side, M = n * K maps, c patches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from masklake.model.config import KeypointScore
from masklake.model.devices import to_host

CUBIC = -0.75  # torch's bicubic coefficient
MAX_SIDE = 1 << 14  # positions sampled along a box's side; only larger boxes are sampled more coarsely than every pixel
MAPS_PER_CHUNK = 512  # limits the memory for control points to some 200 MB if every patch is a candidate
SMALL_SIDE = 64  # maximum side of a box, in pixels, for which resizing is cheaper than searching
VALUES_PER_CHUNK = 1 << 20  # number of pixels evaluated at once
NOISY = 1 / 32  # share of a map's values that may belong to the maximum: fewer in maps with peaks, more in noise
NOISY_SIDE = 112  # maximum side of a box, in pixels, for which resizing noise is cheaper than searching it
FLAT_PATCHES = 512  # candidates per map that only constant or saturated maps exceed; these are resized person by person,
FLAT_PIXELS = 1 << 20  # in boxes of at most this many pixels
MAPS_IN_CACHE = 32  # number of maps whose patches are bounded at once

_OVERSHOOT = -CUBIC / 4  # the two outer neighbours' weights are negative and sum to this at most
_TANGENT = np.float32(-CUBIC / 3)  # distance of the inner Bezier control points, in differences of neighbours

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]


@np.errstate(invalid="ignore", over="ignore")  # of maps and boxes that are not finite
def decode_heatmaps(logits: Tensor, boxes: Tensor, score: KeypointScore = "logit") -> Tensor:
    """Returns the best position of every keypoint after resizing its heat map to its box (bicubic, torchvision's convention).

    logits: float32 (N, K, S, S). boxes: float32 (N, 4), xyxy in pixels. Returns float32 (N, K, 3) on the host: x and y in
    pixels of the boxes, and the resized map's logit there, or the probability of that pixel normalised over the S x S pixels of
    the map before resizing, so that large and small people are comparable (Detectron2). Sides below one pixel, or not finite,
    count as one.
    """
    people, keypoints, _, _ = logits.shape
    maps, corners = (tensor.numpy() for tensor in to_host(logits.detach().float(), boxes.detach().float()))
    sizes = corners[:, 2:] - corners[:, :2]
    sizes = np.maximum(np.where(np.isfinite(sizes), sizes, np.float32(1)), np.float32(1))
    pixels = np.minimum(np.ceil(sizes), MAX_SIDE).astype(np.int64)
    at, scores = np.zeros((people, keypoints, 2), np.int64), np.zeros((people, keypoints), np.float32)
    longest = pixels.max(1, initial=0)
    small, large = longest <= SMALL_SIDE, longest > NOISY_SIDE
    for group, argmax in ((small, _argmax_resized), (~small & ~large, _argmax), (large, _argmax)):
        chosen = np.flatnonzero(group)
        for part in np.split(chosen, range(0, len(chosen), max(1, MAPS_PER_CHUNK // max(1, keypoints))))[1:]:
            at[part], scores[part] = argmax(maps[part], pixels[part])
    if score == "probability":
        scores = np.exp(scores - torch.from_numpy(maps).flatten(2).logsumexp(2).numpy())
    offsets = (at + np.float32(0.5)) * (sizes / pixels.astype(np.float32))[:, None]
    points = offsets.astype(np.float32) + corners[:, None, :2]
    return torch.from_numpy(np.concatenate((points, scores[:, :, None]), axis=2))


def _argmax(people_maps: Floats, people_pixels: Longs) -> tuple[Longs, Floats]:
    """Returns the best pixel (n, K, 2) as column, row and its value (n, K) of maps (n, K, S, S) resized to (n, 2) columns,
    rows.
    """
    people, keypoints, side, _ = people_maps.shape
    maps, pixels = people_maps.reshape(-1, side, side), np.repeat(people_pixels, keypoints, axis=0)
    flat = maps.reshape(len(maps), -1)
    peak = flat.argmax(1)
    lowest, highest = torch.from_numpy(flat).amin(1).numpy(), flat[np.arange(len(flat)), peak]
    at, reached = _pixel_at_peak(maps, peak, pixels)
    # A margin that rounding cannot cross.
    wanted = reached - 1e-5 * (highest - lowest) - 2e-6 * np.maximum(np.abs(highest), np.abs(lowest))
    high = np.flatnonzero(maps >= _least_neighbour(wanted, lowest, highest)[:, None, None])
    if len(high) <= NOISY * maps.size:
        owner, cell = _patches_beside(high, maps)
    elif pixels.max() <= NOISY_SIDE:
        return _argmax_resized(people_maps, people_pixels)
    else:
        owner, cell = _patches_that_reach(wanted, maps)
    if len(owner) > FLAT_PATCHES * len(maps) and people_pixels.prod(1).max() <= FLAT_PIXELS:
        resized = [_argmax_resized(people_maps[i : i + 1], people_pixels[i : i + 1]) for i in range(people)]
        return np.concatenate([at for at, _ in resized]), np.concatenate([value for _, value in resized])
    patches = _patches(maps, owner, cell)
    hopeful = np.flatnonzero(_bounds(patches) >= wanted[owner])
    owner, cell, patches = owner[hopeful], cell[hopeful], patches[:, :, hopeful]
    first, last = _pixels_of(cell, pixels[owner], side)
    holds = np.flatnonzero((last > first).all(1))
    holds = holds[np.argsort((last - first)[holds].prod(1), kind="stable")]
    best = _Best(at, reached, wanted, pixels)
    for some in _split(holds, (last - first).prod(1)):
        values = _evaluate(patches[:, :, some], cell[some], first[some], last[some], pixels[owner[some]], side)
        best.offer(owner[some], first[some], last[some], values)
    return best.at.reshape(people, keypoints, 2), best.value.reshape(people, keypoints)


def _argmax_resized(maps: Floats, pixels: Longs) -> tuple[Longs, Floats]:
    """Same as `_argmax`, by resizing the maps to the few pixels of small boxes: two matrix products per person."""
    people, keypoints, side, _ = maps.shape
    columns, rows = pixels.max(0).tolist()
    along_x, along_y = (_resizing_matrix(pixels[:, axis], n, side) for axis, n in ((0, columns), (1, rows)))
    by_row = torch.from_numpy(maps).transpose(1, 2).reshape(people, side, keypoints * side)
    by_row = torch.bmm(along_y, by_row).view(people, rows * keypoints, side)
    resized = torch.bmm(by_row, along_x.transpose(1, 2)).numpy().reshape(people, rows, keypoints, columns)
    resized[np.broadcast_to((np.arange(columns) >= pixels[:, :1])[:, None, None], resized.shape)] = -np.inf
    best_columns = resized.argmax(3)
    values = np.take_along_axis(resized, best_columns[..., None], 3)[..., 0]
    values[np.broadcast_to((np.arange(rows) >= pixels[:, 1:])[:, :, None], values.shape)] = -np.inf
    row = values.argmax(1, keepdims=True)
    column = np.take_along_axis(best_columns, row, 1)
    return np.stack((column, row), axis=-1)[:, 0], np.take_along_axis(values, row, 1)[:, 0]


def _resizing_matrix(pixels: Longs, rows: int, side: int) -> Tensor:
    """Returns matrices (n, rows, S) that resize S values to `pixels` (n,); rows beyond them are meaningless."""
    source = _source(np.arange(rows), pixels[:, None], side)
    cell = np.floor(source).astype(np.int64)
    near = np.clip(cell[:, :, None] + np.arange(-1, 3), 0, side - 1)
    weights = _weights(source - cell.astype(np.float32))
    return torch.zeros(len(pixels), rows, side).scatter_add_(2, torch.from_numpy(near), torch.from_numpy(weights))


class _Best:
    """The best pixel of every map so far; among equal values the first in row order wins, as in an argmax.

    `wanted` (M,): smaller values cannot be the best.
    """

    def __init__(self, at: Longs, value: Floats, wanted: Floats, pixels: Longs) -> None:
        self.at, self.value, self.wanted, self.columns = at, value, wanted, pixels[:, 0]
        self.number = np.full(len(at), np.iinfo(np.int64).max)

    def offer(self, owner: Longs, first: Longs, last: Longs, values: Floats) -> None:
        """Considers the best of patches: values (c, rows, columns) at the pixels from `first` up to, not including, `last` (c,
        2).
        """
        flat = values.reshape(len(values), -1)
        place = flat.argmax(1)
        value = flat[np.arange(len(flat)), place]
        rivals = np.flatnonzero(value >= self.wanted[owner])
        owner, place, value = owner[rivals], place[rivals], value[rivals]
        row, column = np.divmod(place, values.shape[2])
        column, row = (np.stack((column, row)) + first[rivals].T).clip(max=last[rivals].T - 1)
        number = row * self.columns[owner] + column
        order = np.lexsort((number, -value, owner))
        chosen = order[np.flatnonzero(np.diff(owner[order], prepend=-1))]
        owner, column, row, value, number = (v[chosen] for v in (owner, column, row, value, number))
        unset = self.number[owner] == np.iinfo(np.int64).max
        better = unset | (value > self.value[owner]) | ((value == self.value[owner]) & (number < self.number[owner]))
        owner = owner[better]
        self.at[owner] = np.stack((column, row), axis=1)[better]
        self.value[owner], self.number[owner] = value[better], number[better]


def _pixel_at_peak(maps: Floats, peak: Longs, pixels: Longs) -> tuple[Longs, Floats]:
    """Returns the pixel nearest to each map's largest value, at `peak` (M,): (M, 2) as column, row; and the resized value
    (M,).
    """
    side = maps.shape[-1]
    row, column = np.divmod(peak, side)
    nearest = np.rint((np.stack((column, row), axis=1) + 0.5) * pixels / side - 0.5).astype(np.int64)
    pixel = np.clip(nearest, 0, pixels - 1)
    source = _source(pixel, pixels, side)
    cell = np.floor(source).astype(np.int64)
    weights = _weights(source - cell)
    values = np.einsum("rcm,mr,mc->m", _patches(maps, np.arange(len(maps)), cell), weights[:, 1], weights[:, 0])
    return pixel, values


def _least_neighbour(wanted: Floats, lowest: Floats, highest: Floats) -> Floats:
    """Returns the minimum (M,) for the largest of a patch's four inner values so that the patch can reach `wanted` (M,).

    Along an axis the inner two weights sum to at most 1 + o, for the overshoot o, and the outer two to -o. So of both axes'
    products, those of the four inner values sum to (1 + o)^2, those of the four corners to o^2, and the others, which are
    negative, to -2 o (1 + o). With the map's extremes for all but the inner values, this is solved for their largest.
    """
    o = _OVERSHOOT
    return (wanted + 2 * o * (1 + o) * lowest - o * o * highest) / (1 + o) ** 2


def _patches_beside(values: Longs, maps: Floats) -> tuple[Longs, Longs]:
    """Returns patches that contain one of these flat positions: their map (c,), and cell (c, 2) as column, row in -1..S-1."""
    side = maps.shape[-1]
    owner, place = np.divmod(values, side * side)
    row, column = np.divmod(place, side)
    cells = side + 1
    number = (owner * cells + row) * cells + column
    marked = np.zeros(len(maps) * cells * cells, dtype=bool)
    for offset in (0, 1, cells, cells + 1):
        marked[number + offset] = True
    return _cells_of(marked, cells)


def _patches_that_reach(wanted: Floats, maps: Floats) -> tuple[Longs, Longs]:
    """Returns patches that may reach `wanted` (M,), as in `_patches_beside`: all are bounded, along the rows and then across
    them.
    """
    marked = []
    for start in range(0, len(maps), MAPS_IN_CACHE):
        some = torch.from_numpy(maps[start : start + MAPS_IN_CACHE])
        least = torch.from_numpy(wanted[start : start + MAPS_IN_CACHE])
        padded = F.pad(some[None], (2, 2, 2, 2), mode="replicate")[0]
        slope = (padded[:, :, 2:] - padded[:, :, :-2]).mul_(float(_TANGENT))
        middle, rise, fall = padded[:, :, 1:-1], slope.clamp(min=0), slope.clamp(max=0)
        above = torch.maximum((middle + rise)[:, :, :-1], (middle - fall)[:, :, 1:])
        below = torch.minimum((middle + fall)[:, :, :-1], (middle - rise)[:, :, 1:])
        down = (above[:, 2:] - below[:, :-2]).mul_(float(_TANGENT)).clamp_(min=0).add_(above[:, 1:-1])
        up = (above[:, :-2] - below[:, 2:]).mul_(float(_TANGENT)).clamp_(min=0).add_(above[:, 1:-1])
        marked.append((torch.maximum(down[:, :-1], up[:, 1:]) >= least[:, None, None]).flatten())
    return _cells_of(torch.cat(marked).numpy(), maps.shape[-1] + 1)


def _cells_of(marked: NDArray[np.bool_], cells: int) -> tuple[Longs, Longs]:
    """Returns the map (c,) and cell (c, 2) of marked patches (M * cells**2,)."""
    owner, place = np.divmod(np.flatnonzero(marked), cells * cells)
    row, column = np.divmod(place, cells)
    return owner, np.stack((column, row), axis=1) - 1


def _patches(maps: Floats, owner: Longs, cell: Longs) -> Floats:
    """Returns the values (4, 4, c) around each cell, rows first, with the border of the map repeated outside."""
    side = maps.shape[-1]
    columns, rows = (np.clip(cell[:, axis] + np.arange(-1, 3)[:, None], 0, side - 1) for axis in (0, 1))
    return maps.ravel()[((owner * side + rows) * side)[:, None] + columns]


def _bounds(patches: Floats) -> Floats:
    """Returns the largest Bezier control point (c,) of each patch (4, 4, c), an upper bound of the patch."""
    control = [_control_points(row) for row in patches]
    return np.max([np.max(_control_points(column), axis=0) for column in zip(*control, strict=True)], axis=0)


def _control_points(neighbours: Any) -> tuple[Floats, Floats, Floats, Floats]:
    """Returns the cubic between p1 and p2 in Bezier form, from its four neighbours p0, p1, p2, p3."""
    p0, p1, p2, p3 = neighbours
    return p1, p1 + _TANGENT * (p2 - p0), p2 - _TANGENT * (p3 - p1), p2


def _pixels_of(cell: Longs, pixels: Longs, side: int) -> tuple[Longs, Longs]:
    """Returns the first pixel and the one after the last (c, 2) whose centres lie in each cell (c, 2)."""
    first, last = (np.ceil((cell + offset) * (pixels / side) - 0.5).astype(np.int64) for offset in (0.5, 1.5))
    return np.clip(first, 0, pixels), np.clip(last, 0, pixels)


def _split(order: Longs, areas: Longs) -> list[Longs]:
    """Returns `order` (patches sorted by their number of pixels) in parts, each with at most VALUES_PER_CHUNK pixels if all of
    its patches were as large as its largest.
    """
    parts, start = [], 0
    while start < len(order):
        sizes = areas[order[start:]] * np.arange(1, len(order) - start + 1)
        length = max(1, int(np.searchsorted(sizes, VALUES_PER_CHUNK)))
        parts.append(order[start : start + length])
        start += length
    return parts


def _evaluate(patches: Floats, cell: Longs, first: Longs, last: Longs, pixels: Longs, side: int) -> Floats:
    """Returns the values of patches at their pixels, (c, rows, columns); patches with fewer pixels repeat their last one."""
    columns, rows = (last - first).max(0).tolist()
    weights: list[Any] = []
    for axis, count in ((0, columns), (1, rows)):
        pixel = np.minimum(first[:, axis, None] + np.arange(count), last[:, axis, None] - 1)
        t = _source(pixel, pixels[:, axis, None], side) - cell[:, axis, None].astype(np.float32)
        weights.append(_weights(np.clip(t, 0, 1)))
    along_x = np.matmul(patches.transpose(2, 0, 1), weights[0].transpose(0, 2, 1))
    return np.matmul(weights[1], along_x)


def _source(pixel: Longs, pixels: Longs, side: int) -> Floats:
    """Returns where a pixel's centre lies in the heat map, in float32 as in torch."""
    scale = np.float32(side) / pixels.astype(np.float32)
    return scale * (pixel.astype(np.float32) + np.float32(0.5)) - np.float32(0.5)


def _weights(t: Floats) -> Floats:
    """Returns weights (..., 4) of the neighbours p0..p3 at `t` in 0..1 between p1 and p2."""
    u = 1 - t
    near = [((CUBIC + 2) * s - (CUBIC + 3)) * s * s + 1 for s in (t, u)]
    return np.stack((CUBIC * t * u * u, near[0], near[1], CUBIC * u * t * t), axis=-1).astype(np.float32)
