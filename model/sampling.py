"""Which ground truth an anchor or region stands for, and which of them a loss looks at (Ren et al. 2015; section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from model.boxes import box_iou

BACKGROUND = -1
IGNORED = -2


def match(truth: Tensor, boxes: Tensor, foreground: float, background: float, keep_best: bool) -> Tensor:
    """Assign ground truth to boxes by overlap.

    truth: float32 (G, 4); boxes: float32 (N, 4). A box is foreground from IoU `foreground` on, background below
    `background`, ignored between. keep_best: the boxes that overlap a truth most are foreground at any overlap.
    Returns int64 (N,): the truth's index, BACKGROUND or IGNORED.
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
        matched[chosen] = index[chosen]
    return matched


def sample(matched: Tensor, count: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Draw at random up to `count` boxes, at most `positive_fraction` of them foreground, the rest background.

    matched: int64 (N,) of `match`. Returns the indices of the foreground and of the background that were drawn.
    """
    foreground = torch.where(matched >= 0)[0]
    background = torch.where(matched == BACKGROUND)[0]
    positives = min(len(foreground), int(count * positive_fraction))
    negatives = min(len(background), count - positives)
    return _draw(foreground, positives), _draw(background, negatives)


def _draw(indices: Tensor, count: int) -> Tensor:
    return indices[torch.randperm(len(indices), device=indices.device)[:count]]
