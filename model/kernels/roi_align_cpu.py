"""RoIAlign as an embedding bag: the CPU path.

A channels-last feature map is a table of B*H*W rows and C columns. Every bin of every RoI is a weighted sum of rows:
sampling_ratio^2 points with four bilinear corners each. `torch.nn.functional.embedding_bag` computes such sums with
vectorised, threaded code in float32 and bfloat16, where the usual operator walks the channels one by one.

The backward pass is the same operation transposed: a row of the table's gradient is a weighted sum of output bins, so it
is deterministic and needs no atomics.

Shape letters: R RoIs, B images, C channels, H x W a level's map, P bins a side, G samples along a bin's side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows gathered by one bag call: bounds the memory for indices and keeps a chunk's output in the cache while it is copied.
ROWS_PER_CHUNK = 1 << 16


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
    sampling = Sampling(output_size, sampling_ratio, aligned)
    bins, channels = output_size**2, features[0].shape[1]
    pooled = features[0].new_zeros((len(rois), bins, channels))
    tables = [_table(f) for f in features]
    for group in _groups(_exact(rois, features), levels, scales, [f.shape for f in features], sampling):
        table = tables[group.level]
        if mode == "max":
            values = _bag(table, *group.samples()).view(len(group.members) * bins, -1, channels).amax(1)
        else:
            values = _bag(table, *group.average())
        pooled[group.members] = values.view(-1, bins, channels)
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
    sampling = Sampling(output_size, sampling_ratio, aligned)
    grad_table = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
    groups = _groups(_exact(rois, features), levels, scales, [f.shape for f in features], sampling)
    if mode == "max":
        return _max_backward(grad_table, features, groups, output_size**2)
    return _average_backward(grad_table, features, groups, output_size**2)


def _average_backward(grad_table: Tensor, features: Sequence[Tensor], groups: Iterator[_Group], bins: int) -> list[Tensor]:
    """The bag transposed: every row of a level sums the bins that read it."""
    entries: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in features]
    for group in groups:
        rows, weights = group.average()
        outputs = _outputs(group, bins).view(-1, 1).expand_as(rows)
        entries[group.level].append((rows.reshape(-1), outputs.reshape(-1), weights.reshape(-1)))
    return [_transposed_bag(grad_table, e, f.shape) for e, f in zip(entries, features, strict=True)]


def _max_backward(grad_table: Tensor, features: Sequence[Tensor], groups: Iterator[_Group], bins: int) -> list[Tensor]:
    """Each bin's gradient goes to the sample that was largest, and from there to its four corners."""
    tables = [_table(f) for f in features]
    sum_dtype = torch.float64 if grad_table.dtype == torch.float64 else torch.float32
    sums = [torch.zeros_like(t, dtype=sum_dtype) for t in tables]
    for group in groups:
        rows, weights = group.samples()
        samples = _bag(tables[group.level], rows, weights).view(len(group.members) * bins, -1, grad_table.shape[1])
        winners = samples.argmax(1, keepdim=True)
        flow = torch.zeros_like(samples, dtype=sum_dtype)
        flow.scatter_(1, winners, grad_table[_outputs(group, bins)].to(sum_dtype)[:, None])
        flow = flow.view(-1, grad_table.shape[1])
        for corner in range(4):
            sums[group.level].index_add_(0, rows[:, corner].long(), flow * weights[:, corner, None])
    return [_as_level(s.to(f.dtype), f.shape) for s, f in zip(sums, features, strict=True)]


@dataclass(frozen=True)
class _Group:
    """RoIs of one level that have the same number of samples in a bin, with the corners of their sampling lines.

    members: int64 (r,), positions among all RoIs. rows / cols: (r, P, G, 2), row numbers (times the map's width, plus the
    image's first row) and column numbers of the two neighbours. row_weights / col_weights: their bilinear weights.
    """

    level: int
    members: Tensor
    rows: Tensor
    row_weights: Tensor
    cols: Tensor
    col_weights: Tensor

    def average(self) -> tuple[Tensor, Tensor]:
        """Table rows and weights of every bin, (r*P*P, 4*G*G), weighted for the mean of the samples."""
        count, bins, grid_h, _ = self.rows.shape
        grid_w = self.cols.shape[2]
        rows = self.rows.view(count, bins, 1, -1, 1) + self.cols.view(count, 1, bins, 1, -1)
        scaled = self.row_weights / (grid_h * grid_w)
        weights = scaled.view(count, bins, 1, -1, 1) * self.col_weights.view(count, 1, bins, 1, -1)
        return rows.view(count * bins * bins, -1), weights.view(count * bins * bins, -1)

    def samples(self) -> tuple[Tensor, Tensor]:
        """Table rows and weights of every sample, (r*P*P*G*G, 4)."""
        count, bins, grid_h, _ = self.rows.shape
        grid_w = self.cols.shape[2]
        y_shape, x_shape = (count, bins, 1, grid_h, 1, 2, 1), (count, 1, bins, 1, grid_w, 1, 2)
        rows = self.rows.view(y_shape) + self.cols.view(x_shape)
        weights = self.row_weights.view(y_shape) * self.col_weights.view(x_shape)
        return rows.reshape(-1, 4), weights.reshape(-1, 4)


def _groups(
    rois: Tensor, levels: Tensor, scales: Sequence[float], shapes: Sequence[torch.Size], sampling: Sampling
) -> Iterator[_Group]:
    """Chunks of RoIs that one bag call can pool. RoIs that are not finite, or have no samples, are in none."""
    finite = torch.isfinite(rois).all(1)
    for level, (scale, shape) in enumerate(zip(scales, shapes, strict=True)):
        of_level = torch.nonzero((levels == level) & finite).flatten()
        if not len(of_level):
            continue
        starts, bin_sizes = _geometry(rois[of_level, 1:], scale, sampling)
        for grid, chosen in _same_grid(bin_sizes, sampling):
            step = max(1, ROWS_PER_CHUNK // (4 * grid[0] * grid[1] * sampling.output_size**2))
            for chunk in torch.split(chosen, step):
                members = of_level[chunk]
                yield _group(level, members, rois[members, 0], starts[chunk], bin_sizes[chunk], grid, shape, sampling)


def _geometry(boxes: Tensor, scale: float, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """First corner and bin size, both (r, 2) as x, y in feature pixels, in the operator's own order of arithmetic."""
    scaled = boxes * scale - (0.5 if sampling.aligned else 0.0)
    sizes = scaled[:, 2:] - scaled[:, :2]
    if not sampling.aligned:
        sizes = sizes.clamp(min=1.0)
    return scaled[:, :2], sizes / sampling.output_size


def _same_grid(bin_sizes: Tensor, sampling: Sampling) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """(samples along y, along x) of a bin and the RoIs that have it, as positions in ``bin_sizes``."""
    if sampling.sampling_ratio > 0:
        yield (sampling.sampling_ratio, sampling.sampling_ratio), torch.arange(len(bin_sizes), device=bin_sizes.device)
        return
    grids, inverse = torch.unique(bin_sizes.ceil().long(), dim=0, return_inverse=True)
    for number, (grid_w, grid_h) in enumerate(grids.tolist()):
        if grid_w > 0 and grid_h > 0:
            yield (grid_h, grid_w), torch.nonzero(inverse == number).flatten()


def _group(
    level: int,
    members: Tensor,
    images: Tensor,
    starts: Tensor,
    bin_sizes: Tensor,
    grid: tuple[int, int],
    shape: torch.Size,
    sampling: Sampling,
) -> _Group:
    """Corner numbers and weights along both axes for RoIs of one grid."""
    batch, _, height, width = shape
    # 32-bit numbers halve the traffic; the table's rows rarely need more.
    dtype = torch.int32 if batch * height * width < 2**31 else torch.int64
    y, y_weights = _corners(starts[:, 1], bin_sizes[:, 1], grid[0], height, sampling.output_size, dtype)
    x, x_weights = _corners(starts[:, 0], bin_sizes[:, 0], grid[1], width, sampling.output_size, dtype)
    rows = (y + (images.to(dtype) * height).view(-1, 1, 1, 1)) * width
    return _Group(level, members, rows, y_weights, x, x_weights)


def _corners(start: Tensor, bin_size: Tensor, grid: int, size: int, bins: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Neighbours and bilinear weights of each sampling line along one axis: two tensors (r, P, G, 2).

    Lines farther than one pixel outside the map weigh nothing; up to there the border's value holds.
    """
    bin_index = torch.arange(bins, dtype=start.dtype, device=start.device).view(1, -1, 1)
    sample = torch.arange(grid, dtype=start.dtype, device=start.device) + 0.5
    at = start.view(-1, 1, 1) + bin_index * bin_size.view(-1, 1, 1) + sample * bin_size.view(-1, 1, 1) / grid
    inside = ((at >= -1.0) & (at <= size)).to(start.dtype)
    at = at.clamp(0, size - 1)
    low = at.floor()
    high = (low + 1).clamp(max=size - 1)
    upper = (at - low) * inside
    return torch.stack((low, high), -1).to(dtype), torch.stack((inside - upper, upper), -1)


def _table(feature: Tensor) -> Tensor:
    """(B, C, H, W) as (B*H*W, C): a view where the memory is channels-last, a copy otherwise."""
    return feature.permute(0, 2, 3, 1).reshape(-1, feature.shape[1])


def _as_level(table: Tensor, shape: torch.Size) -> Tensor:
    """(B*H*W, C) as (B, C, H, W) in channels_last memory."""
    batch, channels, height, width = shape
    return table.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _exact(rois: Tensor, features: Sequence[Tensor]) -> Tensor:
    """RoIs in the precision of indices and weights."""
    return rois.to(torch.float64 if features[0].dtype == torch.float64 else torch.float32)


def _outputs(group: _Group, bins: int) -> Tensor:
    """Row numbers int64 (r * P * P,) of a group's bins in the pooled table."""
    return (group.members[:, None] * bins + torch.arange(bins, device=group.members.device)).view(-1)


def _bag(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of table rows: (n, C) for ``rows`` and ``weights`` of (n, k)."""
    return F.embedding_bag(rows, table, per_sample_weights=weights.to(table.dtype), mode="sum")


def _transposed_bag(grad_table: Tensor, entries: Sequence[tuple[Tensor, Tensor, Tensor]], shape: torch.Size) -> Tensor:
    """Gradient (B, C, H, W) of a level: every table row sums the bins that read it, found by sorting the entries by row."""
    table_rows = shape[0] * shape[2] * shape[3]
    if not entries:
        return _as_level(grad_table.new_zeros((table_rows, shape[1])), shape)
    rows, outputs, weights = (torch.cat(parts) for parts in zip(*entries, strict=True))
    rows, order = rows.sort(stable=True)
    starts = torch.searchsorted(rows, torch.arange(table_rows, dtype=rows.dtype, device=rows.device))
    weights = weights[order].to(grad_table.dtype)
    return _as_level(F.embedding_bag(outputs[order], grad_table, starts, per_sample_weights=weights, mode="sum"), shape)
