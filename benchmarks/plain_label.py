"""The peer of `benchmarks.label`: what a competent engineer writes with Ray Data, torchvision and pycocotools.

Reads a folder of images, runs torchvision's Mask R-CNN in one actor per core, pastes and encodes the masks, writes Parquet.
No manifest, no statuses, no resume: the comparison is about speed, and about equal detections.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import ray
import torch
from torchvision.models.detection import maskrcnn_resnet50_fpn

BATCH = 4  # images


class PlainLabeller:
    """One model replica; images one at a time, since torchvision's result for an image depends on its batch mates."""

    def __init__(self, weights: str) -> None:
        self.model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
        self.model.load_state_dict(torch.load(weights, weights_only=True), strict=False)

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Detections of a batch of images, uint8 RGB (H, W, 3)."""
        rows: dict[str, list[Any]] = {"uri": list(batch["path"]), "boxes": [], "scores": [], "labels": [], "rles": []}
        for image in batch["image"]:
            tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255
            found = self.model([tensor])[0]
            masks = (found["masks"][:, 0] > 0.5).numpy().astype(np.uint8)
            encoded = pycocotools.mask.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
            rows["boxes"].append(found["boxes"].numpy().tolist())
            rows["scores"].append(found["scores"].numpy().tolist())
            rows["labels"].append(found["labels"].numpy().tolist())
            rows["rles"].append([rle["counts"] for rle in encoded])
        return rows


def main() -> None:
    """Label a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images")
    parser.add_argument("output")
    parser.add_argument("--weights", required=True, help="torchvision state dict of maskrcnn_resnet50_fpn")
    parser.add_argument("--actors", type=int, default=2)
    arguments = parser.parse_args()
    # Two more logical CPUs than actors: reading and writing tasks must find room beside the actors.
    ray.init(num_cpus=arguments.actors + 2, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    # Blocks of one batch, two in flight an actor: by default the actor that starts first takes most of a small run.
    blocks = -(-len(list(Path(arguments.images).iterdir())) // BATCH)
    data = ray.data.read_images(arguments.images, include_paths=True, mode="RGB", override_num_blocks=blocks)
    labels = data.map_batches(
        PlainLabeller,
        fn_constructor_args=(arguments.weights,),
        batch_size=BATCH,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=arguments.actors, max_tasks_in_flight_per_actor=2),
    )
    labels.write_parquet(arguments.output)


if __name__ == "__main__":
    main()
