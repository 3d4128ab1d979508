"""Keypoints from heat maps (Mask R-CNN, section 3, "Mask R-CNN for Human Pose Estimation").

Shape letters: N people, K keypoints, S heat map side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_heatmaps(logits: Tensor, boxes: Tensor) -> Tensor:
    """The best position of every keypoint after its heat map is resized to its box (bicubic, torchvision's convention).

    logits: float32 (N, K, S, S). boxes: float32 (N, 4), xyxy in pixels. Returns float32 (N, K, 3): x and y in the boxes'
    pixels and the resized map's logit there. Sides below one pixel count as one.
    """
    points = logits.new_zeros((len(logits), logits.shape[1], 3), dtype=torch.float32)
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    for number, (maps, box, side) in enumerate(zip(logits.float(), boxes, sides, strict=True)):
        columns, rows = side.ceil().int().tolist()
        resized = F.interpolate(maps[:, None], size=(rows, columns), mode="bicubic", align_corners=False)
        score, at = resized.flatten(1).max(dim=1)
        points[number, :, 0] = (at % columns + 0.5) * (side[0] / columns) + box[0]
        points[number, :, 1] = (at // columns + 0.5) * (side[1] / rows) + box[1]
        points[number, :, 2] = score
    return points
