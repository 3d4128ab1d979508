"""`masklake convert`: another system's weights in, one MaskLake checkpoint out."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from model import create_model
from model.checkpoint import dumps
from model.errors import ConfigError
from pipeline.storage import Storage, canonical


class ConvertReport(BaseModel):
    """What was written, and the name that tables will know it by."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    source: str
    checkpoint: str
    preset: str
    model_id: str
    categories: int
    parameters: int
    norm_eps: float


def run(source: str, target: str, preset: str, storage: Storage, norm_eps: float | None = None) -> ConvertReport:
    """Reads `source` as `preset` and writes `target`, one safetensors file.

    source: torchvision's state dict (.pth) or Detectron2's checkpoint (.pkl of its model zoo, .pth), local or s3://, or the
    name of torchvision's weights, which are downloaded. Which system a file is of is read off its names; the checkpoint holds
    that system's conventions. norm_eps: added to the norms' variance; a state dict does not say it. None: 0 for torchvision's
    own COCO_V1 files, else 1e-5. Who has saved the COCO_V1 model anew has to say 0.

    Raises UnknownPresetError, CheckpointError (not weights of this architecture), ConfigError (a target that is not named
    .safetensors, or is the source) and the storage's errors.
    """
    if not target.endswith(".safetensors"):
        raise ConfigError(f"cannot write {target}: a MaskLake checkpoint is named *.safetensors")
    if canonical(target) == canonical(source):
        raise ConfigError(f"cannot write {target} over its own source: name another file")
    if norm_eps is not None and not math.isfinite(norm_eps):
        raise ConfigError(f"--norm-eps {norm_eps} is not a finite number")
    model = create_model(preset, weights=storage.read_bytes(source) if "://" in source else source)
    if norm_eps is not None:
        backbone = model.config.backbone.model_copy(update={"norm_eps": norm_eps})
        model = create_model(model.config.model_copy(update={"backbone": backbone}), weights=dumps(model))
    storage.write_bytes(target, dumps(model))
    return ConvertReport(
        source=source,
        checkpoint=target,
        preset=preset,
        model_id=model.model_id,
        categories=len(model.config.categories),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        norm_eps=model.config.backbone.norm_eps,
    )
