"""torchvision's state dicts: their names as ours, and their numerical conventions.

Supports the ResNet FPN models (Faster, Mask and Keypoint R-CNN, and the V2 variants with batch norm in their heads), the key
names of torchvision's oldest files, and the ResNet and ResNeXt classifiers, whose weights initialise a backbone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import torch
from torch import Tensor

from masklake.model.errors import CheckpointError
from masklake.model.presets import PRESETS
from masklake.model.weights.checkpoint import renamed
from masklake.model.weights.files import CLASSIFIER, read_state

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

_RESIDUAL = re.compile(r"(Wide_)?ResNe(t|Xt)\d")
"""Names of torchvision's classifiers whose weights can initialise a backbone."""

_ZERO_EPS_FILES = ("258fb6c6", "bf2d0c1e", "fc266e95")
"""SHA-256 prefixes of the COCO_V1 files (box, mask, keypoint), for which torchvision's builders set the norm's eps to 0."""

_ZERO_EPS_WEIGHTS = frozenset(f"{kind}_ResNet50_FPN_Weights.COCO_V1" for kind in ("FasterRCNN", "MaskRCNN", "KeypointRCNN"))

_CONVS = {"conv1": "reduce", "conv2": "spatial", "conv3": "expand"}
_NORMS = {"bn1": "reduce", "bn2": "spatial", "bn3": "expand"}
_BLOCK_PARTS = {"downsample.0": "shortcut.0", "downsample.1": "shortcut.1"}
_BLOCK_PARTS |= {theirs: f"{ours}.0" for theirs, ours in _CONVS.items()}
_BLOCK_PARTS |= {theirs: f"{ours}.1" for theirs, ours in _NORMS.items()}

_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"backbone\.body\.conv1\.", "backbone.body.stem.0."),
        (r"backbone\.body\.bn1\.", "backbone.body.stem.1."),
        (r"backbone\.fpn\.inner_blocks\.(\d)\.(?=weight|bias)", r"backbone.fpn.lateral.\1.0."),
        (r"backbone\.fpn\.layer_blocks\.(\d)\.(?=weight|bias)", r"backbone.fpn.output.\1.0."),
        (r"backbone\.fpn\.inner_blocks\.", "backbone.fpn.lateral."),
        (r"backbone\.fpn\.layer_blocks\.", "backbone.fpn.output."),
        (r"rpn\.head\.conv\.(?=weight|bias)", "rpn.head.convs.0."),
        (r"rpn\.head\.conv\.(\d)\.0\.", r"rpn.head.convs.\1."),
        (r"rpn\.head\.cls_logits\.", "rpn.head.objectness."),
        (r"rpn\.head\.bbox_pred\.", "rpn.head.deltas."),
        (r"roi_heads\.box_head\.fc6\.", "box_head.hidden.0."),
        (r"roi_heads\.box_head\.fc7\.", "box_head.hidden.1."),
        (r"roi_heads\.box_head\.5\.", "box_head.hidden.0."),  # V2: four convolutions, Flatten, then this
        (r"roi_heads\.box_head\.(\d)\.", r"box_head.convs.\1."),
        (r"roi_heads\.box_predictor\.", "box_head."),
        (r"roi_heads\.mask_head\.(\d)\.", r"mask_head.convs.\1."),
        (r"roi_heads\.mask_predictor\.conv5_mask\.", "mask_head.deconv."),
        (r"roi_heads\.mask_predictor\.mask_fcn_logits\.", "mask_head.logits."),
        (r"roi_heads\.keypoint_predictor\.kps_score_lowres\.", "keypoint_head.deconv."),
    )
)
_BLOCK = re.compile(r"backbone\.body\.layer(\d)\.(\d+)\.(downsample\.[01]|conv[123]|bn[123])\.")
_OLD_MASK_CONV = re.compile(r"roi_heads\.mask_head\.mask_fcn(\d)\.")
_KEYPOINT_CONV = re.compile(r"roi_heads\.keypoint_head\.(\d+)\.")  # a Sequential of convolution, ReLU, convolution, ...


def our_name(key: str) -> str:
    """Returns MaskLake's name of a torchvision weight; names of unknown parts are returned unchanged."""
    if match := _BLOCK.match(key):
        stage, block, part = match.groups()
        return f"backbone.body.stages.{int(stage) - 1}.{block}.{_BLOCK_PARTS[part]}.{key[match.end() :]}"
    if match := _OLD_MASK_CONV.match(key):
        return f"mask_head.convs.{int(match[1]) - 1}.0.{key[match.end() :]}"
    if match := _KEYPOINT_CONV.match(key):
        return f"keypoint_head.convs.{int(match[1]) // 2}.0.{key[match.end() :]}"
    for pattern, name in _RULES:
        if pattern.match(key):
            return pattern.sub(name, key, count=1)
    return key


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state dict under MaskLake's names. Raises CheckpointError if a weight occurs under an old and a new name."""
    return renamed(state, our_name)


def is_classifier(state: Mapping[str, Tensor]) -> bool:
    """Returns whether a state dict of torchvision is a residual network that classifies images, such as ImageNet's."""
    return state.keys() >= set(CLASSIFIER)


def rename_classifier(state: Mapping[str, Tensor], c4: bool) -> dict[str, Tensor]:
    """Returns a classifier's weights as those of a detector's backbone; with `c4`, the fifth stage runs on regions."""
    body = {f"backbone.body.{key}": tensor for key, tensor in state.items() if not key.startswith("fc.")}
    fifth = "backbone.body.stages.3."
    return {
        (f"roi_stage.{key.removeprefix(fifth)}" if c4 and key.startswith(fifth) else key): tensor
        for key, tensor in rename(body).items()
    }


def norm_eps_of_file(data: bytes) -> float:
    """Returns the epsilon that torchvision's builder gives the frozen norms of this weights file."""
    return 0.0 if hashlib.sha256(data).hexdigest().startswith(_ZERO_EPS_FILES) else 1e-5


def _named(weight_name: str) -> WeightsEnum:
    """Returns torchvision's entry for these weights. Raises CheckpointError if there is none, or no model here can use it."""
    from torchvision.models import get_weight  # here, because importing the package takes longer than importing torch

    said = f"torchvision has no weights called {weight_name!r}"
    model = weight_name.partition("_Weights.")[0]
    try:
        known = type(get_weight(f"{model}_Weights.DEFAULT"))
    except (ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{said}: it has no model of that name; check its spelling, capitals included") from error
    try:
        weights: WeightsEnum = get_weight(weight_name)
    except (ValueError, AttributeError, KeyError) as error:
        names = ", ".join(f"{model}_Weights.{name}" for name in known.__members__)
        raise CheckpointError(f"{said}; of this model it has {names}") from error
    if model.lower() not in PRESETS and not _RESIDUAL.match(model):
        raise CheckpointError(
            f"{weight_name} are weights of a network that MaskLake cannot take: docs/models.md lists those that it can"
        )
    return weights


def weight_shapes(weight_name: str) -> dict[str, Tensor]:
    """Returns names and shapes of these weights, as tensors on the meta device, so that they can be checked before any
    download.

    Raises CheckpointError for a name that `fetch` refuses.
    """
    _named(weight_name)
    from torchvision.models import get_model

    model = weight_name.partition("_Weights.")[0]
    with torch.device("meta"):
        network = get_model(model.lower(), weights=None, **({} if _RESIDUAL.match(model) else {"weights_backbone": None}))
    return dict(network.state_dict())


def fetch(weight_name: str) -> tuple[dict[str, Tensor], float]:
    """Downloads weights by torchvision's own name, such as `MaskRCNN_ResNet50_FPN_Weights.COCO_V1`; returns them with the
    epsilon of their norms.

    They are cached where torch.hub caches files. A cached file is read like any other: torchvision itself would unpickle it.
    Raises CheckpointError if the name does not exist or belongs to an unsupported network (before any download), if the
    download fails, or if the file contains something other than tensors.
    """
    weights = _named(weight_name)
    kept = Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(urlsplit(weights.url).path).name)
    try:
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            digest = torch.hub.HASH_REGEX.search(kept.name)
            torch.hub.download_url_to_file(weights.url, str(kept), digest and digest.group(1), progress=False)
        data = kept.read_bytes()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot download torchvision's weights {weight_name} to {kept}: {error}") from error
    return read_state(data, f"{weight_name} ({kept})"), 0.0 if str(weights) in _ZERO_EPS_WEIGHTS else 1e-5
