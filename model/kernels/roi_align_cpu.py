"""RoIAlign as an embedding bag: the CPU path.

A channels-last feature map is a table of B*H*W rows and C columns. Every bin of every RoI is a weighted sum of rows:
samples with four bilinear corners each. `torch.nn.functional.embedding_bag` computes such sums with vectorised, threaded
code in float32 and bfloat16, where the usual operator walks the channels one by one.

Rows and weights of a bin are the outer product of those along y and x. Adaptive samples lie so close that they share
neighbours: there an axis keeps each neighbour once, with the sum of its weights.

The backward pass is the same operation transposed: a row of the table's gradient is a weighted sum of output bins, so it
is deterministic and needs no atomics.

Shape letters: R RoIs, r RoIs of one group, B images, C channels, H x W a level's map, P bins a side, G samples along a
bin's side, K neighbours of a bin along an axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.layout import empty_gradient

# Rows gathered by one bag call: bounds the memory for indices and keeps a chunk's output in the cache while it is copied.
ROWS_PER_CHUNK = 1 << 16
# Canvas pixels: RoIs with centres in the same band are visited one after another.
BAND = 64
# RoIs whose neighbours are worked out at once. Their samples along an axis are padded to the largest number among them.
ROIS_PER_CHUNK = 1 << 12


@dataclass(frozen=True)
class Sampling:
    """How a RoI is sampled: P bins a side, samples along a bin's side (0: as many as feature pixels), half-pixel shift."""

    output_size: int
    sampling_ratio: int
    aligned: bool


def roi_align_cpu(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: int,
    sampling_ratio: int = 2,
    aligned: bool = False,
    mode: str = "avg",
) -> Tensor:
    """Pool every RoI from its level; see `roi_align` for the arguments.

    Returns (R, C, P, P) in the features' dtype and channels_last memory (the order in which bins are computed).
    Channels-last features are read in place, others are copied to that order first. Indices and weights are computed in
    float32 (float64 for float64 features), sums in float32 at least. Not differentiable by itself.
    """
    bins, channels = output_size**2, features[0].shape[1]
    pooled = features[0].new_empty((len(rois), bins, channels))
    if pooled.numel() == 0:
        return pooled.view(len(rois), output_size, output_size, channels).permute(0, 3, 1, 2)
    missing = torch.ones(len(rois), dtype=torch.bool, device=rois.device)
    tables = [_table(f) for f in features]
    order = _to_and_fro(rois)
    for bags in _bags(features, rois[order], levels[order], scales, Sampling(output_size, sampling_ratio, aligned), mode):
        values, members = _sum_bags(tables[bags.level], bags.rows, bags.weights), order[bags.members]
        if mode == "max":
            values = values.view(len(members) * bins, -1, channels).amax(1)
        _copy_rows(pooled, members, values)
        missing[members] = False
    if bool(missing.any()):
        pooled[missing] = 0
    return pooled.view(len(rois), output_size, output_size, channels).permute(0, 3, 1, 2)


def roi_align_cpu_backward(
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
    """Gradients of the levels for ``grad`` (R, C, P, P), in channels_last memory; deterministic on every device.

    Indices and weights are computed again: that costs less than the memory to keep them.
    """
    if grad.numel() == 0:
        return [empty_gradient(f, f.dtype).zero_() for f in features]
    grad_table = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
    bags = _bags(features, rois, levels, scales, Sampling(output_size, sampling_ratio, aligned), mode)
    backward = _max_backward if mode == "max" else _average_backward
    return backward(grad_table, features, bags, output_size**2)


@dataclass(frozen=True)
class _Bags:
    """Weighted sums of table rows that one call computes, in the order of their RoIs and bins (and, for max, samples).

    members: int64 (r,), ascending positions among all RoIs. rows, weights: (n, k) for n sums of k rows each.
    """

    level: int
    members: Tensor
    rows: Tensor
    weights: Tensor


@dataclass(frozen=True)
class _Axis:
    """Where the sampling lines of some RoIs lie along one axis of a map.

    near: int64 (r, P, G, 2), both neighbours of each line. weights: theirs, zero for lines that do not count.
    grid: int64 (r,), how many of the G lines of a bin exist. uniform: all of them, in every RoI.
    """

    near: Tensor
    weights: Tensor
    grid: Tensor
    uniform: bool

    def __getitem__(self, chosen: Tensor) -> _Axis:
        return _Axis(self.near[chosen], self.weights[chosen], self.grid[chosen], self.uniform)

    def spans(self) -> Tensor:
        """int64 (r,): how many neighbours lie between the first and the last of a bin, at most."""
        return (self.near.amax((2, 3)) - self.near.amin((2, 3))).amax(1) + 1

    def merged(self, count: int, size: int) -> tuple[Tensor, Tensor]:
        """Neighbours and mean weights (r, P, K) of bins that span at most ``count``, each neighbour once."""
        first = self.near.amin((2, 3))[..., None]
        weights = self.weights.new_zeros((*first.shape[:2], count))
        weights.scatter_add_(2, (self.near.flatten(2) - first), self._mean_weights())
        return (first + torch.arange(count, device=first.device)).clamp(max=size - 1), weights

    def separate(self) -> tuple[Tensor, Tensor]:
        """Neighbours and mean weights (r, P, K) of bins, two for each line."""
        return self.near.flatten(2), self._mean_weights()

    def _mean_weights(self) -> Tensor:
        return self.weights.flatten(2) / self.grid.view(-1, 1, 1)


def _to_and_fro(rois: Tensor) -> Tensor:
    """An order int64 (R,) of RoIs in which the next one overlaps the last ones: band by band of rows, to the right and back.

    What it reads is still in the cache then. With a thousand RoIs on the finest level a pass takes a fifth less time in
    bfloat16 and a quarter less in float32; no result depends on it.
    """
    image, x1, y1, x2, y2 = rois.double().unbind(1)
    x, band = (x1 + x2) / 2, ((y1 + y2) / 2).div(BAND, rounding_mode="floor")
    return ((image * 2**20 + band) * 2**20 + torch.where(band % 2 == 0, x, -x)).argsort()


def _bags(
    features: Sequence[Tensor], rois: Tensor, levels: Tensor, scales: Sequence[float], sampling: Sampling, mode: str
) -> Iterator[_Bags]:
    """Everything to sum, level by level. RoIs that are not finite, have no samples or no such image, are in no bag."""
    exact = rois.to(torch.float64 if features[0].dtype == torch.float64 else torch.float32)
    usable = torch.isfinite(exact).all(1) & (exact[:, 0] >= 0) & (exact[:, 0] < features[0].shape[0])
    split = _sample_bags if mode == "max" else _average_bags
    for level, (scale, feature) in enumerate(zip(scales, features, strict=True)):
        of_level = torch.nonzero((levels == level) & usable).flatten()
        for members in torch.split(of_level, ROIS_PER_CHUNK) if len(of_level) else ():
            y, x = _axes(exact[members, 1:], scale, feature.shape, sampling)
            if not sampling.sampling_ratio:  # boxes without an extent have no samples
                some = torch.nonzero((y.grid > 0) & (x.grid > 0)).flatten()
                members, y, x = members[some], y[some], x[some]
            yield from split(level, members, exact[members, 0].long(), y, x, feature.shape, feature.dtype)


def _axes(boxes: Tensor, scale: float, shape: torch.Size, sampling: Sampling) -> tuple[_Axis, _Axis]:
    """The sampling lines along y and x of boxes (r, 4), in the original operator's order of arithmetic."""
    scaled = boxes * scale - (0.5 if sampling.aligned else 0.0)
    sizes = scaled[:, 2:] - scaled[:, :2]
    if not sampling.aligned:
        sizes = sizes.clamp(min=1.0)
    bin_sizes = sizes / sampling.output_size
    y, x = (_axis(scaled[:, i], bin_sizes[:, i], shape[3 - i], sampling) for i in (1, 0))
    return y, x


def _axis(start: Tensor, bin_size: Tensor, size: int, sampling: Sampling) -> _Axis:
    """Lines that begin at ``start`` (r,) in bins of ``bin_size`` (r,) on an axis of ``size`` pixels.

    Lines farther than one pixel outside the map weigh nothing; up to there the border's value holds.
    """
    fixed = sampling.sampling_ratio
    grid = torch.full_like(start, fixed) if fixed else bin_size.ceil().clamp(min=0)
    lines = fixed or max(1, int(grid.max()) if len(grid) else 1)
    bin_index = torch.arange(sampling.output_size, dtype=start.dtype, device=start.device).view(1, -1, 1)
    line = torch.arange(lines, dtype=start.dtype, device=start.device)
    # Lines that do not exist repeat the last one that does, and weigh nothing.
    repeated = line if fixed else torch.minimum(line, (grid[:, None, None] - 1).clamp(min=0))
    step = (repeated + 0.5) * bin_size.view(-1, 1, 1) / (fixed or grid.clamp(min=1).view(-1, 1, 1))
    at = start.view(-1, 1, 1) + bin_index * bin_size.view(-1, 1, 1) + step
    counts = (at >= -1.0) & (at <= size)
    if not fixed:
        counts &= line < grid[:, None, None]
    at = at.clamp(0, size - 1)
    low = at.floor()
    kept = counts.to(start.dtype)
    upper = (at - low) * kept
    near = torch.stack((low, (low + 1).clamp(max=size - 1)), -1).long()
    return _Axis(near, torch.stack((kept - upper, upper), -1), grid.long(), uniform=fixed > 0)


def _average_bags(
    level: int, members: Tensor, images: Tensor, y: _Axis, x: _Axis, shape: torch.Size, dtype: torch.dtype
) -> Iterator[_Bags]:
    """One sum a bin: the mean of its samples."""
    for chosen, (rows, row_weights), (columns, column_weights) in _outer_factors(y, x, shape):
        rows = rows + (images[chosen] * shape[2]).view(-1, 1, 1)
        factors = (members[chosen], _numbers(rows * shape[3], shape), row_weights, _numbers(columns, shape), column_weights)
        count = max(1, ROWS_PER_CHUNK // (rows.shape[1] ** 2 * rows.shape[2] * columns.shape[2]))
        for some, at_y, weight_y, at_x, weight_x in zip(*(torch.split(f, count) for f in factors), strict=True):
            table_rows = at_y.flatten(1)[:, :, None] + at_x.flatten(1)[:, None, :]
            weights = weight_y.flatten(1)[:, :, None] * weight_x.flatten(1)[:, None, :]
            yield _Bags(level, some, _by_bin(table_rows, at_y, at_x), _by_bin(weights.to(dtype), at_y, at_x))


def _by_bin(outer: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Outer products (r, P*Ky, P*Kx) of axes (r, P, Ky) and (r, P, Kx) as (r*P*P, Ky*Kx): the neighbours of each bin together.

    Multiplied out whole axes at a time and put in order afterwards, for torch is slow where its innermost loops are short.
    """
    rois, bins, count_y = y.shape
    ordered = _widened(outer, x.shape[2]).view(rois, bins, count_y, bins, -1).permute(0, 1, 3, 2, 4)
    return ordered.reshape(rois * bins * bins, -1).view(outer.dtype)


def _outer_factors(
    y: _Axis, x: _Axis, shape: torch.Size
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """RoIs that have equally many neighbours along y and along x, with these and their weights (r, P, K)."""
    if y.uniform and x.uniform:
        yield torch.arange(len(y.grid), device=y.grid.device), y.separate(), x.separate()
        return
    # Samples are at most a pixel apart here. Even numbers of neighbours, so that there are few different ones.
    counts = (torch.stack((y.spans(), x.spans()), dim=1) + 1) // 2 * 2
    for count_y, count_x in torch.unique(counts, dim=0).tolist():
        chosen = torch.nonzero((counts == counts.new_tensor((count_y, count_x))).all(1)).flatten()
        yield chosen, y[chosen].merged(count_y, shape[2]), x[chosen].merged(count_x, shape[3])


def _sample_bags(
    level: int, members: Tensor, images: Tensor, y: _Axis, x: _Axis, shape: torch.Size, dtype: torch.dtype
) -> Iterator[_Bags]:
    """One sum a sample, for RoIs that have equally many: four corners each."""
    grids = torch.stack((y.grid, x.grid), dim=1)
    for lines_y, lines_x in torch.unique(grids, dim=0).tolist():
        same = torch.nonzero((grids == grids.new_tensor((lines_y, lines_x))).all(1)).flatten()
        bins = y.near.shape[1]
        for chosen in torch.split(same, max(1, ROWS_PER_CHUNK // (4 * bins**2 * lines_y * lines_x))):
            rows = (y.near[chosen, :, :lines_y] + (images[chosen] * shape[2]).view(-1, 1, 1, 1)) * shape[3]
            y_shape, x_shape = (len(chosen), bins, 1, lines_y, 1, 2, 1), (len(chosen), 1, bins, 1, lines_x, 1, 2)
            table_rows = _numbers(rows, shape).view(y_shape) + _numbers(x.near[chosen, :, :lines_x], shape).reshape(x_shape)
            weights = y.weights[chosen, :, :lines_y].reshape(y_shape) * x.weights[chosen, :, :lines_x].reshape(x_shape)
            yield _Bags(level, members[chosen], table_rows.reshape(-1, 4), weights.reshape(-1, 4).to(dtype))


def _average_backward(grad_table: Tensor, features: Sequence[Tensor], bags: Iterator[_Bags], bins: int) -> list[Tensor]:
    """The bag transposed: every row of a level sums the bins that read it."""
    entries: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in features]
    for some in bags:
        outputs = _outputs(some, bins).to(some.rows.dtype)[:, None].expand_as(some.rows)
        entries[some.level].append((some.rows.flatten(), outputs.flatten(), some.weights.flatten()))
    return [_transposed_bag(grad_table, e, f.shape) for e, f in zip(entries, features, strict=True)]


def _max_backward(grad_table: Tensor, features: Sequence[Tensor], bags: Iterator[_Bags], bins: int) -> list[Tensor]:
    """Each bin's gradient goes to the sample that was largest, and from there to its four corners."""
    tables = [_table(f) for f in features]
    sum_dtype = torch.float64 if grad_table.dtype == torch.float64 else torch.float32
    sums = [torch.zeros_like(t, dtype=sum_dtype) for t in tables]
    for some in bags:
        values = _sum_bags(tables[some.level], some.rows, some.weights)
        samples = values.view(len(some.members) * bins, -1, grad_table.shape[1])
        winners = samples.argmax(1, keepdim=True)
        flow = torch.zeros_like(samples, dtype=sum_dtype)
        flow.scatter_(1, winners, grad_table[_outputs(some, bins)].to(sum_dtype)[:, None])
        flow = flow.view(-1, grad_table.shape[1])
        for corner in range(4):
            sums[some.level].index_add_(0, some.rows[:, corner].long(), flow * some.weights[:, corner, None])
    return [_as_level(s.to(f.dtype), f.shape) for s, f in zip(sums, features, strict=True)]


def _transposed_bag(grad_table: Tensor, entries: Sequence[tuple[Tensor, Tensor, Tensor]], shape: torch.Size) -> Tensor:
    """Gradient (B, C, H, W) of a level: every table row sums the bins that read it, found by sorting the entries by row."""
    table_rows = shape[0] * shape[2] * shape[3]
    if not entries:
        return _as_level(grad_table.new_zeros((table_rows, shape[1])), shape)
    rows, outputs, weights = (torch.cat(parts) for parts in zip(*entries, strict=True))
    rows, order = rows.sort(stable=True)
    starts = torch.searchsorted(rows, torch.arange(table_rows, dtype=rows.dtype, device=rows.device)).to(outputs.dtype)
    weights = weights[order].to(grad_table.dtype)
    return _as_level(F.embedding_bag(outputs[order], grad_table, starts, per_sample_weights=weights, mode="sum"), shape)


def _table(feature: Tensor) -> Tensor:
    """(B, C, H, W) as (B*H*W, C): a view where the memory is channels-last, a copy otherwise."""
    return feature.permute(0, 2, 3, 1).reshape(-1, feature.shape[1])


def _as_level(table: Tensor, shape: torch.Size) -> Tensor:
    """(B*H*W, C) as (B, C, H, W) in channels_last memory."""
    batch, channels, height, width = shape
    return table.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _sum_bags(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of table rows: (n, C) for ``rows`` and ``weights`` of (n, k)."""
    return F.embedding_bag(rows, table, per_sample_weights=weights.to(table.dtype), mode="sum")


def _outputs(bags: _Bags, bins: int) -> Tensor:
    """Row numbers int64 (r * P * P,) of the RoIs' bins in the pooled table."""
    return (bags.members[:, None] * bins + torch.arange(bins, device=bags.members.device)).view(-1)


def _numbers(rows: Tensor, shape: torch.Size) -> Tensor:
    """Row numbers of a level's table in 32 bits where they fit: half the traffic."""
    return rows.to(torch.int32) if shape[0] * shape[2] * shape[3] < 2**31 else rows


def _copy_rows(target: Tensor, members: Tensor, values: Tensor) -> None:
    """Copy ``values`` to the RoIs ``members`` of ``target`` (R, ...), in elements as wide as fit: indexing costs by element."""
    rows, source = target.view(len(target), -1), values.view(len(members), -1)
    _widened(rows, rows.shape[1])[members] = _widened(source, rows.shape[1])


def _widened(values: Tensor, together: int) -> Tensor:
    """The same memory in the widest elements of which groups of ``together`` along the last axis are made."""
    for wide in (torch.complex128, torch.int64, torch.int32):
        if together * values.element_size() % wide.itemsize == 0:
            return values.view(wide)
    return values
