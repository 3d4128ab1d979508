"""Augmentation: makes a training sample of a random window of an image and its annotations.

The augmentation of a sample depends only on (seed, epoch, row): it is the same for any number of workers, and after a resume.
Shape letters: G instances, K keypoints, P proposals, H x W pixels of the sample's image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, field_validator

from masklake.model.config import Category
from masklake.model.masks.rle import decode_columns
from masklake.pipeline.coco.document import to_rle
from masklake.pipeline.coco.values import Segmentation
from masklake.pipeline.training.fields import AugmentationFields


class Augmentation(BaseModel, AugmentationFields, frozen=True):
    """Random changes to training images. Mirroring swaps left and right keypoints."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if scale[0] > scale[1]:
            raise ValueError(f"the minimum, {scale[0]:g}, is above the maximum, {scale[1]:g}: exchange them")
        return scale


@dataclass(frozen=True)
class SampleSpec:
    """What a sample contains: the model's categories and tasks, and how it is augmented.

    masks: whether it has masks. keypoints: K. seed: of all random choices. keypoint_offset: pixels from a keypoint's
    coordinates to the point that is mirrored and resized (`ModelConfig.keypoint_offset`).
    """

    categories: tuple[Category, ...]
    masks: bool
    keypoints: int
    augmentation: Augmentation
    seed: int
    keypoint_offset: float = 0.0

    @property
    def by_id(self) -> dict[int, Category]:
        """Categories by their id in the annotations."""
        return {category.id: category for category in self.categories}


@dataclass(frozen=True)
class Sample:
    """One training image and its ground truth.

    image: uint8 RGB (3, H, W). boxes: (G, 4), xyxy in its pixels. labels: (G,), category ids. rles: compressed counts, b"" for
    an instance without an outline; None without masks. keypoints: (G, K, 3) as x, y, visibility. proposals: stored proposals,
    (P, 4), xyxy; None if the model computes its own.
    """

    image: torch.Tensor
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    rles: list[bytes] | None
    keypoints: NDArray[np.float32]
    proposals: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Window:
    """The part of an image that a sample shows, and its changes. left, top, width, height: whole pixels of the image."""

    left: int
    top: int
    width: int
    height: int
    scale: float
    mirror: bool
    upside_down: bool

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result, in pixels."""
        return max(1, round(self.height * self.scale)), max(1, round(self.width * self.scale))

    @property
    def zoom(self) -> tuple[float, float]:
        """Factors for x and y: `scale`, but rounded so that the result has whole pixels."""
        return self.size[1] / self.width, self.size[0] / self.height


def make_sample(
    image: torch.Tensor,
    annotations: Sequence[Mapping[str, Any]],
    spec: SampleSpec,
    seed: tuple[int, ...],
    proposals: NDArray[np.float64] | None = None,
) -> Sample:
    """Returns the augmented sample of an image.

    image: uint8 RGB (3, H, W). annotations: category_id, bbox (x, y, width, height), segmentation and keypoints each, as in
    COCO. seed: of this sample. proposals: stored proposals, (P, 4), xyxy in pixels of the image.
    """
    random = np.random.default_rng(seed)
    boxes = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    window = choose_window((image.shape[1], image.shape[2]), boxes, spec.augmentation, random)
    instances = [_instance(a, box, window, image, spec) for a, box in zip(annotations, boxes, strict=True)]
    kept = [instance for instance in instances if instance is not None]
    return Sample(
        image=_cut_image(image, window),
        boxes=np.array([box for box, _, _, _ in kept], np.float32).reshape(-1, 4),
        labels=np.array([label for _, label, _, _ in kept], np.int64),
        rles=[rle for _, _, rle, _ in kept] if spec.masks else None,
        keypoints=np.array([points for _, _, _, points in kept], np.float32).reshape(len(kept), spec.keypoints, 3),
        proposals=None if proposals is None else _move_proposals(proposals, window),
    )


def choose_window(
    size: tuple[int, int], boxes: NDArray[np.float64], augmentation: Augmentation, random: np.random.Generator
) -> Window:
    """Returns a random window of an image of `size` (H, W). It contains the centre of a box if there is any."""
    scale = float(np.exp(random.uniform(*np.log(augmentation.scale))))
    mirror = augmentation.flip and bool(random.random() < 0.5)
    upside_down = augmentation.flip_vertical and bool(random.random() < 0.5)
    side = max(1, round(augmentation.crop / scale)) if augmentation.crop else max(size)
    shape = np.minimum(side, size)
    corner = random.integers(np.array(size) - shape + 1)  # top, left
    middles = ((boxes[:, :2] + boxes[:, 2:]) / 2)[:, ::-1]  # y, x
    if len(boxes) and not ((middles >= corner) & (middles <= corner + shape)).all(axis=1).any():
        middle = np.clip(random.choice(middles), 0, size)
        lowest, highest = np.maximum(0, np.ceil(middle - shape)), np.minimum(middle, np.array(size) - shape)
        corner = random.integers(lowest.astype(int), highest.astype(int) + 1)
    return Window(int(corner[1]), int(corner[0]), int(shape[1]), int(shape[0]), scale, mirror, upside_down)


def _cut_image(image: torch.Tensor, window: Window) -> torch.Tensor:
    cut = image[:, window.top : window.top + window.height, window.left : window.left + window.width]
    if window.size != (window.height, window.width):
        resized = torch.nn.functional.interpolate(cut[None].float(), window.size, mode="bilinear", antialias=True)
        cut = resized[0].round_().clamp_(0, 255).to(torch.uint8)
    axes = [axis for axis, flip in ((1, window.upside_down), (2, window.mirror)) if flip]
    return cut.flip(axes).contiguous() if axes else cut.contiguous()


def _instance(
    annotation: Mapping[str, Any], box: NDArray[np.float64], window: Window, image: torch.Tensor, spec: SampleSpec
) -> tuple[NDArray[np.float64], int, bytes, NDArray[np.float64]] | None:
    """Returns box, label, counts and keypoints of an instance in the window; None if less than a pixel of it is left.

    The counts are b"" if masks are not trained, or if the instance has no outline or one without any pixel.
    """
    inside = box - np.array([window.left, window.top] * 2)
    clipped = np.clip(inside, 0, [window.width, window.height] * 2)
    if (clipped[2:] <= clipped[:2]).any():
        return None
    moved, counts = _mirrored(clipped * (window.zoom * 2), window), b""
    outline = _outline(annotation, (image.shape[1], image.shape[2])) if spec.masks else None
    if outline is not None:
        mask = _cut_mask(outline, (image.shape[1], image.shape[2]), window)
        if not mask.any():
            return None
        counts = pycocotools.mask.encode(np.asfortranarray(mask))["counts"]
        if not np.array_equal(clipped, inside):
            moved = _bounds(mask)  # the visible part's own box: the clipped one may be mostly empty
    if (moved[2:] - moved[:2] < 1).any():
        return None
    return moved, annotation["category_id"], counts, _move_keypoints(annotation, window, spec)


def _move_proposals(boxes: NDArray[np.float64], window: Window) -> NDArray[np.float32]:
    """Returns the proposals (P, 4) in the window, in order, without those of which less than a pixel is left."""
    inside = np.clip(boxes - np.array([window.left, window.top] * 2), 0, [window.width, window.height] * 2)
    moved = _mirrored(inside * (window.zoom * 2), window)
    return moved[(moved[:, 2:] - moved[:, :2] >= 1).all(axis=1)].astype(np.float32)


def _outline(annotation: Mapping[str, Any], size: tuple[int, int]) -> bytes | None:
    """Returns the compressed counts of an instance's mask of `size` (H, W); None if it has none, or one thinner than a
    pixel.
    """
    segmentation: Segmentation = annotation["segmentation"]
    if segmentation is None:
        return None
    rle = to_rle(segmentation, *size)
    if not pycocotools.mask.area(rle):
        return None
    counts = rle["counts"]
    return counts.encode() if isinstance(counts, str) else counts


def _cut_mask(counts: bytes, size: tuple[int, int], window: Window) -> NDArray[np.uint8]:
    """Returns the window's part of a mask of `size` (H, W). Only its columns are decoded: a large image may hold hundreds of
    masks.
    """
    columns = decode_columns(counts, size, (window.left, window.left + window.width))
    cut = columns[window.top : window.top + window.height]
    height, width = window.size
    if cut.shape != (height, width):  # the nearest pixel, by pixel centres
        rows = ((np.arange(height) + 0.5) * cut.shape[0] / height).astype(np.int64)
        columns = ((np.arange(width) + 0.5) * cut.shape[1] / width).astype(np.int64)
        cut = cut[rows[:, None], columns]
    return cut[:: -1 if window.upside_down else 1, :: -1 if window.mirror else 1]


def _bounds(mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Returns the bounding box (xyxy) of the pixels that are set, up to the far edges of the last pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)


def _mirrored(boxes: NDArray[np.float64], window: Window) -> NDArray[np.float64]:
    """Returns the boxes (..., 4) after the window's flips."""
    x1, y1, x2, y2 = np.moveaxis(boxes, -1, 0)
    height, width = window.size
    if window.mirror:
        x1, x2 = width - x2, width - x1
    if window.upside_down:
        y1, y2 = height - y2, height - y1
    return np.stack([x1, y1, x2, y2], axis=-1)


def _move_keypoints(annotation: Mapping[str, Any], window: Window, spec: SampleSpec) -> NDArray[np.float64]:
    """Returns keypoints (K, 3), padded with zeros. Those outside the window become absent; a mirror image swaps left and
    right.
    """
    moved = np.zeros((spec.keypoints, 3))
    points = np.array(annotation["keypoints"], np.float64).reshape(-1, 3)[: spec.keypoints]
    if not len(points):
        return moved
    offset = spec.keypoint_offset
    x, y = points[:, 0] + offset - window.left, points[:, 1] + offset - window.top
    seen = (points[:, 2] > 0) & (x >= 0) & (y >= 0) & (x <= window.width) & (y <= window.height)
    x = window.width - x if window.mirror else x
    y = window.height - y if window.upside_down else y
    x, y = x * window.zoom[0] - offset, y * window.zoom[1] - offset
    moved[: len(points)] = np.stack([x, y, points[:, 2]], axis=1) * seen[:, None]
    if window.mirror != window.upside_down:
        for left, right in spec.by_id[annotation["category_id"]].flip_pairs:
            moved[[left, right]] = moved[[right, left]]
    return moved
