"""The interface of a detector, and how it is loaded from a checkpoint.

Labelling, evaluation and proposing use only `Detector` and `load_detector`. `MaskRCNN` is one detector; docs/models.md
("Another detector") shows how to add another.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from masklake.model.config import Category, PredictOptions
from masklake.model.errors import CheckpointError, MaskLakeError
from masklake.model.fields import Task
from masklake.model.instances import Instances
from masklake.model.transform import Size
from masklake.model.weights.checkpoint import FORMAT, load_checkpoint, metadata, read_bytes

GROUP = "masklake.detectors"
"""Group of the entry points that load checkpoints. Their name is the format of a checkpoint, their value a `Loader`."""


class Detector(Protocol):
    """A model that detects instances in images. It is used by one thread at a time."""

    @property
    def model_id(self) -> str:
        """ID of the weights and the configuration, stored in every row of a table.

        Models with the same ID must return the same results. A checkpoint must always have the same ID: under another one,
        every image is labelled again.
        """

    @property
    def categories(self) -> Sequence[Category]:
        """Categories that the model can detect. Their ids are unique; they are the labels of `Instances`."""

    @property
    def tasks(self) -> frozenset[Task]:
        """Tasks of the model: always "box"; "mask" if it returns RLEs, "keypoint" if it returns keypoints."""

    def batch_key(self, size: Size) -> tuple[int, ...]:
        """Returns a key for an image of `size`, (height, width) in pixels: images with equal keys can share a batch.

        Labelling passes images in the order of their keys. A model that batches images of any sizes returns a constant.
        """

    def settings(self, options: PredictOptions) -> Mapping[str, Any]:
        """Returns every setting that changes results, by name, as `predict` uses it; None in `options` is the model's own
        value.

        Values are those of JSON, or sets of them. The names `model_id` and `limits` are reserved. A `precision` of "fp32" is
        equivalent to none. Raises ConfigError for options that this model does not support.
        """

    def predict(self, images: Sequence[Tensor], options: PredictOptions = ...) -> list[Instances]:
        """Returns the instances of each image, in order.

        images: uint8 RGB (3, H, W) of any sizes, on the host. The result of an image must not depend on the other images.
        """


class TwoStageDetector(Detector, Protocol):
    """A detector that also returns its region proposals, for `masklake propose`."""

    def propose(self, images: Sequence[Tensor]) -> list[NDArray[np.float32]]:
        """Returns the proposals of each image: float32 (P, 4), xyxy in pixels of the image, best first. images: as in
        `predict`.
        """


Loader = Callable[[bytes, torch.device], Detector]
"""Returns a detector from the bytes of a checkpoint, ready to predict on the device. Raises CheckpointError for damaged bytes.
"""


def load_detector(source: str | Path | bytes, device: str | torch.device = "cpu") -> Detector:
    """Returns the detector in a checkpoint, ready to predict.

    source: path or bytes of a safetensors file. The `format` in its metadata selects the loader: MaskLake's own, or an entry
    point of the group `masklake.detectors` in an installed package. Nothing in the file is executed or unpickled.

    Raises CheckpointError for a file that cannot be read or has no loader, and the errors of the loader.
    """
    data = read_bytes(source)
    name = "checkpoint" if isinstance(source, bytes) else f"checkpoint {source}"
    mark = metadata(data).get("format")
    if mark in (None, FORMAT):
        return load_checkpoint(data, device, name)
    if (entry := _loader(mark)) is None:
        raise CheckpointError(
            f"{name} is of format {mark!r}, which no installed package reads (this machine reads {', '.join(_formats())}). "
            "Install the package that made it, here and on every worker; weights of torchvision or Detectron2 are converted "
            "by `masklake convert`"
        )
    return _load_with(entry, data, torch.device(device), name)


def has_loader(data: bytes) -> bool:
    """Returns whether `load_detector` knows the format of these bytes."""
    mark = metadata(data).get("format")
    return mark == FORMAT or (mark is not None and _loader(mark) is not None)


def can_propose(model: Detector) -> TypeGuard[TwoStageDetector]:
    """Returns whether the detector returns proposals."""
    return not _lacking(model, TwoStageDetector)


def check_answers(answers: Sequence[Instances], images: Sequence[Tensor], ids: Collection[int]) -> None:
    """Raises ValueError unless there is one valid `Instances` per image, with labels among `ids`.

    Otherwise a fault in a detector of another package would store values beside the wrong instance.
    """
    if len(answers) != len(images):
        raise ValueError(f"the detector gave {len(answers)} answers for {len(images)} images")
    for found, image in zip(answers, images, strict=True):
        _check_answer(found, (image.shape[-2], image.shape[-1]), ids)


def _check_answer(found: Instances, size: Size, ids: Collection[int]) -> None:
    if tuple(found.size) != size:
        raise ValueError(f"the detector's answer has the size {tuple(found.size)}, the image {size}")
    count = len(found.scores)
    kinds: dict[str, tuple[type, tuple[int, ...]]] = {
        "scores": (np.float32, (count,)),
        "boxes": (np.float32, (count, 4)),
        "labels": (np.int64, (count,)),
        "areas": (np.int64, (count,)),
        "keypoints": (np.float32, (count, *getattr(found.keypoints, "shape", ())[1:2], 3)),
    }
    for name, (dtype, shape) in kinds.items():
        part = getattr(found, name)
        if part is None and name in ("areas", "keypoints"):
            continue
        if not isinstance(part, np.ndarray) or part.dtype != dtype or part.shape != shape:
            what = f"{part.dtype} {part.shape}" if isinstance(part, np.ndarray) else type(part).__name__
            raise ValueError(f"the detector's {name} are {what}, not an array of {np.dtype(dtype)} {shape}")
    if found.rles is not None and len(found.rles) != count:
        raise ValueError(f"the detector gave {len(found.rles)} masks for {count} instances")
    if unknown := sorted(set(found.labels.tolist()) - set(ids)):
        raise ValueError(f"the detector's labels {unknown[:5]} are none of its categories")


def _formats() -> list[str]:
    return [FORMAT, *sorted(entry.name for entry in entry_points(group=GROUP))]


def _loader(mark: str) -> EntryPoint | None:
    """Returns the entry point for a format, or None. Raises CheckpointError if two packages have different ones."""
    found = list({entry.value: entry for entry in entry_points(group=GROUP, name=mark)}.values())
    if len(found) > 1:
        values = " and ".join(sorted(entry.value for entry in found))
        raise CheckpointError(f"two installed packages read checkpoints of format {mark!r}: {values}. Remove one of them")
    return found[0] if found else None


def _load_with(entry: EntryPoint, data: bytes, device: torch.device, name: str) -> Detector:
    """Returns the detector from another package's loader. Raises CheckpointError, which names the loader, if it fails."""
    try:
        model = entry.load()(data, device)
    except MaskLakeError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{name}: the loader of format {entry.name!r}, {entry.value}, failed: {type(error).__name__}: {error}"
        ) from error
    if lacking := _lacking(model, Detector):
        raise CheckpointError(
            f"{name}: the loader of format {entry.name!r}, {entry.value}, gave {type(model).__name__}, which is no Detector: "
            f"it has no {', '.join(lacking)}"
        )
    return model


def _lacking(model: object, protocol: type) -> list[str]:
    """Returns the protocol's members that `model` lacks. Properties are not evaluated: `model_id` reads every weight."""
    members = [name for name in dir(protocol) if not name.startswith("_")]
    return [name for name in members if inspect.getattr_static(model, name, None) is None]
