"""Masks to RLE: ours against torchvision's paste and pycocotools' encode, 100 detections of one image.

    python -m benchmarks.rle [--repeats 7]

Prints the table, appends to results/rle.csv and writes a dated report. Both sides start from the same mask probabilities
and boxes and must end with the same bytes.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import pycocotools.mask as coco_mask
import torch
import torch.nn.functional as F
from torchvision.models.detection.roi_heads import paste_masks_in_image

from benchmarks.record import record, report, side_by_side, table
from masklake.model.masks.rle import encode_boxed_masks

DETECTIONS = 100
SIZES = ((800, 1333), (3000, 4000))


def detections(size: tuple[int, int], seed: int = 0, count: int = DETECTIONS) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask probabilities (N, 28, 28) of blobs with ragged borders, and boxes (N, 4) inside the image.

    The boxes' scale (root of the area) is spread evenly in its logarithm from 4% to 70% of the image's, their aspect ratio
    from 0.4 to 2.5: a mean area of about 8% of the image.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    uniform = torch.rand(4, count, generator=generator)
    scale = math.sqrt(height * width) * torch.exp(torch.lerp(torch.tensor(0.04).log(), torch.tensor(0.7).log(), uniform[0]))
    aspect = torch.exp((uniform[1] * 2 - 1) * math.log(2.5))
    box_w, box_h = (scale * aspect.sqrt()).clamp(max=width - 2), (scale / aspect.sqrt()).clamp(max=height - 2)
    x, y = uniform[2] * (width - box_w), uniform[3] * (height - box_h)
    axis = torch.linspace(-1, 1, 28)
    radii = 0.6 + 0.4 * torch.rand(2, count, 1, 1, generator=generator)
    distance = (axis[None, None, :] / radii[0]) ** 2 + (axis[None, :, None] / radii[1]) ** 2
    ragged = F.interpolate(torch.randn(count, 1, 7, 7, generator=generator), size=28, mode="bicubic")[:, 0]
    return (6 * (1 - distance) + 2 * ragged).sigmoid(), torch.stack((x, y, x + box_w, y + box_h), dim=1)


def paste_and_encode(probs: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> list[bytes]:
    """The usual way: every mask pasted into the image, then encoded."""
    pasted = (paste_masks_in_image(probs[:, None], boxes, size) > 0.5)[:, 0].cpu().numpy().astype(np.uint8)
    return [coco_mask.encode(np.asfortranarray(mask))["counts"] for mask in pasted]


def measure(size: tuple[int, int], repeats: int) -> dict[str, object]:
    """One row: medians of both, their ratio, and how many of the masks have the same bytes."""
    probs, boxes = detections(size)
    same = sum(
        a == b for a, b in zip(encode_boxed_masks(probs, boxes, size)[0], paste_and_encode(probs, boxes, size), strict=True)
    )
    timings = side_by_side(
        {
            "ours": lambda: encode_boxed_masks(probs, boxes, size),
            "peer": lambda: paste_and_encode(probs, boxes, size),
        },
        repeats,
    )
    ours, peer = timings["ours"], timings["peer"]
    return {
        "image": f"{size[0]}x{size[1]}",
        "detections": DETECTIONS,
        "identical": f"{same}/{DETECTIONS}",
        "ours_ms": f"{ours.median * 1e3:.2f}",
        "ours_spread": f"{ours.spread:.0%}",
        "paste_pycocotools_ms": f"{peer.median * 1e3:.1f}",
        "peer_spread": f"{peer.spread:.0%}",
        "ratio": f"{peer.median / ours.median:.1f}",
    }


def main() -> None:
    """Measure both image sizes, print, record and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="measured runs of each side")
    repeats = parser.parse_args().repeats
    rows = [measure(size, repeats) for size in SIZES]
    print(table(rows))
    for row in rows:
        record("rle", row)
    print(f"report: {report('rle', 'Masks to RLE: box regions against paste and pycocotools', rows).name}")


if __name__ == "__main__":
    main()
