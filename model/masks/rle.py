"""COCO run-length encodings of m x m mask probabilities in boxes, without full-image masks.

A run-length encoding (RLE) lists the lengths of alternating runs of 0 and 1 in column-major order, starting with 0; COCO packs
the list into a string of 5-bit groups. Mask R-CNN predicts an m x m mask per box (section 3, "Mask Representation"), which is
resized to the box and thresholded; only that region can contain ones.

The resized mask is not computed either. Along an image column it is linear between two rows of the small mask, so it crosses
the threshold at most once between them, at a position given by a division: the cost is proportional to the box's width times m,
not to its area. Columns in which rounding could decide a pixel are resized after all, so that the bytes equal those of torch.

Both conventions of pasting have the same geometry, a mask with a border of zero cells in a box that is enlarged by that border:
torchvision truncates this box to whole pixels, Detectron2 does not.

On a GPU pixels are so cheap that they are computed, but never stored (`model.kernels.mask_rle`); only the edges are copied to
the host.

Shape letters: N masks, m mask side, M = m + 2 with its border, H x W pixels of the image, E edges (positions in column-major
order at which a mask changes between 0 and 1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from masklake.model.config import PasteKind
from masklake.model.devices import sent, to_host
from masklake.model.kernels.mask_rle import mask_edges

PADDING = 1  # zero cells around the mask before it is resized (torchvision); in Detectron2, zeros outside the mask
MAX_COLUMNS = 1 << 15  # image columns processed at once: limits the memory for many large boxes, also of noise
MAX_RESIZED_SIDE = 1 << 17  # pixels; undecided columns of boxes with a longer side are not resized
TORCH_SMALL = 128  # maximum of height plus width of an output for which torch uses other code
FAR = 1e9  # pixels; coordinates are clamped to it so that integer arithmetic cannot overflow
EDGES_PER_COLUMN = 1  # room on a GPU, per mask and image column: two edges in each column of boxes half as wide as the image

Longs = NDArray[np.int64]
Doubles = NDArray[np.float64]


def encode_boxed_masks(
    probs: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5, convention: PasteKind = "torchvision"
) -> tuple[list[bytes], Longs]:
    """Returns the RLEs and areas of masks as if they were pasted into the image, at a cost proportional to the boxes' widths.

    probs: float32 (N, m, m) in 0..1. boxes: float32 (N, 4), xyxy in pixels of the image. size: (H, W). convention:
    "torchvision" pads the mask by one cell, enlarges the box likewise, truncates it to whole pixels, resizes bilinearly, and
    sets a pixel if its value is greater than `threshold`; "detectron2" samples the mask bilinearly at the centres of pixels
    (`grid_sample`, zeros outside), and sets a pixel if its value is at least `threshold`.

    Returns COCO compressed counts, byte-identical to `pycocotools.mask.encode` of the pasted masks, and int64 (N,), the number
    of pixels of each mask. Masks whose box lies outside the image or is not finite (with "detectron2", also without an area)
    are empty. Raises ValueError for an unknown convention or shapes that do not fit.
    """
    _validate(probs, boxes, size, convention)
    if on_device(probs, convention):
        return encode_on_device(probs, boxes, boxes.new_zeros(len(boxes), dtype=torch.int64), [size], threshold, boxes)[:2]
    paste = _PASTES[convention]
    regions = paste.regions(boxes.detach().float().cpu(), probs.shape[-1], size)
    masks = F.pad(probs.detach().float().cpu(), (PADDING,) * 4)
    rles: list[bytes] = []
    areas = [np.zeros(0, np.int64)]
    for part in _chunks(regions.columns):  # packed chunk by chunk, for the edges of noise would fill gigabytes
        edges, counts = _edges(masks[part], regions.part(part), size[0], threshold, paste)
        part_rles, part_areas = pack_edges(edges, counts, np.full(len(counts), math.prod(size), np.int64))
        rles += part_rles
        areas.append(part_areas)
    return rles, np.concatenate(areas)


def on_device(probs: Tensor, convention: str = "torchvision") -> bool:
    """Returns whether masks are pasted on their device: there is a kernel for torchvision's convention on CUDA."""
    return probs.is_cuda and convention == "torchvision"


def encode_on_device(
    probs: Tensor, boxes: Tensor, images: Tensor, sizes: Sequence[tuple[int, int]], threshold: float, beside: Tensor
) -> tuple[list[bytes], Longs, Tensor]:
    """Same as `encode_boxed_masks` for the masks of several images, pasted on their device, with a single copy to the host.

    probs: floating point (N, m, m). boxes: (N, 4), xyxy in pixels of the images. images: int64 (N,), indices into `sizes`, each
    (H, W). beside: another tensor on the device, which is copied along.

    Returns RLEs and areas as `encode_boxed_masks` does, with the same bytes, and `beside` on the host. If masks have more than
    EDGES_PER_COLUMN edges per image column on average, there is a second copy.
    """
    table = sent(torch.tensor(sizes, dtype=torch.int64), boxes.device)[images]
    widest = max(width for _, width in sizes)
    room = EDGES_PER_COLUMN * widest * len(probs)
    found = mask_edges(probs, boxes, table, threshold, widest, room)
    counts, edges, pixels, beside = to_host(*found, table.prod(1), beside)
    if (total := int(counts.sum())) > room:
        edges = mask_edges(probs, boxes, table, threshold, widest, total)[1].cpu()
    return *pack_edges(edges[:total].numpy(), counts.numpy(), pixels.numpy()), beside


def encode(bitmap: NDArray[np.uint8]) -> bytes:
    """Returns the compressed counts of one mask: (H, W) of zeros and ones (any non-zero value is set)."""
    flat = (np.asarray(bitmap) != 0).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    return pack_counts(*_runs(edges, np.array([len(edges)]), np.array([flat.size])))[0]


def decode(counts: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Returns the mask of compressed counts: uint8 (H, W) of 0 and 1. Raises ValueError if they do not fill `size`."""
    return decode_columns(counts, size, (0, size[1]))


def decode_columns(counts: bytes, size: tuple[int, int], columns: tuple[int, int]) -> NDArray[np.uint8]:
    """Returns columns [first, last) of the mask of compressed counts, uint8 (H, last - first), at the cost of these columns
    alone.

    Raises ValueError if the counts do not fill `size`, or for columns outside of it.
    """
    runs = unpack_counts(counts)
    if runs.sum() != size[0] * size[1] or (runs < 0).any():
        raise ValueError(f"run lengths sum to {runs.sum()}, not to the {size[0]} x {size[1]} pixels of the image")
    if not 0 <= columns[0] <= columns[1] <= size[1]:
        raise ValueError(f"columns {columns[0]} to {columns[1]} are not all in an image of {size[1]}")
    bounds = np.clip(np.concatenate(([0], np.cumsum(runs))), columns[0] * size[0], columns[1] * size[0])
    ones = np.arange(len(runs)) % 2
    return np.repeat(ones.astype(np.uint8), np.diff(bounds)).reshape((size[0], columns[1] - columns[0]), order="F")


def pack_counts(runs: Longs, lengths: Longs) -> list[bytes]:
    """Returns the COCO strings of several masks.

    runs: run lengths of all masks, one after another. lengths: number of runs of each mask. From the fourth run of a mask on,
    the difference from the run two before is written, in groups of five bits, lowest first. The sixth bit of a group says
    whether more follow; the fifth bit of the last group is the sign. 48 is added to each group to make it printable.
    """
    values = runs.copy()
    later = np.flatnonzero(_ragged(lengths)[1] > 2)
    values[later] -= runs[later - 2]
    groups = _group_counts(values)
    group_ends = np.cumsum(groups)
    packed = np.empty(int(groups.sum()), dtype=np.uint8)
    for number in range(int(groups.max(initial=0))):
        rest = np.flatnonzero(groups > number)
        more = (groups[rest] > number + 1).astype(np.int64)
        packed[group_ends[rest] - groups[rest] + number] = ((values[rest] >> (5 * number)) & 31 | (more << 5)) + 48
    text = packed.tobytes()
    bounds = np.concatenate(([0], group_ends))[np.concatenate(([0], np.cumsum(lengths)))].tolist()
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


def unpack_counts(counts: bytes) -> Longs:
    """Returns the run lengths of one COCO string. Raises ValueError if it is truncated or contains other characters."""
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    if ((codes < 0) | (codes > 63)).any() or (len(codes) and codes[-1] & 32):
        raise ValueError("not a COCO run-length string: it holds foreign characters or ends within a number")
    if len(codes) == 0:
        return codes
    last = np.flatnonzero((codes & 32) == 0)
    groups = np.diff(last, prepend=-1)
    if groups.max() > 12:
        raise ValueError("not a COCO run-length string: a number in it is longer than 60 bits")
    values = np.add.reduceat((codes & 31) << (5 * _ragged(groups)[1]), last - groups + 1)
    values -= ((codes[last] & 16) != 0) * (np.int64(1) << (5 * groups))
    # From the fourth run on they are differences from the run two before: two interleaved running sums.
    for parity in (1, 2):
        values[parity::2] = np.cumsum(values[parity::2])
    return values


def _validate(probs: Tensor, boxes: Tensor, size: Sequence[int], convention: str) -> None:
    if convention not in _PASTES:
        raise ValueError(f"unknown mask convention {convention!r}: one of {', '.join(_PASTES)}")
    if probs.dim() != 3 or probs.shape[1] != probs.shape[2] or boxes.shape != (probs.shape[0], 4):
        raise ValueError(f"probs must be (N, m, m) and boxes (N, 4), got {tuple(probs.shape)} and {tuple(boxes.shape)}")
    if min(size) < 1:
        raise ValueError(f"an image of {size[0]} x {size[1]} pixels holds no mask")


@dataclass(frozen=True)
class _PasteRegions:
    """Enlarged boxes of N masks and their visible parts. Every array is (N,), and int64 unless stated otherwise.

    boxes: float32 (N, 4), the original boxes. x, y: first pixel of the enlarged box, possibly outside the image. lead_x,
    lead_y: float64, distance of the box's corner from that of this pixel. box_w, box_h: size of the box: int64 for a convention
    of whole pixels, which computes in float32, else float64. left, top: first visible pixel. columns, rows: number of visible
    pixels along x and y, both 0 if none is visible.
    """

    boxes: NDArray[np.float32]
    x: Longs
    y: Longs
    lead_x: Doubles
    lead_y: Doubles
    box_w: Longs | Doubles
    box_h: Longs | Doubles
    left: Longs
    top: Longs
    columns: Longs
    rows: Longs

    def part(self, part: slice) -> _PasteRegions:
        return _PasteRegions(*(getattr(self, name)[part] for name in self.__dataclass_fields__))


def _whole_regions(boxes: Tensor, side: int, size: tuple[int, int]) -> _PasteRegions:
    """Returns boxes, enlarged by the mask's padding and truncated towards zero to whole pixels, both corners inclusive."""
    scale = float(side + 2 * PADDING) / side
    half_w = (boxes[:, 2] - boxes[:, 0]) * 0.5 * scale
    half_h = (boxes[:, 3] - boxes[:, 1]) * 0.5 * scale
    centre_x = (boxes[:, 2] + boxes[:, 0]) * 0.5
    centre_y = (boxes[:, 3] + boxes[:, 1]) * 0.5
    grown = torch.stack((centre_x - half_w, centre_y - half_h, centre_x + half_w, centre_y + half_h))
    finite = torch.isfinite(grown).all(0)
    x0, y0, x1, y1 = torch.where(finite, grown, -FAR).clamp(-FAR, FAR).to(torch.int64).numpy()
    left, right = np.maximum(x0, 0), np.minimum(x1 + 1, size[1])
    top, bottom = np.maximum(y0, 0), np.minimum(y1 + 1, size[0])
    seen = (right > left) & (bottom > top)
    box_w, box_h = np.maximum(x1 - x0 + 1, 1), np.maximum(y1 - y0 + 1, 1)
    lead = np.zeros(len(x0))
    columns, rows = (right - left) * seen, (bottom - top) * seen
    return _PasteRegions(boxes.numpy(), x0, y0, lead, lead, box_w, box_h, left, top, columns, rows)


def _real_regions(boxes: Tensor, side: int, size: tuple[int, int]) -> _PasteRegions:
    """Returns boxes, enlarged by the mask's padding, with real-valued corners; pixels are sampled at their centres."""
    corners = boxes.double().numpy()
    extent = corners[:, 2:] - corners[:, :2]
    real = np.isfinite(corners).all(1) & (extent > 0).all(1)
    corners, extent = np.where(real[:, None], corners, 0.0), np.where(real[:, None], extent, 1.0)
    begin = np.clip(corners[:, :2] - extent * (PADDING / side), -FAR, FAR)
    end = np.clip(corners[:, 2:] + extent * (PADDING / side), -FAR, FAR)
    origin = np.floor(begin).astype(np.int64)
    first = np.maximum(origin, 0)
    last = np.minimum(np.ceil(end).astype(np.int64), np.array(size[::-1]))
    seen = np.maximum(last - first, 0) * (real & (last > first).all(1))[:, None]
    parts = (origin, begin - origin, np.where(end > begin, end - begin, 1.0), first, seen)
    (x, y), lead, size_of_box, visible, pixels = (part.T for part in parts)
    return _PasteRegions(boxes.numpy(), x, y, *lead, *size_of_box, *visible, *pixels)


def _chunks(columns: Longs) -> Iterator[slice]:
    """Yields slices of consecutive masks with about MAX_COLUMNS visible columns together."""
    number = (np.cumsum(columns) - columns) // MAX_COLUMNS
    bounds = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(columns)]
    return (slice(start, end) for start, end in itertools.pairwise(bounds))


def _edges(masks: Tensor, regions: _PasteRegions, height: int, threshold: float, paste: _Paste) -> tuple[Longs, Longs]:
    """Returns the edges (E,) of n masks (n, M, M), sorted within each mask, and the number of edges of each mask (n,)."""
    owner, place = _ragged(regions.columns)
    profiles = _column_profiles(masks, regions, owner, place)
    at, row, decided = _trace(profiles, regions.box_h[owner], regions.lead_y[owner], threshold, paste.slack)
    undecided = ~decided & (np.maximum(regions.box_w, regions.box_h) <= MAX_RESIZED_SIDE)[owner]
    if undecided.any():
        kept = ~undecided[at]
        at, row = at[kept], row[kept]
        exact_at, exact_row = _exact_edges(masks, regions, owner, place, np.flatnonzero(undecided), threshold, paste)
        where = np.searchsorted(at, exact_at)
        at, row = np.insert(at, where, exact_at), np.insert(row, where, exact_row)
    owners = owner[at]
    # Edges outside the image are moved to its border, where they cancel in pairs.
    row = np.clip(row + (regions.y - regions.top)[owners], 0, regions.rows[owners])
    edges = (place[at] + regions.left[owners]) * height + regions.top[owners] + row
    return _cancel_pairs(edges, owners, len(masks))


def _trace(
    profiles: NDArray[np.float32], box_h: Longs | Doubles, lead: Doubles, threshold: float, slack: float
) -> tuple[Longs, Longs, NDArray[np.bool_]]:
    """Finds the edges of every image column along its profile (columns, M), which is resized to `box_h` rows with an offset of
    `lead`.

    Returns the column of each edge and the row of the box at which the new run starts, in order, and which columns are decided:
    those of which every pixel is farther from the threshold than torch's float32 arithmetic can differ from this one.
    """
    side = profiles.shape[1]
    shift = slack * side * 2.0**-23  # of the sampling position, in cells
    blur = shift + slack * 2.0**-22  # of the profile, whose values are in 0..1
    decided = (np.abs(profiles - np.float32(threshold)) > blur).all(axis=1)
    decided &= threshold > blur  # the border of zeros has to be below the threshold
    above = profiles > threshold
    at, cell = np.divmod(np.flatnonzero(above[:, 1:] != above[:, :-1]), side - 1)
    low, high = profiles[at, cell].astype(np.float64), profiles[at, cell + 1].astype(np.float64)
    step = _step(side, box_h[at]).astype(np.float64)
    with np.errstate(invalid="ignore"):  # not-a-number probabilities stay undecided
        crossing = (cell + (threshold - low) / (high - low) + 0.5) / step - 0.5 + lead[at]
        row = np.ceil(crossing)
        gap = np.minimum(row - crossing, crossing - row + 1) * step
    rise = np.abs(high - low)
    decided[at[~(gap * rise > shift * rise + blur)]] = False
    return at, np.where(np.isfinite(row), row, 0).astype(np.int64), decided


def _exact_edges(
    masks: Tensor, regions: _PasteRegions, owner: Longs, place: Longs, columns: Longs, threshold: float, paste: _Paste
) -> tuple[Longs, Longs]:
    """Returns the edges of some columns, as in `_trace`, from masks resized by torch."""
    at, row = [], []
    owners, starts = np.unique(owner[columns], return_index=True)
    for number, some in zip(owners.tolist(), np.split(columns, starts[1:]), strict=True):
        pixels, first = paste.columns(masks[number], regions, number, place[some])
        above = F.pad(paste.is_set(pixels, threshold).T, (1, 1)).numpy()  # a zero above and below each column
        changes = np.nonzero(above[:, 1:] != above[:, :-1])
        at.append(some[changes[0]])
        row.append(changes[1] + first)
    return np.concatenate(at), np.concatenate(row)


def _whole_columns(mask: Tensor, regions: _PasteRegions, number: int, place: Longs) -> tuple[Tensor, int]:
    """Returns all rows of the box at some of its visible columns, resized by torch, and 0, the box's row of the first."""
    inside = torch.from_numpy(place + (regions.left[number] - regions.x[number]))
    return _resized_columns(mask, int(regions.box_h[number]), int(regions.box_w[number]), inside), 0


def _sampled_columns(mask: Tensor, regions: _PasteRegions, number: int, place: Longs) -> tuple[Tensor, int]:
    """Returns the visible rows of the box at some of its visible columns, in Detectron2's float32, and the box's row of the
    first.
    """
    x0, y0, x1, y1 = torch.from_numpy(regions.boxes[number])
    top = int(regions.top[number])
    x = torch.from_numpy(place + regions.left[number]).float() + 0.5
    y = torch.arange(top, top + int(regions.rows[number]), dtype=torch.float32) + 0.5
    along_y, along_x = torch.meshgrid((y - y0) / (y1 - y0) * 2 - 1, (x - x0) / (x1 - x0) * 2 - 1, indexing="ij")
    inner = mask[PADDING:-PADDING, PADDING:-PADDING]
    grid = torch.stack((along_x, along_y), dim=-1)
    return F.grid_sample(inner[None, None], grid[None], align_corners=False)[0, 0], top - int(regions.y[number])


def _resized_columns(mask: Tensor, box_h: int, box_w: int, columns: Tensor) -> Tensor:
    """Returns columns (box_h, c) of a mask (M, M) resized to its box, bit-identical to those of the whole resized mask.

    torch interpolates along x first, so columns can be resized alone. It has other code for outputs whose sides sum to at most
    128, so small boxes are resized as a whole, and a few columns are filled up with copies.
    """
    if box_w + box_h <= TORCH_SMALL or box_w + len(mask) <= TORCH_SMALL:
        return _resize(mask, box_h, box_w)[:, columns]
    profiles = _resize(mask, len(mask), box_w)[:, columns]
    filling = profiles[:, :1].expand(-1, max(0, TORCH_SMALL + 1 - box_h - len(columns)))
    return _resize(torch.cat((profiles, filling), dim=1), box_h, profiles.shape[1] + filling.shape[1])[:, : len(columns)]


def _resize(mask: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(mask[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]


def _column_profiles(masks: Tensor, regions: _PasteRegions, owner: Longs, column: Longs) -> NDArray[np.float32]:
    """Returns the profile of every visible image column, (columns, M): the masks' rows, interpolated along x as in torch."""
    count, side, _ = masks.shape
    step = _step(side, regions.box_w)[owner]
    inside: NDArray[Any] = (column + (regions.left - regions.x)[owner] - regions.lead_x[owner]).astype(step.dtype)
    source = np.clip(step * (inside + 0.5) - 0.5, 0, side)
    low = np.minimum(source.astype(np.int64), side - 1)
    upper = source - low.astype(step.dtype)
    pair = np.stack((low, np.minimum(low + 1, side - 1)), axis=1) + owner[:, None] * side
    weights = torch.from_numpy(np.stack((1 - upper, upper), axis=1).astype(np.float32))
    table = masks.transpose(1, 2).reshape(count * side, side)
    return F.embedding_bag(torch.from_numpy(pair), table, per_sample_weights=weights, mode="sum").numpy()


def _step(side: int, pixels: Longs | Doubles) -> NDArray[Any]:
    """Returns the number of mask cells per image pixel: in float32 as in torch for boxes of whole pixels, else in float64."""
    real: NDArray[Any] = pixels.astype(np.float64 if pixels.dtype == np.float64 else np.float32)
    return real.dtype.type(side) / real


@dataclass(frozen=True)
class _Paste:
    """A convention of pasting.

    regions: returns the regions for boxes, the mask's side and the image's size. columns: returns some visible columns of one
    mask as the other system computes them, and the box's row of their first pixel. is_set: compares such values with the
    threshold. slack: maximum difference of that system's arithmetic from `_trace`, in units of two roundings; nearer pixels are
    left to `columns`.
    """

    regions: Callable[[Tensor, int, tuple[int, int]], _PasteRegions]
    columns: Callable[[Tensor, _PasteRegions, int, Longs], tuple[Tensor, int]]
    is_set: Callable[[Tensor, float], Tensor]
    slack: float


_PASTES: Mapping[str, _Paste] = {
    "torchvision": _Paste(_whole_regions, _whole_columns, torch.gt, slack=1.0),
    # Seven roundings from a pixel to its position in the mask, and four products of two weights each.
    "detectron2": _Paste(_real_regions, _sampled_columns, torch.ge, slack=4.0),
}


def _cancel_pairs(edges: Longs, owners: Longs, masks: int) -> tuple[Longs, Longs]:
    """Returns the edges that occur an odd number of times, and their number for each mask: runs that touch are one run."""
    first = np.ones(len(edges), dtype=bool)
    first[1:] = (edges[1:] != edges[:-1]) | (owners[1:] != owners[:-1])
    starts = np.flatnonzero(first)
    odd = starts[np.diff(starts, append=len(edges)) % 2 == 1]
    return edges[odd], np.bincount(owners[odd], minlength=masks)


def pack_edges(edges: Longs, counts: Longs, pixels: Longs) -> tuple[list[bytes], Longs]:
    """Returns COCO strings and areas of masks. edges: of all masks, one after another; counts: number of edges of each mask;
    pixels: number of pixels of each mask's image.
    """
    runs, lengths = _runs(edges, counts, pixels)
    owner, place = _ragged(lengths)
    areas = np.bincount(owner, weights=runs * (place % 2), minlength=len(lengths)).astype(np.int64)
    return pack_counts(runs, lengths), areas


def _runs(edges: Longs, counts: Longs, pixels: Longs) -> tuple[Longs, Longs]:
    """Returns the run lengths of all masks, one after another, and the number of runs of each. Arguments: as in `pack_edges`.

    A run of ones that reaches the last pixel ends there; no run of zeros follows it.
    """
    owners = np.repeat(np.arange(len(counts)), counts)
    inner = edges < pixels[owners]
    edges, owners = edges[inner], owners[inner]
    lengths = np.bincount(owners, minlength=len(counts)) + 1
    ends = np.cumsum(lengths)
    runs = np.repeat(pixels, lengths)
    last = np.zeros(len(runs), dtype=bool)
    last[ends - 1] = True
    runs[~last] = edges
    first = ends - lengths
    before = np.concatenate(([0], runs[:-1]))
    before[first] = 0
    return runs - before, lengths


def _ragged(lengths: Longs) -> tuple[Longs, Longs]:
    """Returns, for consecutive groups of these lengths, the group of every element and its position within the group."""
    group = np.repeat(np.arange(len(lengths)), lengths)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _group_counts(values: Longs) -> Longs:
    """Returns the number of groups of five bits that each signed value needs."""
    magnitude = np.where(values < 0, ~values, values)
    groups = np.ones(len(values), dtype=np.int64)
    bits = 4
    while (magnitude >> bits).any():
        groups += (magnitude >> bits) > 0
        bits += 5
    return groups
