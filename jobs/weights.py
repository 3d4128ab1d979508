"""`--weights` of commands that need a whole model: reads a checkpoint, or converts torchvision weights by name."""

from __future__ import annotations

import torch

from masklake.model import create_model
from masklake.model.create import preset_of_weights
from masklake.model.detector import Detector, has_loader, load_detector
from masklake.model.errors import CheckpointError
from masklake.model.weights.checkpoint import dumps, metadata
from masklake.model.weights.files import what_it_is
from masklake.pipeline.errors import InputNotFoundError
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.training.run_folder import MODEL


def read_detector(storage: Storage, weights: str, device: str | torch.device = "cpu") -> tuple[bytes, Detector]:
    """Returns a checkpoint's bytes, to be sent to all workers, and its model, so that an invalid one fails before they start.

    weights: as in `read_model`. Raises CheckpointError for weights that are missing, damaged or of an unknown format,
    ConfigError for a device that this machine does not have, and the storage's errors.
    """
    try:
        checkpoint = read_model(storage, weights)
    except InputNotFoundError as error:
        inside = storage.join(weights, MODEL)
        if storage.is_file(inside):
            raise CheckpointError(f"{weights}: is a folder; name the checkpoint in it: {inside}") from error
        raise CheckpointError(
            f"no checkpoint at {weights}; weights are a file of `masklake train` or `convert`, or torchvision weights' name, "
            "such as MaskRCNN_ResNet50_FPN_Weights.COCO_V1"
        ) from error
    try:
        return checkpoint, load_detector(checkpoint, device)
    except CheckpointError as error:
        raise CheckpointError(f"{weights}: {error}") from error


def read_model(storage: Storage, weights: str) -> bytes:
    """Returns a checkpoint's bytes, from `weights` in any form that identifies its model by itself.

    weights: a checkpoint of MaskLake or of an installed detector (`model.detector`), local or s3://, or the name of torchvision
    detector weights, such as `MaskRCNN_ResNet50_FPN_Weights.COCO_V1`, which are downloaded into torch.hub's cache and converted
    in memory (with the `model_id` that `masklake convert` gives). Raises the storage's errors, and CheckpointError for any
    other file: files of other systems do not contain their preset, so the message names the `masklake convert` to run.
    """
    if (preset := preset_of_weights(weights)) is not None:
        return dumps(create_model(preset, weights=weights))
    data = storage.read_bytes(weights)
    if has_loader(data):
        return data
    if (what := what_it_is(data)) is not None:
        raise CheckpointError(f"{weights} is not a MaskLake checkpoint: it is {what}")
    mark = metadata(data).get("format")
    unread = f", and no installed package reads its format {mark!r}" if mark is not None else ""
    raise CheckpointError(
        f"{weights} is not a MaskLake checkpoint{unread}. Weights of torchvision or Detectron2 become one by: "
        f"masklake convert {weights} model.safetensors --preset PRESET"
    )
