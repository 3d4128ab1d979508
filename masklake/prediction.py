"""`masklake.load_model` and `masklake.decode_mask`: predictions in this process, without Ray and without a table."""

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
    """A detector that is ready to predict. `masklake.load_model` returns one."""

    def __init__(self, model: Detector) -> None:
        self.model = model

    def __repr__(self) -> str:
        return f"Predictor({self.model_id!r})"

    @property
    def model_id(self) -> str:
        """ID of the model, as in the rows of a table that it labelled."""
        return self.model.model_id

    @property
    def category_names(self) -> dict[int, str]:
        """Names of the categories by id. `Instances.labels` holds these ids."""
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
        """Returns the instances of each image, in the order of the images; those of an image are sorted by descending score.

        Args:
            images: PIL images, uint8 RGB arrays of shape (H, W, 3) or uint8 RGB tensors of shape (3, H, W), of any sizes. A
                PIL image of any mode becomes upright 8-bit RGB, as in `masklake.label`.
            precision: Arithmetic of the network; `auto` is bf16 on a GPU that supports it, else fp32.
            score_threshold: Minimum score of an instance; default: the model's (0.05).
            nms_iou: IoU above which the weaker of two boxes of a category is dropped; default: the model's.
            max_detections: Maximum number of instances per image; default: the model's (100).
            mask_threshold: Probability above which a pixel belongs to the mask; default: the model's (0.5).
            tasks: Any of "box", "mask" and "keypoint"; default: all of the model's.
            batch_size: Number of images per forward pass on a GPU.

        Raises:
            ConfigError: An image of another type or shape, or options that are invalid for this model.
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
    """Returns the detector of a checkpoint, ready to predict.

    Args:
        weights: A checkpoint of MaskLake or of an installed detector, local or s3://, or the name of torchvision weights,
            which are downloaded.
        device: Device to run the model on, such as "cpu" or "cuda".
        **storage: Options of the storage, such as `endpoint_url` and `region` (`StorageKeywords`).

    Raises:
        CheckpointError: There is no checkpoint, or no installed package can read it.
        ConfigError: This machine does not have the device.
    """
    import torch

    from masklake.jobs.weights import read_detector

    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"{device!r} is not a torch device; give one such as 'cpu' or 'cuda:0'") from error
    return Predictor(read_detector(storage_of(storage), os.fspath(weights), place)[1])


def decode_mask(rle: bytes | str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Returns the mask of a COCO compressed run-length encoding, bool (H, W).

    rle: an element of `Instances.rles`, or a value of the column `rle` of the view `detections`. size: (H, W) of the image.

    Raises ConfigError if `rle` does not encode a mask of this size.
    """
    from masklake.model.masks.rle import decode
    from masklake.pipeline.coco.values import checked_runs

    counts = rle.encode() if isinstance(rle, str) else rle
    try:
        checked_runs(counts, *size)
        return decode(counts, size).view(bool)
    except ValueError as error:
        raise ConfigError(f"not a mask of an image of {size[0]} x {size[1]} pixels (H x W): its {error}") from error


def _tensors(images: Sequence[Picture]) -> list[torch.Tensor]:
    """Returns each image as a uint8 RGB tensor (3, H, W) on the host."""
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
