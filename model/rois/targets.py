"""Training targets of the second stage: ground truth on the canvas, and the sampled regions (section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from masklake.model.devices import sent, to_host
from masklake.model.errors import ConfigError
from masklake.model.instances import Target
from masklake.model.masks.bit_masks import BitMasks
from masklake.model.proposals.rpn import Regions
from masklake.model.sampling import SampleRule
from masklake.model.transform import Canvas


@dataclass(frozen=True)
class Truth:
    """Ground truth of one image on its canvas, without instances that have no area.

    boxes float32 (G, 4), canvas pixels; classes int64 (G,) from 1; masks (G, H, W) in the image's own pixels, or None;
    keypoints float32 (G, K, 3), canvas pixels, or None; ratio float32 (2,): own pixels per canvas pixel, x and y; proposals
    float32 (P, 4), canvas pixels, or None if none were given.
    """

    boxes: Tensor
    classes: Tensor
    masks: BitMasks | None
    keypoints: Tensor | None
    ratio: Tensor
    proposals: Tensor | None


@dataclass(frozen=True)
class TargetSpec:
    """What a model needs from its targets.

    model: its preset, for messages. class_of: class by category id. masks: whether it has a mask branch. keypoints: K, or 0
    without a keypoint branch. keypoint_offset: pixels from a data set's keypoints to the model's.
    """

    model: str
    class_of: Mapping[int, int]
    masks: bool
    keypoints: int
    keypoint_offset: float


def truth_on_canvas(targets: Sequence[Target], canvas: Canvas, spec: TargetSpec) -> list[Truth]:
    """Returns targets scaled to the canvas.

    Raises ConfigError for a label that is not a category of the model, and for targets without the data that a branch needs.
    """
    ratios = zip(canvas.host_ratios.flip(1), canvas.ratios.flip(1), strict=True)
    return [_on_canvas(target, *ratio, spec) for target, ratio in zip(targets, ratios, strict=True)]


def _on_canvas(target: Target, ratio: Tensor, there: Tensor, spec: TargetSpec) -> Truth:
    """Returns one target on the canvas. ratio: on the host, where instances are selected; there: the same on the device."""
    device = there.device
    _check(target, spec)
    boxes = target.boxes.cpu().float().reshape(-1, 4) / ratio.repeat(2)
    real = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    classes = torch.tensor([spec.class_of[label] for label in target.labels.tolist()], dtype=torch.int64)
    masks = keypoints = proposals = None
    if target.proposals is not None:
        proposals = sent(target.proposals.cpu().float().reshape(-1, 4) / ratio.repeat(2), device)
    if spec.masks and target.masks is not None:
        packed = target.masks if isinstance(target.masks, BitMasks) else BitMasks.pack(target.masks)
        masks = packed.to(real.device)[real].to(device)
    if spec.keypoints and target.keypoints is not None:
        scale = torch.cat([ratio, torch.ones_like(ratio[:1])])
        shift = scale.new_tensor([spec.keypoint_offset, spec.keypoint_offset, 0.0])
        keypoints = sent(((target.keypoints.cpu().float() + shift) / scale)[real], device)
    return Truth(sent(boxes[real], device), sent(classes[real], device), masks, keypoints, there, proposals)


def _check(target: Target, spec: TargetSpec) -> None:
    if unknown := sorted(set(target.labels.tolist()) - spec.class_of.keys()):
        raise ConfigError(
            f"target labels {unknown[:5]} are not categories of model {spec.model!r}; create it with categories=... of the data"
        )
    count = len(target.labels)
    if spec.masks and (target.masks is None or len(target.masks) != count):
        raise ConfigError(f"model {spec.model!r} has a mask branch: each target needs masks (G, H, W), one per instance")
    shape = (count, spec.keypoints, 3)
    if spec.keypoints and (target.keypoints is None or target.keypoints.shape != shape):
        raise ConfigError(f"model {spec.model!r} has a keypoint branch: each target needs keypoints of shape {shape}")


@dataclass(frozen=True)
class Samples:
    """The regions in the losses of the second stage: positives and negatives 1:3.

    regions: R of them; labels int64 (R,), 0 for background; goals float32 (R, 4): the matched ground truth box (any value for
    background). On the host: images int64 (R,) of the regions; classes int64 (R,), the labels; index int64 (R,): the matched
    instance within its own image, -1 for background; outlined bool (R,): the matched instance has a mask.
    """

    regions: Regions
    labels: Tensor
    goals: Tensor
    images: Tensor
    classes: Tensor
    index: Tensor
    outlined: Tensor

    def rows(self, mask: Tensor) -> Tensor:
        """Returns the rows where `mask`, bool (R,) on the host, is true: int64 on the device."""
        return sent(torch.where(mask)[0], self.labels.device)

    def chosen(self, mask: Tensor) -> Samples:
        """Returns the samples of `mask`, bool (R,) on the host."""
        rows = self.rows(mask)
        regions = Regions(self.regions.boxes[rows], self.regions.images[rows])
        host = (self.images[mask], self.classes[mask], self.index[mask], self.outlined[mask])
        return Samples(regions, self.labels[rows], self.goals[rows], *host)


def sample_regions(proposals: Regions, truths: Sequence[Truth], rule: SampleRule) -> Samples:
    """Returns regions of each image, sampled from proposals and ground truth."""
    candidates = [
        torch.cat([boxes, truth.boxes]) for boxes, truth in zip(_by_image(proposals, len(truths)), truths, strict=True)
    ]
    matches = [rule.match(truth.boxes, boxes, keep_best=False) for truth, boxes in zip(truths, candidates, strict=True)]
    drawn = [torch.cat(pair) for pair in rule.sample(matches)]
    indices = [matched[rows] for matched, rows in zip(matches, drawn, strict=True)]
    images = torch.arange(len(truths)).repeat_interleave(torch.tensor([len(rows) for rows in drawn]))
    boxes = torch.cat([boxes[rows] for boxes, rows in zip(candidates, drawn, strict=True)])
    labels, goals, outlined = (
        torch.cat([part[index + 1] for part, index in zip(parts, indices, strict=True)])
        for parts in zip(*[_with_background(truth) for truth in truths], strict=True)
    )
    classes, index, known = to_host(labels, torch.cat(indices), outlined)
    return Samples(Regions(boxes, sent(images, boxes.device)), labels, goals, images, classes, index, known)


def _by_image(proposals: Regions, count: int) -> tuple[Tensor, ...]:
    """Returns the boxes of each image."""
    numbers = torch.arange(count, device=proposals.images.device)
    return proposals.boxes.split((proposals.images == numbers[:, None]).sum(dim=1).tolist())


def _with_background(truth: Truth) -> tuple[Tensor, Tensor, Tensor]:
    """Returns class, box, and whether there is a mask, of the background (row 0) and of each instance."""
    known = torch.zeros_like(truth.classes, dtype=torch.bool) if truth.masks is None else truth.masks.known
    parts = (truth.classes, truth.boxes, known)
    classes, boxes, known = (torch.cat([part.new_zeros(1, *part.shape[1:]), part]) for part in parts)
    return classes, boxes, known
