"""`masklake.load_model` and `masklake.decode_mask`: a detector in this process, without Ray and without a table."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, TypeAlias, Unpack

from masklake.model.config import PredictOptions
from masklake.model.errors import ConfigError, validated
from masklake.model.fields import AnyPrecision, Task
from masklake.options import StorageKeywords, storage_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from PIL import Image

    from masklake.model.detector import Detector
    from masklake.model.instances import Instances

    Picture: TypeAlias = Image.Image | NDArray[np.uint8] | torch.Tensor


class Predictor:
    """A detector that is ready to run; make it with `masklake.load_model`."""

    def __init__(self, model: Detector) -> None:
        self.model = model

    def __repr__(self) -> str:
        return f"Predictor({self.model_id!r})"

    @property
    def model_id(self) -> str:
        """The model's name, as it stands in the rows of a table that it labelled."""
        return self.model.model_id

    @property
    def category_names(self) -> dict[int, str]:
        """Name of each category by its id, which `Instances.labels` holds."""
        return {category.id: category.name for category in self.model.categories}

    def predict(
        self,
        images: Sequence[Picture],
        *,
        precision: AnyPrecision = "fp32",
        score_threshold: float | None = None,
        nms_iou: float | None = None,
        max_detections: int | None = None,
        mask_threshold: float | None = None,
        tasks: Collection[Task] | None = None,
        batch_size: int = 4,
    ) -> list[Instances]:
        """The instances of each image, in order; of one image, best score first.

        Args:
            images: PIL images, uint8 RGB arrays of shape (H, W, 3) or uint8 RGB tensors of shape (3, H, W), of any sizes. A
                PIL image of any mode becomes upright 8-bit RGB, as in `masklake.label`.
            precision: Arithmetic of the network; `auto` is bf16 on a GPU that has it, else fp32.
            score_threshold: Minimum score of an instance; default: the model's (0.05).
            nms_iou: IoU above which the weaker of two boxes of a category is dropped; default: the model's.
            max_detections: Maximum number of instances per image; default: the model's (100).
            mask_threshold: Probability above which a pixel belongs to the mask; default: the model's (0.5).
            tasks: Any of "box", "mask" and "keypoint"; default: all that the model has.
            batch_size: Images that go through the network together on a GPU.

        Raises:
            ConfigError: An image of another kind, or options that this model does not have.
        """
        values = {
            "precision": precision,
            "score_threshold": score_threshold,
            "nms_iou": nms_iou,
            "max_detections": max_detections,
            "mask_threshold": mask_threshold,
            "tasks": tasks,
            "batch_size": batch_size,
        }
        options = validated(PredictOptions, values, "the options of predict")
        return self.model.predict(_tensors(images), options)


def load_model(
    weights: str | os.PathLike[str], *, device: str | torch.device = "cpu", **storage: Unpack[StorageKeywords]
) -> Predictor:
    """The detector of a checkpoint, ready to predict.

    Args:
        weights: A checkpoint of MaskLake or of an installed detector, local or s3://, or the name of torchvision weights,
            which are downloaded.
        device: Where it runs, such as "cpu" or "cuda".
        **storage: Endpoint, region and the like (`StorageKeywords`).

    Raises:
        CheckpointError: There is no checkpoint, or nothing installed reads it.
        ConfigError: This machine does not have the device.
    """
    import torch

    from masklake.jobs.weights import read_detector

    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"{device!r} is no device of torch; give one such as 'cpu' or 'cuda:0'") from error
    return Predictor(read_detector(storage_of(storage), os.fspath(weights), place)[1])


def decode_mask(rle: bytes | str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask of a COCO compressed run-length encoding: bool (H, W).

    rle: an element of `Instances.rles`, or the column `rle` of the view `detections`. size: the image's (H, W).

    Raises ConfigError if it is no such encoding of an image of this size.
    """
    from masklake.model.masks.rle import decode
    from masklake.pipeline.coco.values import checked_runs

    counts = rle.encode() if isinstance(rle, str) else rle
    try:
        checked_runs(counts, *size)
        return decode(counts, size).view(bool)
    except ValueError as error:
        raise ConfigError(f"this is no mask of an image of {size[0]} x {size[1]} pixels (H x W): its {error}") from error


def _tensors(images: Sequence[Picture]) -> list[torch.Tensor]:
    """Each image as a uint8 RGB tensor (3, H, W) on the host."""
    import numpy as np
    import torch
    from PIL import Image

    if isinstance(images, (Image.Image, np.ndarray, torch.Tensor, str, bytes, os.PathLike)):
        raise ConfigError(f"predict takes a list of images, not {type(images).__name__}: write predict([image])")
    return [_tensor(image, f"images[{number}]") for number, image in enumerate(images)]


def _tensor(image: Picture, name: str) -> torch.Tensor:
    import numpy as np
    import torch
    from PIL import Image

    from masklake.pipeline.images.decode import upright_rgb

    if isinstance(image, Image.Image):
        try:
            return upright_rgb(image)
        except Exception as error:  # Pillow opens a file lazily, and its parsers raise anything
            raise ConfigError(f"{name}: cannot be decoded ({error})") from error
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ConfigError(f"{name}: an array must be uint8 RGB (H, W, 3), not {image.dtype} {image.shape}")
        return torch.from_numpy(image.transpose(2, 0, 1).copy())
    if isinstance(image, torch.Tensor):
        return image.cpu()
    raise ConfigError(f"{name}: give a PIL image, an array (H, W, 3) or a tensor (3, H, W), not {type(image).__name__}")
