"""`--weights` of commands that need a whole model: a checkpoint, torchvision's weights by name, or who converts the rest."""

from __future__ import annotations

from masklake.model import create_model
from masklake.model.build import preset_of_weights
from masklake.model.errors import CheckpointError
from masklake.model.weights.checkpoint import dumps, is_ours
from masklake.model.weights.files import what_it_is
from masklake.pipeline.storage.storage import Storage


def read_model(storage: Storage, weights: str) -> bytes:
    """A MaskLake checkpoint's bytes, from `weights` in any form that says by itself what model it is of.

    weights: a checkpoint, local or s3://, or the name of a torchvision detector's weights, such as
    `MaskRCNN_ResNet50_FPN_Weights.COCO_V1`, which are downloaded into torch.hub's cache and converted in memory (their
    `model_id` is that of a file of `masklake convert`). Raises the storage's errors, and CheckpointError for any other file:
    those of other systems do not say their preset, so the message names the `masklake convert` that is told it.
    """
    if (preset := preset_of_weights(weights)) is not None:
        return dumps(create_model(preset, weights=weights))
    data = storage.read_bytes(weights)
    if is_ours(data):
        return data
    if (what := what_it_is(data)) is not None:
        raise CheckpointError(f"{weights} is not a MaskLake checkpoint: it is {what}")
    raise CheckpointError(
        f"{weights} is not a MaskLake checkpoint. Weights of torchvision or Detectron2 become one by: "
        f"masklake convert {weights} model.safetensors --preset PRESET"
    )
