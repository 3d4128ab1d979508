"""Another detector behind the door: torchvision's Mask R-CNN on a small backbone, in one class and its loader.

It stands for a package of its own, which `install` puts into a folder: a checkpoint of format `torchvision-maskrcnn/1` is read
by `load`, an entry point of the group `masklake.detectors`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from masklake.model.config import Category, PredictOptions
from masklake.model.errors import ConfigError
from masklake.model.fields import Task
from masklake.model.instances import Instances

FORMAT = "torchvision-maskrcnn/1"
PIECES = (Category(id=4, name="cup"), Category(id=9, name="plate"))


class TorchvisionDetector:
    """torchvision's model with our categories; it computes in float32 whatever is asked for."""

    categories = PIECES
    tasks: frozenset[Task] = frozenset({"box", "mask"})

    def __init__(self, network: nn.Module, model_id: str) -> None:
        self.network = network
        self.model_id = model_id

    def batch_key(self, size: tuple[int, int]) -> tuple[int, ...]:
        """It pads images of a batch to the largest: only equal ones go together, or their mates would change the answer."""
        return size

    def settings(self, options: PredictOptions) -> Mapping[str, Any]:
        """The one setting that it takes; all others are fixed, and so part of its name."""
        if options.tasks is not None and not options.tasks <= self.tasks:
            raise ConfigError(f"model {self.model_id} has no keypoints")
        return {"score_threshold": 0.05 if options.score_threshold is None else options.score_threshold}

    def predict(self, images: Sequence[Tensor], options: PredictOptions = PredictOptions()) -> list[Instances]:  # noqa: B008
        """One by one."""
        least = self.settings(options)["score_threshold"]
        with torch.inference_mode():
            return [self._instances(self.network([image.float() / 255])[0], image, least) for image in images]

    def _instances(self, found: Mapping[str, Tensor], image: Tensor, least: float) -> Instances:
        keep = found["scores"] >= least
        masks = (found["masks"][keep, 0] > 0.5).byte().permute(1, 2, 0).numpy()
        return Instances(
            size=(image.shape[1], image.shape[2]),
            boxes=found["boxes"][keep].numpy(),
            scores=found["scores"][keep].numpy(),
            labels=np.array([PIECES[label - 1].id for label in found["labels"][keep].tolist()], np.int64),
            rles=[rle["counts"] for rle in pycocotools.mask.encode(np.asfortranarray(masks))],
            areas=masks.sum(axis=(0, 1), dtype=np.int64),
        )


def network() -> nn.Module:
    """A Mask R-CNN of 0.1 million weights, for images of about 64 pixels."""
    backbone = nn.Sequential(nn.Conv2d(3, 16, 7, 4, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
    backbone.out_channels = 32  # type: ignore[assignment]  # as torchvision reads it
    one_map: dict[str, Any] = {"featmap_names": ["0"], "sampling_ratio": 2}
    return MaskRCNN(
        backbone,
        box_head=TwoMLPHead(32 * 7**2, 64),
        box_predictor=FastRCNNPredictor(64, 1 + len(PIECES)),
        mask_head=MaskRCNNHeads(32, (32,), 1),
        mask_predictor=MaskRCNNPredictor(32, 32, 1 + len(PIECES)),
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(output_size=7, **one_map),
        mask_roi_pool=MultiScaleRoIAlign(output_size=14, **one_map),
        rpn_post_nms_top_n_test=50,
        box_detections_per_img=5,
    ).eval()


def checkpoint(seed: int = 0) -> bytes:
    """Seeded weights as a checkpoint of this format."""
    torch.manual_seed(seed)
    return save_tensors(network().state_dict(), metadata={"format": FORMAT})


def load(data: bytes, device: torch.device) -> TorchvisionDetector:
    """The entry point: a checkpoint's bytes to a detector. Its name is a digest of those bytes."""
    model = network()
    model.load_state_dict(load_tensors(data))
    return TorchvisionDetector(model.to(device), f"torchvision-{hashlib.sha256(data).hexdigest()[:12]}")


def install(folder: Path) -> Path:
    """Make `folder`, once it is on `sys.path`, what an installed package of this detector is; returns it."""
    shutil.copy(__file__, folder / "second_detector.py")
    information = folder / "second_detector-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: second-detector\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[masklake.detectors]\n{FORMAT} = second_detector:load\n")
    return folder
