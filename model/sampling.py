"""Matches anchors or regions with ground truth, and samples those that enter a loss (Ren et al. 2015; section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from masklake.model.boxes import box_iou

BACKGROUND = -1
IGNORED = -2


@dataclass(frozen=True)
class SampleRule:
    """Which boxes of an image enter a loss.

    A box is foreground if its IoU with an object is at least `foreground_iou`, and background if it is below `background_iou`.
    Up to `count` boxes are sampled from each image, at most `positive_fraction` of them foreground.
    """

    foreground_iou: float
    background_iou: float
    count: int
    positive_fraction: float

    def match(self, truth: Tensor, boxes: Tensor, keep_best: bool) -> Tensor:
        """Returns `match` with these thresholds."""
        return match(truth, boxes, self.foreground_iou, self.background_iou, keep_best)

    def sample(self, matched: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Returns `sample` with this count and fraction."""
        return sample(matched, self.count, self.positive_fraction)


def match(truth: Tensor, boxes: Tensor, foreground: float, background: float, keep_best: bool) -> Tensor:
    """Assigns ground truth to boxes by overlap.

    truth: float32 (G, 4); boxes: float32 (N, 4), both xyxy. A box is foreground if its IoU is at least `foreground`, background
    if it is below `background`, and ignored in between. keep_best: boxes that overlap a ground truth most are foreground at any
    IoU above 0. Returns int64 (N,): the index of the ground truth, BACKGROUND or IGNORED.
    """
    if len(truth) == 0 or len(boxes) == 0:
        return torch.full((len(boxes),), BACKGROUND, dtype=torch.int64, device=boxes.device)
    overlap = box_iou(truth, boxes)
    best, index = overlap.max(dim=0)
    matched = index.clone()
    matched[best < foreground] = IGNORED
    matched[best < background] = BACKGROUND
    if keep_best:
        highest = overlap.amax(dim=1, keepdim=True)
        chosen = ((overlap == highest) & (highest > 0)).any(dim=0)
        matched = torch.where(chosen, index, matched)
    return matched


def sample(matched: Sequence[Tensor], count: int, positive_fraction: float) -> list[tuple[Tensor, Tensor]]:
    """Samples up to `count` random boxes of each image, at most `positive_fraction` of them foreground, the rest background.

    matched: for each image int64 (N,) from `match`. Returns, for each image, the indices of the sampled foreground and
    background boxes. The host waits for a GPU twice, for any number of images.
    """
    together = torch.cat(list(matched))
    kinds = torch.stack([together >= 0, together == BACKGROUND])
    sizes = [len(one) for one in matched]
    counts = torch.stack([part.sum(dim=1) for part in kinds.split(sizes, dim=1)], dim=1).tolist()
    places = torch.where(kinds)[1].split(counts[0] + counts[1])  # the foreground of each image, then the background of each
    drawn, start = [], 0
    for size, foreground, background in zip(sizes, places[: len(sizes)], places[len(sizes) :], strict=True):
        positives = min(len(foreground), int(count * positive_fraction))
        negatives = min(len(background), count - positives)
        drawn.append((_draw(foreground - start, positives), _draw(background - start, negatives)))
        start += size
    return drawn


def _draw(indices: Tensor, count: int) -> Tensor:
    return indices[torch.randperm(len(indices), device=indices.device)[:count]]
