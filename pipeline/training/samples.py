"""Training samples on their way from the loading tasks to the trainer: as Arrow rows, and as the model's arguments.

Masks are sent as run lengths: 100 masks of 640 x 480 are 30 MB as bytes, and 30 kB as runs. Shape letters: G instances, K
keypoints, P proposals, H x W pixels of the sample's image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pycocotools.mask
import torch

from masklake.model.instances import Target
from masklake.model.masks.bit_masks import BitMasks
from masklake.pipeline.errors import AnnotationError, StorageError
from masklake.pipeline.training.augmentation import Sample, SampleSpec

SAMPLE_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("error", pa.string()),  # why the image cannot be used; then the other columns are empty
        ("unreachable", pa.bool_()),  # whether the storage is at fault and not the image
        ("replaced", pa.list_(pa.string())),  # unusable images, with reasons, that this one replaces
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("pixels", pa.large_binary()),  # uint8 (3, H, W)
        ("boxes", pa.list_(pa.float32())),  # G x (x1, y1, x2, y2)
        ("labels", pa.list_(pa.int64())),
        ("rles", pa.list_(pa.binary())),
        ("keypoints", pa.list_(pa.float32())),  # G x K x (x, y, visibility)
        ("proposals", pa.list_(pa.float32())),  # P x (x1, y1, x2, y2), or null if the model computes its own
    ]
)


class Unreachable(str):
    """The reason for an image that could not be fetched because the storage is busy or out of reach: it is not replaced."""

    __slots__ = ()


def sample_rows(samples: Sequence[tuple[int, Sample | str]], replaced: Sequence[list[str]] = ()) -> pa.Table:
    """Returns SAMPLE_SCHEMA rows for samples with their row numbers. replaced: for each sample, the images that it replaces."""
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
    """Returns the unusable images, with reasons, that other images replace in a batch of SAMPLE_SCHEMA rows."""
    return [message for messages in batch["replaced"].to_pylist() for message in messages or ()]


def to_training(batch: pa.Table, spec: SampleSpec) -> tuple[list[torch.Tensor], list[Target]]:
    """Returns the arguments of `MaskRCNN.forward` for SAMPLE_SCHEMA rows.

    Raises AnnotationError for an image that cannot be used, StorageError if the storage is busy or out of reach.
    """
    images, targets = [], []
    for row in batch.to_pylist():
        if row["unreachable"]:
            raise StorageError(row["error"])
        if row["error"] is not None:
            raise AnnotationError(f"{row['error']}. Fix or remove it, or leave such images out with --allow-missing.")
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
    """Returns the masks (G, H, W) of compressed counts; b"" stands for an instance without a mask."""
    masks = (pycocotools.mask.decode({"size": [height, width], "counts": counts}) if counts else None for counts in rles)
    return BitMasks.of(masks, (height, width), len(rles))
