"""Masks pasted into their images and where they change, slow and obvious: one whole image at a time.

The definition that the Triton kernel is tested against: torchvision's `paste_masks_in_image` with a threshold, then the
positions at which runs begin in `pycocotools.mask.encode`. Shape letters: N masks, m mask side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 1  # zero cells around the mask before it is resized


def mask_edges_reference(
    masks: Tensor, boxes: Tensor, sizes: Tensor, threshold: float, widest: int, room: int
) -> tuple[Tensor, Tensor]:
    """Pastes every mask into an image of zeros and returns its changes; see `mask_edges` for arguments and results.

    Masks are resized on the CPU for any device: its bits define the result.
    """
    found = [
        _edges(_pasted(mask, box, height, width, threshold))
        for mask, box, (height, width) in zip(masks.float().cpu(), boxes.float().cpu(), sizes.tolist(), strict=True)
    ]
    counts = torch.tensor([len(edges) for edges in found], dtype=torch.int64, device=masks.device)
    listed = torch.cat([torch.zeros(0, dtype=torch.int64), *found])[:room]
    return counts, F.pad(listed, (0, room - len(listed))).to(masks.device)


def _pasted(mask: Tensor, box: Tensor, height: int, width: int, threshold: float) -> Tensor:
    """Returns bool (height, width): one mask (m, m), padded, resized to its enlarged box and thresholded."""
    image = torch.zeros((height, width), dtype=torch.bool)
    grown = _grown(box, len(mask))
    if not bool(torch.isfinite(grown).all()):
        return image
    x0, y0, x1, y1 = (int(edge) for edge in grown)  # towards zero
    left, right, top, bottom = max(x0, 0), min(x1 + 1, width), max(y0, 0), min(y1 + 1, height)
    if left < right and top < bottom:
        pixels = (max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1))
        resized = F.interpolate(F.pad(mask, (PADDING,) * 4)[None, None], pixels, mode="bilinear", align_corners=False)[0, 0]
        image[top:bottom, left:right] = resized[top - y0 : bottom - y0, left - x0 : right - x0] > threshold
    return image


def _grown(box: Tensor, side: int) -> Tensor:
    """Returns a box (4,), enlarged by the ratio of the padded mask to the mask, in float32."""
    x1, y1, x2, y2 = box.unbind()
    scale = (side + 2 * PADDING) / side
    half_w, half_h = (x2 - x1) * 0.5 * scale, (y2 - y1) * 0.5 * scale
    x, y = (x2 + x1) * 0.5, (y2 + y1) * 0.5
    return torch.stack((x - half_w, y - half_h, x + half_w, y + half_h))


def _edges(image: Tensor) -> Tensor:
    """Returns int64 (E,): positions in column-major order at which pixels (H, W) differ from the previous one, first from 0."""
    flat = image.T.reshape(-1)
    return torch.nonzero(flat != torch.cat((flat.new_zeros(1), flat[:-1]))).flatten()
