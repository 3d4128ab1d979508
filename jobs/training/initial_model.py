"""The model that a training run starts from: the preset's or that of given weights, with the data's categories and tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from masklake.jobs.training.options import TrainOptions
from masklake.model.config import ModelConfig
from masklake.model.create import create_model, holds_classifier
from masklake.model.errors import ConfigError, validated
from masklake.model.fields import Task
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.phases import with_rpn_backbone
from masklake.model.presets import preset as preset_config
from masklake.model.weights.checkpoint import dumps
from masklake.pipeline.coco.dataset import CocoDataset
from masklake.pipeline.storage.storage import Storage


def build_model(options: TrainOptions, data: CocoDataset, storage: Storage) -> MaskRCNN:
    """Returns the model before its first step, with the data's categories. Raises ConfigError if preset and data do not fit."""
    torch.manual_seed(options.seed)
    tasks = _tasks(options, data)
    changes = {**options.model, "mask": "mask" in tasks, "keypoint": "keypoint" in tasks}
    rpn_backbone = changes.pop("rpn_backbone", None)
    model = _model_with(options, data, storage, changes)
    if rpn_backbone is None:
        return model
    return with_rpn_backbone(model, _changed(model.config, {"rpn_backbone": rpn_backbone}).rpn_backbone)


def _model_with(options: TrainOptions, data: CocoDataset, storage: Storage, changes: Mapping[str, Any]) -> MaskRCNN:
    """Returns the model of the preset or of the weights, with changes to its configuration."""

    def as_preset() -> ModelConfig:
        return _changed(preset_config(options.preset), {**changes, "categories": data.categories})

    if options.weights is None:
        config = as_preset()
        if config.backbone.norm == "frozen":
            raise ConfigError(
                f"'{options.preset}' has frozen norm layers and cannot be trained from random weights: give --weights of a "
                "detector, or of a classifier for its backbone (such as ResNet50_Weights.IMAGENET1K_V1, with "
                '--reset-predictors), or set backbone = {norm = "group"} under [model] and start from random ones.'
            )
        return create_model(config)
    weights: str | bytes = options.weights
    if storage.exists(options.weights) or "/" in options.weights:
        weights = storage.read_bytes(options.weights)
    if holds_classifier(weights, options.weights):
        config = as_preset()
        check_proposals(options.model_copy(update={"weights": None}), config)  # the RPN is as untrained as without weights
        return create_model(config, weights, reset_predictors=options.reset_predictors, weights_name=options.weights)
    base = create_model(
        options.preset,
        weights=weights,
        categories=data.categories,
        reset_predictors=options.reset_predictors,
        weights_name=options.weights,
    )
    config = _changed(base.config, changes)
    return base if config == base.config else create_model(config, weights=dumps(base), reset_predictors=True)


def _tasks(options: TrainOptions, data: CocoDataset) -> frozenset[Task]:
    """Returns the tasks to train: the requested ones, else those of both the preset and the data."""
    preset = preset_config(options.preset)
    present: dict[Task, bool] = {"box": True, "mask": data.has_masks, "keypoint": data.has_keypoints}
    if options.tasks is None:
        wanted: dict[Task, bool] = {"box": True, "mask": preset.mask, "keypoint": preset.keypoint}
        return frozenset(task for task in present if present[task] and wanted[task])
    if lacking := sorted(task for task in options.tasks if not present[task]):
        raise ConfigError(f"{data.source} has no annotations for {', '.join(lacking)}; leave it out of --tasks.")
    return options.tasks


def _changed(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """Returns the configuration with fields replaced; a table, such as the backbone's, changes single fields of its own."""
    values = config.model_dump()
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, Mapping) and isinstance(values.get(key), dict) else value
    return validated(ModelConfig, values, "model")


def check_proposals(options: TrainOptions, config: ModelConfig) -> None:
    """Raises ConfigError if a detector is to be trained alone, but on proposals of an RPN that is untrained or shares its
    backbone.
    """
    if options.learn != "detector" or options.proposals is not None:
        return
    if options.weights is None or config.rpn_backbone == "shared":
        raise ConfigError(
            'learn = "detector" needs proposals: give --proposals (a file of `masklake propose`), or --weights of a model '
            "whose trained RPN has a backbone of its own; --learn separate trains both, one after the other."
        )
