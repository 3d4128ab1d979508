"""Builds models: from a preset or a configuration, and weights from any source."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from masklake.model.config import Category, ModelConfig
from masklake.model.devices import check_device
from masklake.model.errors import CheckpointError
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.presets import PRESETS, preset
from masklake.model.weights import detectron2 as detectron2_weights
from masklake.model.weights import torchvision as torchvision_weights
from masklake.model.weights.checkpoint import BY_CLASS, check_state, is_ours, load_state, parse_checkpoint, read_bytes
from masklake.model.weights.files import read_state
from masklake.model.weights.other_networks import backbone_name, other_network, residual_network

_BRANCHES = ("mask_head.", "keypoint_head.")
_CLASSIFIER = ("backbone.body.", "roi_stage.")
"""Prefixes of our names for the weights of a classifier; no detector has these alone."""
_WEIGHT_NAME = re.compile(r"\w+_Weights\.\w+")


def create_model(
    preset_or_config: str | ModelConfig,
    weights: str | Path | bytes | None = None,
    device: str | torch.device = "cpu",
    categories: Sequence[Category] | None = None,
    reset_predictors: bool = False,
    weights_name: str | None = None,
) -> MaskRCNN:
    """Returns a model in evaluation mode on `device`.

    preset_or_config: a name in `PRESETS`, or a configuration, which is used unchanged. With a name, the source of the weights
    sets the conventions: a checkpoint's own configuration if its preset is the same, the epsilon of torchvision's norm layers,
    or Detectron2's conventions.

    weights: a MaskLake checkpoint, a torchvision state dict (.pth, .safetensors) or a Detectron2 checkpoint (.pkl of its model
    zoo, .pth, .safetensors), alone or within a training checkpoint (`model.weights.files`), as a path or as bytes; or the name
    of torchvision weights, which are downloaded. None: random weights.

    categories: those of the data; None: the preset's. reset_predictors: for fine-tuning. The last layers start anew if their
    shape differs from that of the weights, and so do branches (mask, keypoint) that the weights lack; branches that the model
    lacks are left out. Weights of torchvision's classifiers, such as ImageNet's, then initialise the backbone (section 3.1).
    weights_name: name in messages of weights that are given as bytes.

    Raises UnknownPresetError, CheckpointError for weights that cannot be read or do not fit (for a name, before any download),
    or ConfigError for a device that this machine cannot use.
    """
    device = check_device(device)
    by_name = isinstance(preset_or_config, str)
    config = preset(preset_or_config) if isinstance(preset_or_config, str) else preset_or_config
    name = " ".join(filter(None, ("weights", weights_name if isinstance(weights, bytes) else str(weights))))
    state: Mapping[str, Tensor] | None = None
    recorded: str | None = None
    if weights is not None:
        if isinstance(weights, str) and is_weight_name(weights):
            _check_named(weights, _with_categories(config, categories), reset_predictors, name)
        source, state, recorded = _read(weights, config, name)
        config = source if by_name else config
    model = MaskRCNN(_with_categories(config, categories))
    if state is not None:
        load_state(model, _completed(model, state, reset_predictors, name), name, recorded)
    return model.to(device).eval()


def _with_categories(config: ModelConfig, categories: Sequence[Category] | None) -> ModelConfig:
    return config if categories is None else config.changed(categories=tuple(categories))


def _check_named(weights: str, config: ModelConfig, reset_predictors: bool, name: str) -> None:
    """Raises CheckpointError, without a download, if torchvision's weights of that name do not fit the model."""
    with torch.device("meta"):
        model = MaskRCNN(config)
    state = _renamed(torchvision_weights.weight_shapes(weights), config, name)
    check_state(model, _completed(model, state, reset_predictors, name), name)


def _completed(model: MaskRCNN, state: Mapping[str, Tensor], reset_predictors: bool, name: str) -> Mapping[str, Tensor]:
    """Returns `state`, with `reset_predictors` completed by new layers of the model. Raises CheckpointError for the weights of
    a classifier without `reset_predictors`.
    """
    if reset_predictors:
        return _with_fresh_layers(model, state)
    if _begins_backbone(state):
        raise CheckpointError(
            f"{name} is a classifier, which finds nothing: a detector can be trained from it with reset_predictors=True "
            "(masklake train --reset-predictors)"
        )
    return state


def is_weight_name(weights: str) -> bool:
    """Returns whether this is a name of torchvision weights rather than a path."""
    return _WEIGHT_NAME.fullmatch(weights) is not None


def preset_of_weights(weights: str) -> str | None:
    """Returns the preset of torchvision weights by name, such as `MaskRCNN_ResNet50_FPN_Weights.COCO_V1`; None for other
    strings.

    Raises CheckpointError for names of weights that are not a detector's, or of one without a preset.
    """
    if not is_weight_name(weights):
        return None
    name = weights.partition("_Weights.")[0].lower()
    if name not in PRESETS:
        raise CheckpointError(
            f"{weights} are not a whole detector's weights that MaskLake knows; classifiers' begin a training (masklake train "
            "--weights, --reset-predictors)"
        )
    return name


def holds_classifier(weights: str | Path | bytes, weights_name: str | None = None) -> bool:
    """Returns whether weights are those of a torchvision classifier. Arguments and errors are those of `create_model`."""
    if isinstance(weights, str) and is_weight_name(weights):
        return torchvision_weights.is_classifier(torchvision_weights.weight_shapes(weights))
    data = read_bytes(weights)
    if is_ours(data) or detectron2_weights.is_pickle(data):
        return False
    return torchvision_weights.is_classifier(read_state(data, f"weights {weights_name or ''}".strip()))


def _read(weights: str | Path | bytes, config: ModelConfig, name: str) -> tuple[ModelConfig, Mapping[str, Tensor], str | None]:
    """Returns `config` with the conventions of the weights' source, the weights under our names, and the preset that a MaskLake
    checkpoint records (None for other files).
    """
    if isinstance(weights, str) and is_weight_name(weights):
        state, eps = torchvision_weights.fetch(weights)
        return _with_eps(config, eps), _renamed(state, config, name), None
    data = read_bytes(weights)
    if is_ours(data):
        source, state = parse_checkpoint(data, name)
        return source if source.preset == config.preset else config, state, source.preset
    state = read_state(data, name)
    if (other := other_network(state)) is not None:
        raise CheckpointError(f"{name} holds {other}, which is no network that MaskLake can take: docs/models.md lists those")
    if detectron2_weights.is_theirs(state):
        return detectron2_weights.conventions(config), detectron2_weights.rename(state, config), None
    return _with_eps(config, torchvision_weights.norm_eps_of_file(data)), _renamed(state, config, name), None


def _renamed(state: Mapping[str, Tensor], config: ModelConfig, name: str) -> dict[str, Tensor]:
    if not torchvision_weights.is_classifier(state):
        return torchvision_weights.rename(state)
    theirs, ours = residual_network(state), backbone_name(config.backbone)
    if theirs != ours:
        raise CheckpointError(
            f"{name} is of another architecture than model {config.preset!r}: it is {theirs}, a classifier, and the model's "
            f"backbone is {ours}"
        )
    return torchvision_weights.rename_classifier(state, c4=config.features == "c4")


def _with_eps(config: ModelConfig, eps: float) -> ModelConfig:
    return config.model_copy(update={"backbone": config.backbone.model_copy(update={"norm_eps": eps})})


def _with_fresh_layers(model: MaskRCNN, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns `state` for fine-tuning `model`: without branches that the model lacks, and with its new layers added.

    New are last layers whose shape differs and branches that `state` lacks; for the weights of a classifier, everything but
    the backbone. Anything else that is missing stays missing.
    """
    own = model.network.state_dict()
    if _begins_backbone(state):
        if model.config.rpn_backbone == "own":
            state = {f"rpn_{key}": tensor for key, tensor in state.items() if key.startswith("backbone.")} | dict(state)
        begun = (*_CLASSIFIER, "rpn_backbone.body.")
        return {key: tensor for key, tensor in own.items() if not key.startswith(begun)} | dict(state)
    absent = tuple(branch for branch in _BRANCHES if not _has(own, branch))
    kept = {
        key: tensor
        for key, tensor in state.items()
        if not key.startswith(absent) and not (key.startswith(BY_CLASS) and key in own and own[key].shape != tensor.shape)
    }
    new = BY_CLASS + tuple(branch for branch in _BRANCHES if not _has(kept, branch))
    return {key: tensor for key, tensor in own.items() if key.startswith(new) and key not in kept} | kept


def _begins_backbone(state: Mapping[str, Tensor]) -> bool:
    return bool(state) and all(key.startswith(_CLASSIFIER) for key in state)


def _has(state: Mapping[str, Tensor], branch: str) -> bool:
    return any(key.startswith(branch) for key in state)
