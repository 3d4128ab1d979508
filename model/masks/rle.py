"""COCO run-length encodings straight from m x m mask probabilities and boxes, without full-image masks.

A run-length encoding (RLE) lists the lengths of alternating runs of 0 and 1 in column-major order, starting with 0; COCO
packs the list into a string of 5-bit groups. Mask R-CNN predicts an m x m mask per box (section 3, "Mask
Representation") that is resized to the box and cut at a threshold; only that region can hold ones.

The resized mask is not computed either. Along an image column it is linear between two rows of the small mask, so it
crosses the threshold at most once there, at a place that a division finds: the work follows the box's width times m, not
its area. Where rounding could decide a pixel, the mask is resized after all, so that the bytes stay those of torch.

Both conventions of pasting are the same geometry, a mask with a border of zero cells in a box that has grown by them:
torchvision truncates that box to whole pixels, Detectron2 keeps it as it is.

On a GPU the pixels are so cheap that they are computed after all, though never stored (`model.kernels.mask_rle`); what comes
to the host are the edges.

Shape letters: N masks, m mask side, M = m + 2 with its border, H x W the image, E edges (where a mask switches between 0
and 1, as positions in column-major order).
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

PADDING = 1  # zero cells around the mask before it is resized; Detectron2 says that beyond the mask there is nothing
MAX_COLUMNS = 1 << 15  # image columns handled at once: bounds the memory for many large boxes, of noise too
MAX_RESIZED_SIDE = 1 << 17  # pixels of a box's side beyond which undecided columns are not resized to decide them
TORCH_SMALL = 128  # height plus width of an output up to which torch resizes by other code
FAR = 1e9  # pixels; boxes are cut there so that whole-pixel arithmetic cannot overflow
EDGES_PER_COLUMN = 1  # of the image, room for each mask on a GPU: two in each of a box's columns, boxes half as wide as images

Longs = NDArray[np.int64]
Doubles = NDArray[np.float64]


def encode_boxed_masks(
    probs: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5, convention: PasteKind = "torchvision"
) -> tuple[list[bytes], Longs]:
    """Encode masks as they would look pasted into the image, at a cost that follows the boxes' widths.

    probs: float32 (N, m, m) in 0..1. boxes: float32 (N, 4), xyxy in the image's pixels. size: (H, W). convention:
    "torchvision" pads the mask by one cell, grows the box alike, truncates it to whole pixels, resizes bilinearly, and sets
    a pixel where that is greater than ``threshold``; "detectron2" samples the mask bilinearly at the pixels' centres
    (`grid_sample`, zeros outside), and sets a pixel of the grown box where that is ``threshold`` or more.

    Returns COCO compressed counts, byte-identical to `pycocotools.mask.encode` of the pasted masks, and each mask's pixels.
    Masks whose box lies outside the image or is not finite (with "detectron2" also: has no area) are empty. Raises
    ValueError for an unknown convention or shapes that do not fit.
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
    """Returns whether masks are pasted and cut on their device: there is a kernel for torchvision's convention on CUDA."""
    return probs.is_cuda and convention == "torchvision"


def encode_on_device(
    probs: Tensor, boxes: Tensor, images: Tensor, sizes: Sequence[tuple[int, int]], threshold: float, beside: Tensor
) -> tuple[list[bytes], Longs, Tensor]:
    """`encode_boxed_masks` for the masks of several images, pasted and cut on their device, with a single copy to the host.

    probs: float (N, m, m), boxes: (N, 4) in the images' own pixels, images: int64 (N,), index into ``sizes``, each (H, W).
    beside: any other tensor of the device that is wanted on the host; it comes in the same copy.

    Returns counts and pixels as `encode_boxed_masks` does, with the same bytes, and ``beside`` on the host. Raggeder masks
    than there is room for, more than an edge per image column on average, cost a second copy.
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
    """COCO strings of several masks at once.

    runs: run lengths of all masks, one after another. lengths: how many belong to each mask. From a mask's fourth run on,
    the difference to the run before the last is written, in groups of five bits, lowest first; a group's sixth bit says
    that more follow, its fifth is the sign of the last one. 48 is added to make it printable.
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
    # From the fourth run on they are differences to the run before the last: two interleaved running sums.
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
    """Grown boxes of N masks and what of them lies in the image; every array is (N,), int64 where nothing else is said.

    boxes: float32 (N, 4), as they were. x, y: the pixel that the grown box begins in, possibly outside the image. lead_x,
    lead_y: float64, how far behind that pixel's corner. box_w, box_h: its size, int64 where the convention has whole pixels
    and computes in float32, else float64. left, top: the first visible pixel. columns, rows: visible pixels along x and y,
    both 0 where none is.
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
    """Grow boxes by the mask's padding and truncate them towards zero to whole pixels, both corners inclusive."""
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
    """Grow boxes by the mask's padding; their corners stay where they are, pixels are seen from their centres."""
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
    """Consecutive masks whose visible columns together stay near MAX_COLUMNS."""
    number = (np.cumsum(columns) - columns) // MAX_COLUMNS
    bounds = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(columns)]
    return (slice(start, end) for start, end in itertools.pairwise(bounds))


def _edges(masks: Tensor, regions: _PasteRegions, height: int, threshold: float, paste: _Paste) -> tuple[Longs, Longs]:
    """Edges (E,) of n masks (n, M, M), sorted within each mask, and how many each mask has (n,)."""
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
    # Rows outside the image are cut off: their edges gather on the border, where they cancel in pairs.
    row = np.clip(row + (regions.y - regions.top)[owners], 0, regions.rows[owners])
    edges = (place[at] + regions.left[owners]) * height + regions.top[owners] + row
    return _cancel_pairs(edges, owners, len(masks))


def _trace(
    profiles: NDArray[np.float32], box_h: Longs | Doubles, lead: Doubles, threshold: float, slack: float
) -> tuple[Longs, Longs, NDArray[np.bool_]]:
    """Follow every image column down its profile (columns, M), resized to ``box_h`` rows that begin ``lead`` late.

    Returns each edge's column and the box's row where the new run starts, in order, and which columns are decided: all
    their pixels are farther from the threshold than torch's float32 arithmetic can differ from this one.
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
    """The edges of some columns, as in `_trace`, from masks that torch has resized."""
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
    """All rows of the box at some of its visible columns, resized by torch; the first one is the box's own first."""
    inside = torch.from_numpy(place + (regions.left[number] - regions.x[number]))
    return _resized_columns(mask, int(regions.box_h[number]), int(regions.box_w[number]), inside), 0


def _sampled_columns(mask: Tensor, regions: _PasteRegions, number: int, place: Longs) -> tuple[Tensor, int]:
    """The visible rows of the box at some of its visible columns, in Detectron2's float32; and the box's row of the first."""
    x0, y0, x1, y1 = torch.from_numpy(regions.boxes[number])
    top = int(regions.top[number])
    x = torch.from_numpy(place + regions.left[number]).float() + 0.5
    y = torch.arange(top, top + int(regions.rows[number]), dtype=torch.float32) + 0.5
    along_y, along_x = torch.meshgrid((y - y0) / (y1 - y0) * 2 - 1, (x - x0) / (x1 - x0) * 2 - 1, indexing="ij")
    inner = mask[PADDING:-PADDING, PADDING:-PADDING]
    grid = torch.stack((along_x, along_y), dim=-1)
    return F.grid_sample(inner[None, None], grid[None], align_corners=False)[0, 0], top - int(regions.y[number])


def _resized_columns(mask: Tensor, box_h: int, box_w: int, columns: Tensor) -> Tensor:
    """Columns (box_h, c) of a mask (M, M) resized to its box, with the bits that resizing the mask at once would give.

    Torch interpolates along x first, so columns can be resized alone; but it has other code for outputs whose sides sum to
    no more than 128, so small boxes are resized as they are and few columns are filled up.
    """
    if box_w + box_h <= TORCH_SMALL or box_w + len(mask) <= TORCH_SMALL:
        return _resize(mask, box_h, box_w)[:, columns]
    profiles = _resize(mask, len(mask), box_w)[:, columns]
    filling = profiles[:, :1].expand(-1, max(0, TORCH_SMALL + 1 - box_h - len(columns)))
    return _resize(torch.cat((profiles, filling), dim=1), box_h, profiles.shape[1] + filling.shape[1])[:, : len(columns)]


def _resize(mask: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(mask[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]


def _column_profiles(masks: Tensor, regions: _PasteRegions, owner: Longs, column: Longs) -> NDArray[np.float32]:
    """The small masks' rows along every visible image column: (columns, M), interpolated along x like torch does."""
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
    """Mask cells per image pixel: of whole pixels in float32 as torch has it, else in float64."""
    real: NDArray[Any] = pixels.astype(np.float64 if pixels.dtype == np.float64 else np.float32)
    return real.dtype.type(side) / real


@dataclass(frozen=True)
class _Paste:
    """What the conventions differ in.

    regions: from boxes, the mask's side and the image's size. columns: some visible columns of one mask as the other system
    computes them, and the box's row of their first pixel. is_set: of such values and the threshold. slack: how far that
    system's arithmetic may be from `_trace`, in units of two roundings; a pixel nearer than that is left to `columns`.
    """

    regions: Callable[[Tensor, int, tuple[int, int]], _PasteRegions]
    columns: Callable[[Tensor, _PasteRegions, int, Longs], tuple[Tensor, int]]
    is_set: Callable[[Tensor, float], Tensor]
    slack: float


_PASTES: Mapping[str, _Paste] = {
    "torchvision": _Paste(_whole_regions, _whole_columns, torch.gt, slack=1.0),
    # Seven roundings from a pixel to its place in the mask, and four products of two weights each.
    "detectron2": _Paste(_real_regions, _sampled_columns, torch.ge, slack=4.0),
}


def _cancel_pairs(edges: Longs, owners: Longs, masks: int) -> tuple[Longs, Longs]:
    """Edges that meet an odd number of times, and how many each mask has: a run that ends where the next starts goes on."""
    first = np.ones(len(edges), dtype=bool)
    first[1:] = (edges[1:] != edges[:-1]) | (owners[1:] != owners[:-1])
    starts = np.flatnonzero(first)
    odd = starts[np.diff(starts, append=len(edges)) % 2 == 1]
    return edges[odd], np.bincount(owners[odd], minlength=masks)


def pack_edges(edges: Longs, counts: Longs, pixels: Longs) -> tuple[list[bytes], Longs]:
    """Returns COCO strings and areas of masks, given the numbers of edges of each, and of the pixels of their images."""
    runs, lengths = _runs(edges, counts, pixels)
    owner, place = _ragged(lengths)
    areas = np.bincount(owner, weights=runs * (place % 2), minlength=len(lengths)).astype(np.int64)
    return pack_counts(runs, lengths), areas


def _runs(edges: Longs, counts: Longs, pixels: Longs) -> tuple[Longs, Longs]:
    """Run lengths of all masks, one after another, and how many each has; ``pixels`` are those of each mask's image.

    A run of ones that reaches the last pixel has its edge there and needs no run of zeros behind it.
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
    """For consecutive groups of these lengths: every element's group, and its place within the group."""
    group = np.repeat(np.arange(len(lengths)), lengths)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _group_counts(values: Longs) -> Longs:
    """How many groups of five bits each signed value needs."""
    magnitude = np.where(values < 0, ~values, values)
    groups = np.ones(len(values), dtype=np.int64)
    bits = 4
    while (magnitude >> bits).any():
        groups += (magnitude >> bits) > 0
        bits += 5
    return groups
