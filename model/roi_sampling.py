"""Training's view of the ground truth: on the canvas, and as the regions that the second stage learns from (section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.bit_masks import BitMasks
from model.config import ModelConfig
from model.errors import ConfigError
from model.instances import Target
from model.rpn import Regions
from model.sampling import match, sample
from model.transform import Canvas


@dataclass(frozen=True)
class Truth:
    """Ground truth of one image on its canvas; instances without area are gone.

    boxes float32 (G, 4), canvas pixels; classes int64 (G,) from 1; masks (G, H, W) in the image's own pixels, or None;
    keypoints float32 (G, K, 3), canvas pixels, or None; ratio float32 (2,): own pixels per canvas pixel, x and y; proposals
    float32 (P, 4), canvas pixels, or None where none were given.
    """

    boxes: Tensor
    classes: Tensor
    masks: BitMasks | None
    keypoints: Tensor | None
    ratio: Tensor
    proposals: Tensor | None


def truth_on_canvas(targets: Sequence[Target], canvas: Canvas, config: ModelConfig, class_of: Mapping[int, int]) -> list[Truth]:
    """Targets scaled to the canvas; class_of: class by category id.

    Raises ConfigError for a label that is no category of the model, and for targets without what a branch learns from.
    """
    return [_on_canvas(target, ratio.flip(0), config, class_of) for target, ratio in zip(targets, canvas.ratios, strict=True)]


def _on_canvas(target: Target, ratio: Tensor, config: ModelConfig, class_of: Mapping[int, int]) -> Truth:
    device = ratio.device
    _check(target, config, class_of)
    boxes = target.boxes.to(device, torch.float32).reshape(-1, 4) / ratio.repeat(2)
    real = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    classes = torch.tensor([class_of[label] for label in target.labels.tolist()], dtype=torch.int64, device=device)
    masks = keypoints = proposals = None
    if target.proposals is not None:
        proposals = target.proposals.to(device, torch.float32).reshape(-1, 4) / ratio.repeat(2)
    if "mask" in config.tasks and target.masks is not None:
        packed = target.masks if isinstance(target.masks, BitMasks) else BitMasks.pack(target.masks)
        masks = packed.to(device)[real]
    if "keypoint" in config.tasks and target.keypoints is not None:
        scale = torch.cat([ratio, torch.ones_like(ratio[:1])])
        shift = scale.new_tensor([config.keypoint_offset, config.keypoint_offset, 0.0])
        keypoints = ((target.keypoints.to(device, torch.float32) + shift) / scale)[real]
    return Truth(boxes[real], classes[real], masks, keypoints, ratio, proposals)


def _check(target: Target, config: ModelConfig, class_of: Mapping[int, int]) -> None:
    if unknown := sorted(set(target.labels.tolist()) - class_of.keys()):
        raise ConfigError(
            f"target labels {unknown[:5]} are no categories of model {config.preset!r}; "
            "create it with categories=... of the data"
        )
    count = len(target.labels)
    if "mask" in config.tasks and (target.masks is None or len(target.masks) != count):
        raise ConfigError(f"model {config.preset!r} has a mask branch: each target needs masks (G, H, W), one an instance")
    shape = (count, config.num_keypoints, 3)
    if "keypoint" in config.tasks and (target.keypoints is None or target.keypoints.shape != shape):
        raise ConfigError(f"model {config.preset!r} has a keypoint branch: each target needs keypoints of shape {shape}")


@dataclass(frozen=True)
class Samples:
    """Regions in the second stage's losses: positives and negatives 1:3.

    regions: R of them; labels int64 (R,), 0 for background; goals float32 (R, 4): the matched ground truth box (any where
    background); index int64 (R,): the matched instance within its own image, -1 for background; outlined bool (R,): the matched
    instance has a mask to learn from.
    """

    regions: Regions
    labels: Tensor
    goals: Tensor
    index: Tensor
    outlined: Tensor

    def chosen(self, mask: Tensor) -> Samples:
        """Those of `mask`, bool (R,)."""
        rows = torch.where(mask)[0]
        regions = Regions(self.regions.boxes[rows], self.regions.images[rows])
        return Samples(regions, self.labels[rows], self.goals[rows], self.index[rows], self.outlined[rows])


def sample_regions(proposals: Regions, truths: Sequence[Truth], config: ModelConfig) -> Samples:
    """Draw `roi_samples` regions an image from proposals and ground truth; foreground from IoU 0.5 on."""
    boxes, images, labels, goals, indices, outlined = [], [], [], [], [], []
    for image, truth in enumerate(truths):
        candidates = torch.cat([proposals.boxes[proposals.images == image], truth.boxes])
        iou = config.roi_foreground_iou
        matched = match(truth.boxes, candidates, iou, iou, keep_best=False)
        drawn = torch.cat(sample(matched, config.roi_samples, config.roi_positive_fraction))
        index = matched[drawn]
        foreground = index >= 0
        label, goal = torch.zeros_like(index), candidates[drawn].clone()
        label[foreground] = truth.classes[index[foreground]]
        goal[foreground] = truth.boxes[index[foreground]]
        boxes.append(candidates[drawn])
        images.append(torch.full_like(index, image))
        labels.append(label)
        goals.append(goal)
        indices.append(index)
        outlined.append(_outlined(truth, index))
    regions = Regions(torch.cat(boxes), torch.cat(images))
    return Samples(regions, torch.cat(labels), torch.cat(goals), torch.cat(indices), torch.cat(outlined))


def _outlined(truth: Truth, index: Tensor) -> Tensor:
    """bool (R,): whether the instances of `index`, int64 (R,), have masks; False for background."""
    if truth.masks is None or not len(truth.masks):
        return torch.zeros_like(index, dtype=torch.bool)
    return (index >= 0) & truth.masks.known[index.clamp(min=0)]
