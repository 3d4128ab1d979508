"""Results and targets of the detector for one image: `Instances` and `Target`.

Shape letters: N detections, G ground-truth instances, K keypoints, H x W pixels of the original image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from masklake.model.masks.bit_masks import BitMasks


@dataclass(frozen=True)
class Instances:
    """Detections in one image, best score first, on the host.

    boxes: float32 (N, 4), xyxy in pixels of the original image. scores: float32 (N,) in 0..1. labels: int64 (N,), category ids
    of the data set. rles: N COCO compressed counts (of size `size`), or None if no masks were requested. areas: int64 (N,),
    mask pixels, or None without masks. keypoints: float32 (N, K, 3) as x, y (original pixels) and score, or None without a
    keypoint head; rows of categories without keypoints are NaN.
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

    boxes: float32 (G, 4), xyxy in pixels of the image. labels: int64 (G,), category ids of the data set. masks: uint8 (G, H, W)
    of 0 and 1, or `BitMasks` (which also know the instances without a mask: these train everything but the mask branch), or
    None if the model has no mask head. keypoints: float32 (G, K, 3) as x, y, visibility (0 absent, 1 hidden, 2 visible), or
    None without a keypoint head; rows of categories or instances without keypoints are zeros. proposals: float32 (P, 4), xyxy
    in the same pixels: regions for a detector that is trained alone (`MaskRCNN.set_trained_part`), or None to use the model's
    own RPN.
    """

    boxes: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor | BitMasks | None = None
    keypoints: torch.Tensor | None = None
    proposals: torch.Tensor | None = None
