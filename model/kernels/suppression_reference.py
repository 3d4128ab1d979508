"""Non-maximum suppression within sorted groups, slow and obvious: all overlaps of a group, then one box after another.

The definition that the Triton kernel is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor


def survivors_reference(boxes: Tensor, wanted: Tensor, ends: Tensor, iou: float) -> Tensor:
    """Lets each remaining box suppress the later ones of its group; see `survivors` for arguments and result."""
    alive, first = wanted.cpu().numpy().copy(), 0
    for end in ends.unique().tolist():
        group, here = boxes[first:end], alive[first:end]
        hits = (_overlaps(group) > iou).cpu().numpy()
        for row in range(len(here)):
            if here[row]:
                here[row + 1 :] &= ~hits[row, row + 1 :]
        first = end
    return torch.from_numpy(alive).to(boxes.device)


def _overlaps(boxes: Tensor) -> Tensor:
    """Returns the intersection over union of every pair of boxes (n, 4), float32 (n, n); 0 if both are empty."""
    corner = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    common = (torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - corner).clamp(min=0).prod(dim=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    union = areas[:, None] + areas[None, :] - common
    return common / torch.where(union > 0, union, 1.0)
