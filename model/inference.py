"""Inference (section 3.1 "Inference"): from proposals to detections in host arrays.

Everything on the device uses one table of detections for the whole batch, and a single copy transfers it to the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from masklake.model.boxes import BoxCoder, clip_boxes, has_area, suppress, wide_enough
from masklake.model.config import KeypointScore, ModelConfig, PasteKind, PredictOptions
from masklake.model.devices import constant, sent
from masklake.model.errors import ConfigError
from masklake.model.fields import Task
from masklake.model.heads.keypoint_decoding import decode_heatmaps
from masklake.model.instances import Instances
from masklake.model.masks.rle import encode_boxed_masks, encode_on_device, on_device
from masklake.model.network import Network
from masklake.model.proposals.rpn import Regions
from masklake.model.transform import Canvas, Size

PROPOSALS_AT_ONCE, DETECTIONS_AT_ONCE = 1000, 100
"""Maximum number of regions that a head runs on together on a GPU."""


@dataclass(frozen=True)
class Settings:
    """`PredictOptions` with every None replaced by the model's own value."""

    score_threshold: float
    nms_iou: float
    max_detections: int
    mask_threshold: float
    tasks: frozenset[Task]


def resolve(options: PredictOptions, config: ModelConfig) -> Settings:
    """Returns the settings for `options`. Raises ConfigError for a task that the model has no branch for."""
    box: Task = "box"  # the other branches start from the boxes
    tasks = config.tasks if options.tasks is None else options.tasks | {box}
    if missing := tasks - config.tasks:
        raise ConfigError(
            f"model {config.preset!r} has no branch for {', '.join(sorted(missing))}; "
            f"it answers {', '.join(sorted(config.tasks))}"
        )

    def chosen(name: str) -> float:
        value = getattr(options, name)
        return getattr(config, name) if value is None else value

    return Settings(
        score_threshold=chosen("score_threshold"),
        nms_iou=chosen("nms_iou"),
        max_detections=int(chosen("max_detections")),
        mask_threshold=chosen("mask_threshold"),
        tasks=tasks,
    )


@dataclass(frozen=True)
class Detections:
    """Detections of a batch on the device, sorted by image, best first within each.

    boxes float32 (N, 4), canvas pixels; scores float32 (N,); classes int64 (N,) from 1; images int64 (N,). masks: float32 (N,
    m, m) probabilities or None. keypoints: float32 (N, K, 3), canvas pixels, or None; NaN if the class has none.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    images: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None

    def chosen(self, rows: Tensor) -> Detections:
        """Returns the detections in these rows, int64 (n,)."""
        masks = None if self.masks is None else self.masks[rows]
        keypoints = None if self.keypoints is None else self.keypoints[rows]
        return Detections(self.boxes[rows], self.scores[rows], self.classes[rows], self.images[rows], masks, keypoints)


def propose(network: Network, canvas: Canvas, features: Sequence[Tensor] | None = None) -> Regions:
    """Runs the first stage alone. features: the detector's maps, if already computed."""
    maps = network.proposal_maps(canvas.pixels, features)
    count = len(canvas.sizes)  # blank images may follow
    outputs = [(objectness[:count], deltas[:count]) for objectness, deltas in network.rpn.head(maps)]
    return network.rpn.propose(maps, outputs, canvas.size, canvas.sizes)


def detect(network: Network, canvas: Canvas, config: ModelConfig, settings: Settings) -> Detections:
    """Returns the detections on a canvas: runs both stages, then the other branches on the boxes that remain."""
    features = network.backbone(canvas.pixels)
    proposals = propose(network, canvas, features)
    logits, deltas = classify(network, features, proposals, min(network.rpn.at_inference.in_all, PROPOSALS_AT_ONCE))
    found = select(logits, deltas, proposals, canvas.sizes, network.box_head.coder, config.box_min_side, settings)
    regions, at_once = Regions(found.boxes, found.images), min(settings.max_detections, DETECTIONS_AT_ONCE)
    masks = segment(network, features, regions, found.classes, at_once) if "mask" in settings.tasks else None
    keypoints = None
    if "keypoint" in settings.tasks:
        keypoints = _keypoints(network, features, regions, found.classes, config.keypoint_score, at_once)
    return Detections(found.boxes, found.scores, found.classes, found.images, masks, keypoints)


def classify(network: Network, features: Sequence[Tensor], proposals: Regions, at_once: int) -> tuple[Tensor, Tensor]:
    """Runs the box branch on proposals, `at_once` at a time; returns class logits (R, classes) and deltas (R, classes, 4)."""
    parts = [network.box_head(network.box_input(features, block)) for block in _blocks(proposals, at_once)]
    logits, deltas = (torch.cat(values)[: len(proposals.boxes)] for values in zip(*parts, strict=True))
    return logits, deltas


def segment(network: Network, features: Sequence[Tensor], regions: Regions, classes: Tensor, at_once: int) -> Tensor:
    """Runs the mask branch on regions, `at_once` at a time; returns the masks of their `classes`, int64 (N,), as probabilities,
    float32 (N, m, m).
    """
    logits: list[Tensor] = []
    for block in _blocks(regions, at_once):
        start = at_once * len(logits)
        own = classes[start : start + len(block.boxes)]
        own = functional.pad(own, (0, len(block.boxes) - len(own)))  # blank regions: the mask of any class
        logits.append(network.mask_head(network.mask_input(features, block), own))
    return torch.cat(logits)[: len(classes)].float().sigmoid()


def _blocks(regions: Regions, count: int) -> Iterator[Regions]:
    """Yields the regions on which a head runs together: on a GPU always `count` of them, the last ones filled with blank
    regions.

    A GPU's libraries choose their algorithms by the number of regions, so the last bits of a detection would depend on the
    number of other detections in its batch. On a CPU, where images run one by one, all regions run together.
    """
    if not regions.boxes.is_cuda:
        yield regions
        return
    blank = -len(regions.boxes) % count
    boxes, images = functional.pad(regions.boxes, (0, 0, 0, blank)), functional.pad(regions.images, (0, blank))
    for start in range(0, max(len(boxes), 1), count):
        yield Regions(boxes[start : start + count], images[start : start + count])


def select(
    logits: Tensor, deltas: Tensor, proposals: Regions, sizes: Tensor, coder: BoxCoder, min_side: float, settings: Settings
) -> Detections:
    """Returns the detections for the box branch's output: threshold, suppression within a class, the best of each image.

    logits (R, classes); deltas (R, classes, 4); sizes: float32 (B, 2), height and width of the images on the canvas; coder:
    of the deltas; min_side: canvas pixels, boxes with a shorter side are dropped. Only boxes with a sufficient score are
    decoded.
    """
    scores = logits.float().softmax(dim=1)
    region, label = torch.where(scores[:, 1:] > settings.score_threshold)
    label = label + 1
    images, chosen = proposals.images[region], scores[region, label]
    boxes = clip_boxes(coder.decode(deltas[region, label], proposals.boxes[region]), sizes[images])
    wide = wide_enough(boxes, min_side)
    keep = suppress(boxes, chosen, label, images, settings.nms_iou, wide, settings.max_detections)
    return Detections(boxes[keep], chosen[keep], label[keep], images[keep])


def _keypoints(
    network: Network, features: Sequence[Tensor], regions: Regions, classes: Tensor, score: KeypointScore, at_once: int
) -> Tensor:
    """Returns float32 (N, K, 3) in canvas pixels; the branch runs only on classes that have keypoints."""
    counts = network.keypoint_counts[classes]
    most = network.keypoint_head.keypoints
    keypoints = regions.boxes.new_full((len(classes), most, 3), torch.nan)
    chosen = torch.where(counts > 0)[0]
    if len(chosen):
        some = Regions(regions.boxes[chosen], regions.images[chosen])
        parts = [network.keypoint_head(network.keypoint_input(features, block)) for block in _blocks(some, at_once)]
        logits = torch.cat(parts)[: len(chosen)]
        keypoints[chosen] = sent(decode_heatmaps(logits, some.boxes, score), keypoints.device)
    beyond = torch.arange(most, device=counts.device) >= counts[:, None]
    return keypoints.masked_fill(beyond[:, :, None], torch.nan)


def to_instances(
    found: Detections,
    canvas: Canvas,
    originals: Sequence[Size],
    category_ids: NDArray[np.int64],
    config: ModelConfig,
    threshold: float,
) -> list[Instances]:
    """Returns the detections in pixels of the original images, as host arrays: one copy, and masks as RLE.

    originals: (height, width) of each image; category_ids: int64 (classes,), by class.
    """
    found = _in_originals(found, canvas.ratios, originals, config.keypoint_offset, config.clip_to_image)
    table, encode = _to_host(found, originals, threshold, config.paste)
    images, classes = table[:, 0].long(), table[:, 1].long().numpy()
    counts = torch.bincount(images, minlength=len(originals)).tolist()
    results, start = [], 0
    for count, size in zip(counts, originals, strict=True):
        rows = slice(start, start + count)
        part, start = table[rows], start + count
        rles, areas = encode(rows, size)
        keypoints = None
        if found.keypoints is not None:
            keypoints = part[:, 7 : 7 + math.prod(found.keypoints.shape[1:])].reshape(count, *found.keypoints.shape[1:])
        results.append(
            Instances(
                size=size,
                boxes=part[:, 3:7].contiguous().numpy(),
                scores=part[:, 2].contiguous().numpy(),
                labels=category_ids[classes[rows]],
                rles=rles,
                areas=areas,
                keypoints=None if keypoints is None else keypoints.contiguous().numpy(),
            )
        )
    return results


def _to_host(
    found: Detections, originals: Sequence[Size], threshold: float, paste: PasteKind
) -> tuple[Tensor, Callable[[slice, Size], tuple[list[bytes] | None, NDArray[np.int64] | None]]]:
    """Returns the table of detections on the host, and a function that returns the RLEs and areas of the masks in the rows of
    one image.

    On a GPU all masks are pasted and cut at once and only their edges are copied; elsewhere they are rows of the table.
    """
    masks, table = found.masks, _pack(found)
    if masks is None:
        return table.cpu(), lambda rows, size: (None, None)
    if on_device(masks, paste):
        rles, areas, table = encode_on_device(masks, found.boxes, found.images, originals, threshold, table)
        return table, lambda rows, size: (rles[rows], areas[rows])
    width = table.shape[1]
    table = torch.cat((table, masks.flatten(1)), dim=1).cpu()

    def encode(rows: slice, size: Size) -> tuple[list[bytes], NDArray[np.int64]]:
        probabilities = table[rows, width:].reshape(-1, *masks.shape[1:])
        return encode_boxed_masks(probabilities, table[rows, 3:7].contiguous(), size, threshold, paste)

    return table, encode


def _in_originals(found: Detections, ratios: Tensor, originals: Sequence[Size], offset: float, clip: bool) -> Detections:
    """Returns the detections in pixels of the original images. ratios: of the canvas; originals: (height, width) of each
    image; offset: pixels to subtract from keypoints; clip: whether boxes are clipped to the images.
    """
    ratio = ratios[found.images].flip(1)  # horizontal, vertical: as x and y
    boxes, keypoints = found.boxes * ratio.repeat(1, 2), None
    if found.keypoints is not None:
        scale = torch.cat([ratio, torch.ones_like(ratio[:, :1])], dim=1)
        shift = constant((offset, offset, 0.0), scale.device)
        keypoints = found.keypoints * scale[:, None] - shift
    moved = replace(found, boxes=boxes, keypoints=keypoints)
    if not clip:
        return moved
    sizes = sent(torch.tensor(originals, dtype=boxes.dtype), boxes.device)
    moved = replace(moved, boxes=clip_boxes(boxes, sizes[found.images]))
    return moved.chosen(torch.where(has_area(moved.boxes))[0])


def _pack(found: Detections) -> Tensor:
    """Returns one float32 row per detection: image, class, score, box, then keypoints."""
    columns = [found.images[:, None].float(), found.classes[:, None].float(), found.scores[:, None], found.boxes]
    if found.keypoints is not None:
        columns.append(found.keypoints.flatten(1))
    return torch.cat(columns, dim=1)
