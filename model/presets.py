"""The named instantiations of Mask R-CNN."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from model.coco import COCO_CATEGORIES, COCO_RAW_CATEGORIES, PERSON
from model.config import BackboneConfig, ModelConfig
from model.errors import UnknownPresetError

_KEYPOINT_MIN_SIZES = (640, 672, 704, 736, 768, 800)

_PRESETS = (
    ModelConfig(preset="fasterrcnn_resnet50_fpn", categories=COCO_RAW_CATEGORIES, mask=False),
    ModelConfig(preset="maskrcnn_resnet50_fpn", categories=COCO_RAW_CATEGORIES),
    ModelConfig(
        preset="keypointrcnn_resnet50_fpn",
        categories=(PERSON,),
        mask=False,
        keypoint=True,
        min_sizes=_KEYPOINT_MIN_SIZES,
    ),
    ModelConfig(
        preset="maskkeypointrcnn_resnet50_fpn",
        categories=COCO_CATEGORIES,
        keypoint=True,
        min_sizes=_KEYPOINT_MIN_SIZES,
    ),
    # For demos, tests and small objects: trains from scratch in minutes on a CPU. Group norm, because batches are of 2 to 4
    # images a worker, where batch statistics are noise. Images keep their size up to 256 pixels; anchors start at 12.
    ModelConfig(
        preset="tiny",
        categories=COCO_CATEGORIES,
        keypoint=True,
        backbone=BackboneConfig(
            block="basic",
            depths=(1, 1, 1, 1),
            widths=(32, 64, 128, 192),
            stem_channels=24,
            stem_kernel=3,
            norm="group",
            frozen_stages=0,
        ),
        fpn_channels=64,
        min_sizes=(256,),
        max_size=512,
        upscale=False,
        anchor_sizes=((12,), (24,), (48,), (96,), (192,)),
        rpn_pre_nms_train=600,
        rpn_pre_nms_test=600,
        rpn_post_nms_train=300,
        rpn_post_nms_test=600,
        rpn_score_threshold=0.02,
        rpn_samples=128,
        roi_canonical_size=112.0,
        roi_samples=96,
        roi_positive_fraction=0.25,
        box_hidden=256,
        mask_channels=(64, 64),
        keypoint_channels=(64, 64, 64),
    ),
)

PRESETS: Mapping[str, ModelConfig] = MappingProxyType({config.preset: config for config in _PRESETS})
"""Model configurations by name."""


def preset(name: str) -> ModelConfig:
    """The configuration of that name; raises UnknownPresetError, which lists the names that exist."""
    if name not in PRESETS:
        raise UnknownPresetError(f"no model preset {name!r}; known presets: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
