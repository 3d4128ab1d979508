"""From COCO rows to training batches: fetched, decoded, augmented, and turned into what the model takes.

A sample's augmentation follows from (seed, epoch, row): the same on any number of workers, and after a resume. Their order is
`pipeline.training.stream`'s business.

Between loader and trainer a mask travels as run lengths: 100 masks of 640 x 480 are 30 MB as bytes, 30 kB as runs.
Shape letters: G instances, K keypoints, H x W pixels of the image that the model gets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pycocotools.mask
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from masklake.model.config import Category
from masklake.model.instances import Target
from masklake.model.masks.bit_masks import BitMasks
from masklake.model.masks.rle import decode_columns
from masklake.pipeline.coco.dataset import CocoDataset, learnable, to_rle
from masklake.pipeline.coco.image_check import wrong_size
from masklake.pipeline.coco.values import Segmentation
from masklake.pipeline.errors import AnnotationError, EmptyInputError, StorageError
from masklake.pipeline.images.decode import DecodeLimits, decode
from masklake.pipeline.images.fetch import fetch_patiently
from masklake.pipeline.images.status import Status
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import relative_to
from masklake.pipeline.training.proposals import proposals_of

REPLACEMENTS = 20
"""Other images that are tried in the place of one that cannot be used: with half of them bad, one in a million tries fails."""

SAMPLE_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("error", pa.string()),  # why the image cannot be used; then the rest is empty
        ("unreachable", pa.bool_()),  # whether that is the storage's fault and not the image's
        ("replaced", pa.list_(pa.string())),  # images that could not be used, with reasons, in whose place this one is
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("pixels", pa.large_binary()),  # uint8 (3, H, W)
        ("boxes", pa.list_(pa.float32())),  # G x (x1, y1, x2, y2)
        ("labels", pa.list_(pa.int64())),
        ("rles", pa.list_(pa.binary())),
        ("keypoints", pa.list_(pa.float32())),  # G x K x (x, y, visibility)
        ("proposals", pa.list_(pa.float32())),  # P x (x1, y1, x2, y2), or null where the model makes its own
    ]
)


MOST_CROP = 65_536
Scale = Annotated[float, Field(ge=1 / 32, le=32)]
"""Factors of an image's sides: a thousandfold in memory is the most that can be meant."""


class Augmentation(BaseModel):
    """What training changes in an image; the mirror exchanges left and right keypoints."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    flip: bool = Field(default=True, description="Mirror half of the images left to right.")
    flip_vertical: bool = Field(default=False, description="Mirror half of the images top to bottom (cells, aerial views).")
    crop: int | None = Field(default=None, ge=32, le=MOST_CROP, description="Side of a random window, pixels after scaling.")
    scale: tuple[Scale, Scale] = Field(default=(1.0, 1.0), description="Range of a random enlargement, least and greatest.")

    @field_validator("scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if scale[0] > scale[1]:
            raise ValueError(f"the least, {scale[0]:g}, is above the greatest, {scale[1]:g}: exchange them")
        return scale


@dataclass(frozen=True)
class SampleSpec:
    """What a sample must hold: the model's categories and tasks, and how it is augmented.

    keypoint_offset: pixels from a keypoint's coordinates to the place that is mirrored and resized (the model's own field).
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


class Unreachable(str):
    """Why an image could not be had, where the storage is busy or out of reach: no other image takes its place."""

    __slots__ = ()


@dataclass(frozen=True)
class Sample:
    """One training image and its truth. image: uint8 (3, H, W). rles: compressed counts, b"" for an instance without an
    outline, or None without masks.

    proposals: stored ones, or None where the model makes its own.
    """

    image: torch.Tensor
    boxes: NDArray[np.float32]  # (G, 4) xyxy
    labels: NDArray[np.int64]  # (G,)
    rles: list[bytes] | None
    keypoints: NDArray[np.float32]  # (G, K, 3)
    proposals: NDArray[np.float32] | None = None  # (P, 4) xyxy


def training_rows(
    dataset: CocoDataset, folder: str, spec: SampleSpec, keep_empty: bool = False, proposals: pa.Table | None = None
) -> pa.Table:
    """One row an image: image_id, uri, width, height, annotations (JSON, without crowds), and stored proposals where given.

    Images without an instance are left out unless `keep_empty`; so are instances of which nothing can be learnt
    (`pipeline.coco.dataset.learnable`). proposals: PROPOSAL_SCHEMA rows.
    Raises EmptyInputError when nothing is left to learn from, AnnotationError for an image without its proposals.
    """
    rows, names = [], []
    for image in dataset.images:
        instances = [
            {"category_id": a.category_id, "bbox": a.bbox, "segmentation": a.segmentation, "keypoints": a.keypoints}
            for a in dataset.annotations.get(image.id, ())
            if learnable(a, image)
        ]
        if instances or keep_empty:
            uri = relative_to(folder, image.file_name)
            rows.append((image.id, uri, image.width, image.height, json.dumps(instances)))
            names.append(image.file_name)
    if not rows:
        raise EmptyInputError(f"{dataset.source}: no image has an instance to learn from.")
    columns = ["image_id", "uri", "width", "height", "annotations"]
    table = pa.table([pa.array(column) for column in zip(*rows, strict=True)], names=columns)
    return table if proposals is None else table.append_column("proposals", proposals_of(table, names, proposals))


@dataclass(frozen=True)
class Loader:
    """What a loading task needs: the rows of `training_rows`, how to reach their images, and what to make of them.

    skip_bad: put another image in the place of one that cannot be used.
    """

    rows: pa.Table
    spec: SampleSpec
    storage: Storage
    skip_bad: bool = False

    def load(self, rows: Sequence[int], epochs: Sequence[int]) -> pa.Table:
        """SAMPLE_SCHEMA rows of these rows, as many, augmented as in these epochs; see `load_samples`.

        Which image takes the place of another follows from seed, epoch and row; after `REPLACEMENTS` that cannot be used either
        the row says so.
        """
        samples = self._load(rows, epochs)
        replaced: list[list[str]] = [[] for _ in samples]
        for attempt in range(REPLACEMENTS if self.skip_bad else 0):
            bad = [place for place, (_, sample) in enumerate(samples) if _is_bad(sample)]
            if not bad:
                break
            for place in bad:
                replaced[place].append(str(samples[place][1]))
            others = [self._other(epochs[place], rows[place], attempt) for place in bad]
            for place, sample in zip(bad, self._load(others, [epochs[place] for place in bad]), strict=True):
                samples[place] = sample
        return _to_table(samples, replaced)

    def _load(self, rows: Sequence[int], epochs: Sequence[int]) -> list[tuple[int, Sample | str]]:
        seeds = [(self.spec.seed, epoch, row) for epoch, row in zip(epochs, rows, strict=True)]
        return load_samples(self.rows.take(pa.array(rows, pa.int64())), seeds, self.spec, self.storage)

    def _other(self, epoch: int, row: int, attempt: int) -> int:
        random = np.random.default_rng((self.spec.seed, epoch, row, attempt))
        return int(random.integers(self.rows.num_rows))


def _is_bad(sample: Sample | str) -> bool:
    """Whether an image cannot be used, which another start would not change."""
    return isinstance(sample, str) and not isinstance(sample, Unreachable)


def load_samples(
    rows: pa.Table, seeds: Sequence[tuple[int, int, int]], spec: SampleSpec, storage: Storage
) -> list[tuple[int, Sample | str]]:
    """Numbers and samples of `training_rows` rows, each augmented by its own seed (whose last part is the number).

    For an image that cannot be used the reason stands in its place: an exception would reach the trainer as Ray's, with its
    traceback for a message.
    """
    limits = DecodeLimits()
    fetched = fetch_patiently(storage, rows["uri"].to_pylist(), max_bytes=limits.max_bytes)
    samples: list[tuple[int, Sample | str]] = []
    for row, got, seed in zip(rows.to_pylist(), fetched, seeds, strict=True):
        decoded = decode(got.data, limits) if got.data is not None else None
        reason = got.error if decoded is None else decoded.error
        if decoded is not None and decoded.status is Status.OK and decoded.image is not None:
            reason = wrong_size((decoded.image.shape[2], decoded.image.shape[1]), row)
            if reason is None:
                samples.append((seed[2], _sample_of(row, decoded.image, spec, seed)))
        if reason is not None:
            message = reason if reason.startswith(row["uri"]) else f"{row['uri']}: {reason}"
            samples.append((seed[2], Unreachable(message) if got.may_pass else message))
    return samples


def _sample_of(row: Mapping[str, Any], image: torch.Tensor, spec: SampleSpec, seed: tuple[int, int, int]) -> Sample:
    proposals = row.get("proposals")
    boxes = None if proposals is None else np.array(proposals, np.float64).reshape(-1, 4)
    return make_sample(image, json.loads(row["annotations"]), spec, seed, boxes)


# -- augmentation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """The part of an image that is kept, and how it is changed. left, top, width, height: whole pixels of the image."""

    left: int
    top: int
    width: int
    height: int
    scale: float
    mirror: bool
    upside_down: bool

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result, pixels."""
        return max(1, round(self.height * self.scale)), max(1, round(self.width * self.scale))

    @property
    def zoom(self) -> tuple[float, float]:
        """What x and y are multiplied by: `scale`, but for the rounding to whole pixels."""
        return self.size[1] / self.width, self.size[0] / self.height


def make_sample(
    image: torch.Tensor,
    annotations: Sequence[Mapping[str, Any]],
    spec: SampleSpec,
    seed: tuple[int, ...],
    proposals: NDArray[np.float64] | None = None,
) -> Sample:
    """Image uint8 (3, H, W), its annotation rows and stored proposals, (P, 4) xyxy, as the augmentation leaves them."""
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
    """A random window of an image of `size` (H, W); it shows the middle of some box where there is any."""
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
    """Box, label, counts and keypoints of one instance in the window; None when less than a pixel of it is left.

    The counts are b"" where masks are not learnt, and where the instance has no outline, or one without any pixel.
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
    """Proposals (P, 4) as they lie in the window, in their order; those of which less than a pixel is left are gone."""
    inside = np.clip(boxes - np.array([window.left, window.top] * 2), 0, [window.width, window.height] * 2)
    moved = _mirrored(inside * (window.zoom * 2), window)
    return moved[(moved[:, 2:] - moved[:, :2] >= 1).all(axis=1)].astype(np.float32)


def _outline(annotation: Mapping[str, Any], size: tuple[int, int]) -> bytes | None:
    """Compressed counts of an instance's mask of `size` (H, W); None where it has none, or one thinner than any pixel."""
    segmentation: Segmentation = annotation["segmentation"]
    if segmentation is None:
        return None
    rle = to_rle(segmentation, *size)
    if not pycocotools.mask.area(rle):
        return None
    counts = rle["counts"]
    return counts.encode() if isinstance(counts, str) else counts


def _cut_mask(counts: bytes, size: tuple[int, int], window: Window) -> NDArray[np.uint8]:
    """The window's part of a mask of `size` (H, W). Only its columns are decoded: a large image may hold hundreds of masks."""
    columns = decode_columns(counts, size, (window.left, window.left + window.width))
    cut = columns[window.top : window.top + window.height]
    height, width = window.size
    if cut.shape != (height, width):  # the nearest pixel, by pixel centres
        rows = ((np.arange(height) + 0.5) * cut.shape[0] / height).astype(np.int64)
        columns = ((np.arange(width) + 0.5) * cut.shape[1] / width).astype(np.int64)
        cut = cut[rows[:, None], columns]
    return cut[:: -1 if window.upside_down else 1, :: -1 if window.mirror else 1]


def _bounds(mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    """xyxy of the pixels that are set; the far sides are the last pixels' far edges."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)


def _mirrored(boxes: NDArray[np.float64], window: Window) -> NDArray[np.float64]:
    """Boxes (..., 4) after the window's flips."""
    x1, y1, x2, y2 = np.moveaxis(boxes, -1, 0)
    height, width = window.size
    if window.mirror:
        x1, x2 = width - x2, width - x1
    if window.upside_down:
        y1, y2 = height - y2, height - y1
    return np.stack([x1, y1, x2, y2], axis=-1)


def _move_keypoints(annotation: Mapping[str, Any], window: Window, spec: SampleSpec) -> NDArray[np.float64]:
    """(K, 3), padded with zeros; what leaves the window becomes absent, a mirror exchanges left and right."""
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


# -- across the object store -------------------------------------------------------------------------------------------


def _to_table(samples: Sequence[tuple[int, Sample | str]], replaced: Sequence[list[str]] = ()) -> pa.Table:
    rows = [_to_row(row, sample) for row, sample in samples]
    for row, messages in zip(rows, replaced, strict=False):
        row["replaced"] = messages
    return pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA)


def _to_row(row: int, sample: Sample | str) -> dict[str, Any]:
    if isinstance(sample, str):
        return {"row": row, "error": str(sample), "unreachable": isinstance(sample, Unreachable)}
    return {
        "row": row,
        "height": sample.image.shape[1],
        "width": sample.image.shape[2],
        "pixels": sample.image.numpy().tobytes(),
        "boxes": sample.boxes.ravel(),
        "labels": sample.labels,
        "rles": sample.rles or [],
        "keypoints": sample.keypoints.ravel(),
        "proposals": None if sample.proposals is None else sample.proposals.ravel(),
    }


def replaced_in(batch: pa.Table) -> list[str]:
    """The images, with reasons, that could not be used, and in whose places a batch of SAMPLE_SCHEMA rows has others."""
    return [message for messages in batch["replaced"].to_pylist() for message in messages or ()]


def to_training(batch: pa.Table, spec: SampleSpec) -> tuple[list[torch.Tensor], list[Target]]:
    """What `MaskRCNN.forward` takes, from SAMPLE_SCHEMA rows.

    Raises AnnotationError for an image that cannot be used, StorageError where the storage is busy or out of reach.
    """
    images, targets = [], []
    for row in batch.to_pylist():
        if row["unreachable"]:
            raise StorageError(row["error"])
        if row["error"] is not None:
            raise AnnotationError(f"{row['error']}. Mend or remove it, or leave such images out with --allow-missing.")
        height, width, count = row["height"], row["width"], len(row["labels"])
        images.append(torch.frombuffer(bytearray(row["pixels"]), dtype=torch.uint8).reshape(3, height, width))
        keypoints = torch.tensor(row["keypoints"], dtype=torch.float32).reshape(count, spec.keypoints, 3)
        targets.append(
            Target(
                boxes=torch.tensor(row["boxes"], dtype=torch.float32).reshape(count, 4),
                labels=torch.tensor(row["labels"], dtype=torch.int64),
                masks=_decode_masks(row["rles"], height, width) if spec.masks else None,
                keypoints=keypoints if spec.keypoints else None,
                proposals=_as_boxes(row["proposals"]),
            )
        )
    return images, targets


def _as_boxes(values: Sequence[float] | None) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float32).reshape(-1, 4)


def _decode_masks(rles: Sequence[bytes], height: int, width: int) -> BitMasks:
    """Masks (G, H, W) of compressed counts; b"" is an instance without one."""
    masks = (pycocotools.mask.decode({"size": [height, width], "counts": counts}) if counts else None for counts in rles)
    return BitMasks.of(masks, (height, width), len(rles))
