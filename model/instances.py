"""What the detector finds in one image (`Instances`) and what it learns from (`Target`).

Shape letters: N detections, G ground-truth instances, K keypoints, H x W the original image's pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from masklake.model.masks.bit_masks import BitMasks


@dataclass(frozen=True)
class Instances:
    """Detections of one image, best score first, on the host.

    boxes: float32 (N, 4), xyxy in the original image's pixels. scores: float32 (N,) in 0..1.
    labels: int64 (N,), the data set's own category ids.
    rles: N COCO compressed counts (their size is ``size``), or None where no mask was asked for.
    areas: int64 (N,), mask pixels, or None without masks.
    keypoints: float32 (N, K, 3) as x, y (original pixels) and score, or None without a keypoint head; rows of categories
    that have no keypoints are NaN.
    """

    size: tuple[int, int]
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    rles: list[bytes] | None = None
    areas: NDArray[np.int64] | None = None
    keypoints: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Target:
    """Ground truth of one training image, without crowd regions.

    boxes: float32 (G, 4), xyxy in the pixels of the image it comes with. labels: int64 (G,), the data set's own category ids.
    masks: uint8 (G, H, W) of 0 and 1, the same packed (which also says which instances have none: they train everything but
    the mask branch), or None when the model has no mask head.
    keypoints: float32 (G, K, 3) as x, y, visibility (0 absent, 1 hidden, 2 visible), or None without a keypoint head; rows
    of categories without keypoints are zeros, as are those of instances whose keypoints nobody marked.
    proposals: float32 (P, 4), xyxy in the same pixels: regions for a detector that learns alone (`MaskRCNN.learn`), or None for
    those of the model's own RPN.
    """

    boxes: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor | BitMasks | None = None
    keypoints: torch.Tensor | None = None
    proposals: torch.Tensor | None = None
