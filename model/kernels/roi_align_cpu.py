"""RoIAlign as an embedding bag: the CPU path.

A channels-last feature map is a table of B*H*W rows and C columns. Every bin of every RoI is a weighted sum of rows: samples
with four bilinear corners each. `torch.nn.functional.embedding_bag` computes such sums with vectorised, threaded code in
float32 and bfloat16, whereas torchvision's operator visits the channels one by one.

The rows and weights of a bin are the outer product of those along y and x. Adaptive samples are so close that they share
neighbours: along each axis a neighbour is then kept once, with the sum of its weights.

The backward pass is the same operation transposed: a row of the table's gradient is a weighted sum of output bins. It is
deterministic and needs no atomics.

Shape letters: R RoIs, r RoIs of one group, B images, C channels, H x W pixels of a level's map, P bins per side, G samples
along each side of a bin, K neighbours of a bin along an axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from masklake.model.kernels.layout import FARTHEST, empty_gradient

ROWS_PER_CHUNK = 1 << 17
"""Number of rows gathered by one call: limits the memory for indices, and keeps the output in the cache while it is copied."""
BAND = 64
"""Height of a band in canvas pixels: RoIs with centres in the same band are visited one after another."""
LINES_PER_CHUNK = 1 << 18
"""Number of sampling lines computed at once; every RoI takes as many as the RoI that needs most."""


@dataclass(frozen=True)
class Sampling:
    """How RoIs are sampled: P, samples along each side of a bin (0: as many as feature pixels), half-pixel shift."""

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
    """Pools every RoI from its level; see `roi_align` for the arguments.

    Returns (R, C, P, P) in the features' dtype and channels_last memory. Channels-last features are read in place, others are
    copied to that order first. Indices and weights are computed in float32 (float64 for float64 features), sums in at least
    float32. Not differentiable by itself.
    """
    bins, channels = output_size**2, features[0].shape[1]
    pooled = features[0].new_empty((len(rois), bins, channels))
    if pooled.numel() == 0:
        return pooled.view(len(rois), output_size, output_size, channels).permute(0, 3, 1, 2)
    missing = torch.ones(len(rois), dtype=torch.bool, device=rois.device)
    tables = [_table(f) for f in features]
    for bags in _bags(features, rois, levels, scales, Sampling(output_size, sampling_ratio, aligned), mode):
        values = _sum_bags(tables[bags.level], bags.rows, bags.weights)
        if mode == "max":
            values = values.view(len(bags.members) * bins, -1, channels).amax(1)
        _copy_rows(pooled, bags.members, values)
        missing[bags.members] = False
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
    """Returns the gradients of the levels for `grad` (R, C, P, P), in channels_last memory; deterministic on every device.

    Indices and weights are computed again, which costs less than the memory to keep them.
    """
    if grad.numel() == 0:
        return [empty_gradient(f, f.dtype).zero_() for f in features]
    grad_table = _table(grad)
    bags = _bags(features, rois, levels, scales, Sampling(output_size, sampling_ratio, aligned), mode)
    backward = _max_backward if mode == "max" else _average_backward
    return backward(grad_table, features, bags, output_size**2)


@dataclass(frozen=True)
class _Bags:
    """The weighted sums of table rows that one call computes, in the order of RoIs and bins (and samples, for the maximum).

    members: int64 (r,), indices among all RoIs. rows, weights: (n, k) for n sums of k rows each.
    """

    level: int
    members: Tensor
    rows: Tensor
    weights: Tensor


@dataclass(frozen=True)
class _Axis:
    """The sampling lines of some RoIs along one axis of their maps.

    near: int64 (r, P, G, 2), both neighbours of each line. weights: their weights (r, P, G, 2), zero for lines that do not
    count. grid: int64 (r,), number of the G lines of a bin that exist. size: int64 (r,), pixels of the map along the axis.
    """

    near: Tensor
    weights: Tensor
    grid: Tensor
    size: Tensor

    def __getitem__(self, chosen: Tensor) -> _Axis:
        return _Axis(self.near[chosen], self.weights[chosen], self.grid[chosen], self.size[chosen])

    def spans(self) -> Tensor:
        """Returns int64 (r,): the maximum number of neighbours from the first to the last of a bin. Every RoI needs lines."""
        return (self.near[:, :, -1, 1] - self.near[:, :, 0, 0]).amax(1) + 1

    def merged(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns neighbours, each once, and mean weights (r, P, K) of bins that span at most K = `count` neighbours. Each RoI
        must have lines.
        """
        first = self.near[:, :, 0, :1]
        weights = self.weights.new_zeros((*first.shape[:2], count))
        weights.scatter_add_(2, (self.near.flatten(2) - first), self._mean_weights())
        return (first + torch.arange(count, device=first.device)).minimum(self.size.view(-1, 1, 1) - 1), weights

    def separate(self) -> tuple[Tensor, Tensor]:
        """Returns neighbours and mean weights (r, P, K) of bins, two for each line."""
        return self.near.flatten(2), self._mean_weights()

    def _mean_weights(self) -> Tensor:
        return self.weights.flatten(2) / self.grid.view(-1, 1, 1)


@dataclass(frozen=True)
class _Sampled:
    """Some RoIs, level by level, and their sampling lines.

    members: int64 (r,), indices among all RoIs. levels, images: int64 (r,). numbers: dtype of the indices of table rows.
    """

    members: Tensor
    levels: Tensor
    images: Tensor
    y: _Axis
    x: _Axis
    numbers: torch.dtype

    def __getitem__(self, chosen: Tensor) -> _Sampled:
        members, levels, images = self.members[chosen], self.levels[chosen], self.images[chosen]
        return _Sampled(members, levels, images, self.y[chosen], self.x[chosen], self.numbers)

    def first_rows(self, near_y: Tensor) -> Tensor:
        """Returns the table rows, (r, ...), of the first pixels of the map's lines `near_y` (r, ...)."""
        shape = (-1, *[1] * (near_y.dim() - 1))
        lines = near_y + (self.images * self.y.size).view(shape)
        return (lines * self.x.size.view(shape)).to(self.numbers)

    def parts(self, rois: int) -> Iterator[tuple[int, slice]]:
        """Yields levels, each with a slice of at most `rois` RoIs on that level."""
        start = 0
        for level, count in enumerate(torch.bincount(self.levels).tolist()):
            for first in range(start, start + count, rois):
                yield level, slice(first, min(first + rois, start + count))
            start += count


def _visiting_order(rois: Tensor, levels: Tensor) -> Tensor:
    """Returns an order of RoIs, int64 (R,), level by level, in which neighbours overlap: bands from left to right and back.

    Their rows are then still in the cache. With a thousand RoIs on the finest level a pass takes a fifth less time in bfloat16
    and a quarter less in float32; results do not depend on it.
    """
    image, x1, y1, x2, y2 = rois.double().unbind(1)
    x, band = (x1 + x2) / 2, ((y1 + y2) / 2).div(BAND, rounding_mode="floor")
    place = (image * 2**20 + band) * 2**20 + torch.where(band % 2 == 0, x, -x)
    order = place.argsort()
    return order[levels[order].argsort(stable=True)]


def _bags(
    features: Sequence[Tensor], rois: Tensor, levels: Tensor, scales: Sequence[float], sampling: Sampling, mode: str
) -> Iterator[_Bags]:
    """Yields all sums, without RoIs that are not finite, too far away, without samples, or of an unknown image or level."""
    exact = rois.to(torch.float64 if features[0].dtype == torch.float64 else torch.float32)
    maps = exact.new_tensor([(scale, f.shape[3], f.shape[2]) for scale, f in zip(scales, features, strict=True)])
    reach = exact[:, 1:].abs() * maps[levels.clamp(0, len(features) - 1), :1]
    usable = (reach <= FARTHEST).all(1) & (exact[:, 0] >= 0) & (exact[:, 0] < features[0].shape[0])
    usable &= (levels >= 0) & (levels < len(features))
    members = torch.nonzero(usable).flatten()
    if not len(members):
        return
    members = members[_visiting_order(rois[members], levels[members])]
    # 32 bits if they suffice: half the memory traffic.
    numbers = torch.int32 if max(f.shape[0] * f.shape[2] * f.shape[3] for f in features) < 2**31 else torch.int64
    split = _sample_bags if mode == "max" else _average_bags
    lines = sampling.sampling_ratio or 2 * int(reach[members].amax()) // sampling.output_size + 1  # at most
    for chunk in torch.split(members, max(1, LINES_PER_CHUNK // lines)):
        y, x = _axes(exact[chunk, 1:], maps[levels[chunk]], sampling)
        sampled = _Sampled(chunk, levels[chunk], exact[chunk, 0].long(), y, x, numbers)
        if not sampling.sampling_ratio:  # boxes without an extent have no samples
            sampled = sampled[torch.nonzero((y.grid > 0) & (x.grid > 0)).flatten()]
        yield from split(sampled, sampling, features[0].dtype)


def _axes(boxes: Tensor, maps: Tensor, sampling: Sampling) -> tuple[_Axis, _Axis]:
    """Returns the sampling lines along y and x of boxes (r, 4), in torchvision's order of arithmetic.

    maps: (r, 3), scale, width and height of each box's map. Lines more than one pixel outside the map have no weight; nearer
    ones take the value at the border.
    """
    scaled = boxes * maps[:, :1] - (0.5 if sampling.aligned else 0.0)
    start, sizes = scaled[:, :2, None, None], (scaled[:, 2:] - scaled[:, :2])[..., None, None]  # (r, axis, bin, line)
    if not sampling.aligned:
        sizes = sizes.clamp(min=1.0)
    bin_size = sizes / sampling.output_size
    fixed = sampling.sampling_ratio
    grid = torch.full_like(bin_size, fixed) if fixed else bin_size.ceil().clamp(min=0)
    bin_index = torch.arange(sampling.output_size, dtype=boxes.dtype, device=boxes.device).view(-1, 1)
    line = torch.arange(fixed or max(1, int(grid.max())), dtype=boxes.dtype, device=boxes.device)
    # Lines that do not exist repeat the last one that does, without weight.
    repeated = line if fixed else torch.minimum(line, (grid - 1).clamp(min=0))
    step = (repeated + 0.5) * bin_size / (fixed or grid.clamp(min=1))
    at = start + bin_index * bin_size + step
    size = maps[:, 1:, None, None]
    counts = (at >= -1.0) & (at <= size)
    if not fixed:
        counts &= line < grid
    last = size - 1
    at = at.clamp(min=0).minimum(last)
    low = at.floor()
    kept = counts.to(boxes.dtype)
    upper = (at - low) * kept
    near, weights = torch.stack((low, (low + 1).minimum(last)), -1).long(), torch.stack((kept - upper, upper), -1)
    grid, size = grid.flatten(1).long(), maps[:, 1:].long()
    x, y = (_Axis(near[:, axis], weights[:, axis], grid[:, axis], size[:, axis]) for axis in (0, 1))
    return y, x


def _average_bags(sampled: _Sampled, sampling: Sampling, dtype: torch.dtype) -> Iterator[_Bags]:
    """Yields one sum per bin: the mean of its samples."""
    for group, (rows, row_weights), (columns, column_weights) in _outer_factors(sampled, sampling):
        neighbours = rows.shape[2] * columns.shape[2]
        factors = (*_repeated(group.first_rows(rows), columns.to(group.numbers)), *_repeated(row_weights, column_weights))
        for level, part in group.parts(max(1, ROWS_PER_CHUNK // (sampling.output_size**2 * neighbours))):
            at_y, at_x, weight_y, weight_x = (f[part] for f in factors)
            weights = (weight_y * weight_x).to(dtype)
            yield _Bags(level, group.members[part], (at_y + at_x).view(-1, neighbours), weights.view(-1, neighbours))


def _repeated(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns values along the axes, (r, P, Ky) and (r, P, Kx), as (r, P, 1, Ky*Kx) and (r, 1, P, Ky*Kx), which broadcast to
    the neighbours of each bin.

    They are written to memory first, because torch is slow if its innermost loops are short.
    """
    rois, bins, count_y = y.shape
    count_x = x.shape[2]
    rows = y[..., None].expand(rois, bins, count_y, count_x).reshape(rois, bins, 1, -1)
    return rows, x[:, :, None].expand(rois, bins, count_y, count_x).reshape(rois, 1, bins, -1)


def _outer_factors(
    sampled: _Sampled, sampling: Sampling
) -> Iterator[tuple[_Sampled, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Yields groups of RoIs with equal numbers of neighbours along y and x, and neighbours and weights (r, P, K) of both."""
    if sampling.sampling_ratio:
        yield sampled, sampled.y.separate(), sampled.x.separate()
        return
    # Samples are at most a pixel apart here. Counts are rounded up to even numbers, so that there are few groups.
    counts = (torch.stack((sampled.y.spans(), sampled.x.spans()), dim=1) + 1) // 2 * 2
    for count_y, count_x in torch.unique(counts, dim=0).tolist():
        group = sampled[torch.nonzero((counts == counts.new_tensor((count_y, count_x))).all(1)).flatten()]
        yield group, group.y.merged(count_y), group.x.merged(count_x)


def _sample_bags(sampled: _Sampled, sampling: Sampling, dtype: torch.dtype) -> Iterator[_Bags]:
    """Yields one sum of four corners per sample, for groups of RoIs with equal numbers of samples."""
    grids = torch.stack((sampled.y.grid, sampled.x.grid), dim=1)
    bins = sampling.output_size
    for lines_y, lines_x in torch.unique(grids, dim=0).tolist():
        group = sampled[torch.nonzero((grids == grids.new_tensor((lines_y, lines_x))).all(1)).flatten()]
        rows, columns = group.first_rows(group.y.near[:, :, :lines_y]), group.x.near[:, :, :lines_x].to(group.numbers)
        weights = group.y.weights[:, :, :lines_y], group.x.weights[:, :, :lines_x]
        y_shape, x_shape = (-1, bins, 1, lines_y, 1, 2, 1), (-1, 1, bins, 1, lines_x, 1, 2)
        for level, part in group.parts(max(1, ROWS_PER_CHUNK // (4 * bins**2 * lines_y * lines_x))):
            table_rows = rows[part].reshape(y_shape) + columns[part].reshape(x_shape)
            products = weights[0][part].reshape(y_shape) * weights[1][part].reshape(x_shape)
            yield _Bags(level, group.members[part], table_rows.reshape(-1, 4), products.reshape(-1, 4).to(dtype))


def _average_backward(grad_table: Tensor, features: Sequence[Tensor], bags: Iterator[_Bags], bins: int) -> list[Tensor]:
    """Returns the gradients for the mean, the bag transposed: every row of a level sums the bins that read it."""
    entries: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in features]
    for some in bags:
        outputs = _outputs(some, bins).to(some.rows.dtype)[:, None].expand_as(some.rows)
        entries[some.level].append((some.rows.flatten(), outputs.flatten(), some.weights.flatten()))
    return [_transposed_bag(grad_table, e, f.shape) for e, f in zip(entries, features, strict=True)]


def _max_backward(grad_table: Tensor, features: Sequence[Tensor], bags: Iterator[_Bags], bins: int) -> list[Tensor]:
    """Returns the gradients for the maximum: that of a bin goes to its largest sample, and from there to its four corners."""
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
    """Returns the gradient (B, C, H, W) of a level: every table row sums the bins that read it, found by sorting by row."""
    table_rows = shape[0] * shape[2] * shape[3]
    if not entries:
        return _as_level(grad_table.new_zeros((table_rows, shape[1])), shape)
    rows, outputs, weights = (torch.cat(parts) for parts in zip(*entries, strict=True))
    rows, order = rows.sort(stable=True)
    starts = torch.searchsorted(rows, torch.arange(table_rows, dtype=rows.dtype, device=rows.device)).to(outputs.dtype)
    weights = weights[order].to(grad_table.dtype)
    return _as_level(F.embedding_bag(outputs[order], grad_table, starts, per_sample_weights=weights, mode="sum"), shape)


def _table(feature: Tensor) -> Tensor:
    """Returns (B, C, H, W) as (B*H*W, C): a view of channels-last memory, otherwise a copy.

    Not by `reshape`, which returns a transposed view for a single image: the bag reads that one number at a time.
    """
    return feature.permute(0, 2, 3, 1).contiguous().view(-1, feature.shape[1])


def _as_level(table: Tensor, shape: torch.Size) -> Tensor:
    """Returns (B*H*W, C) as (B, C, H, W) in channels_last memory."""
    batch, channels, height, width = shape
    return table.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _sum_bags(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Returns weighted sums of table rows, (n, C). rows, weights: (n, k)."""
    return F.embedding_bag(rows, table, per_sample_weights=weights.to(table.dtype), mode="sum")


def _outputs(bags: _Bags, bins: int) -> Tensor:
    """Returns the row indices, int64 (r * P * P,), of the RoIs' bins in the pooled table."""
    return (bags.members[:, None] * bins + torch.arange(bins, device=bags.members.device)).view(-1)


def _copy_rows(target: Tensor, members: Tensor, values: Tensor) -> None:
    """Copies `values` to the RoIs `members` of `target` (R, ...), in wide elements, because indexing costs time per element."""
    rows, source = target.view(len(target), -1), values.view(len(members), -1)
    _widened(rows, rows.shape[1])[members] = _widened(source, rows.shape[1])


def _widened(values: Tensor, together: int) -> Tensor:
    """Returns a view with the widest elements that divide groups of `together` values along the last axis."""
    for wide in (torch.complex128, torch.int64, torch.int32):
        if together * values.element_size() % wide.itemsize == 0:
            return values.view(wide)
    return values
