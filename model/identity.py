"""IDs that tables store permanently: those of models, and the rule by which options enter such an ID.

An ID must not change when the program grows, since every image of a table is labelled again under a new one. So it is derived
from the differences from the defaults that are frozen here, not from all fields of a value: a new field, or a changed default,
does not change the IDs of models that do not use it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from masklake.model.config import ModelConfig

FIRST_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "Category": {"keypoints": (), "flip_pairs": (), "skeleton": ()},
    "BackboneConfig": {
        "block": "bottleneck",
        "depths": (3, 4, 6, 3),
        "widths": (64, 128, 256, 512),
        "groups": 1,
        "group_width": 64,
        "stride_in": "3x3",
        "stem_channels": 64,
        "stem_kernel": 7,
        "norm": "frozen",
        "norm_eps": 1e-5,
        "norm_groups": 8,
        "frozen_stages": 2,
    },
    "ModelConfig": {
        "mask": True,
        "keypoint": False,
        "features": "fpn",
        "fpn_channels": 256,
        "head_norm": "none",
        "image_channels": "rgb",
        "image_divisor": 255.0,
        "image_mean": (0.485, 0.456, 0.406),
        "image_std": (0.229, 0.224, 0.225),
        "resize": "bilinear_floor",
        "min_sizes": (800,),
        "max_size": 1333,
        "upscale": True,
        "canvas_divisor": 32,
        "anchor_sizes": ((32,), (64,), (128,), (256,), (512,)),
        "anchor_ratios": (0.5, 1.0, 2.0),
        "anchor_rounding": True,
        "anchor_order": "ratio",
        "anchor_stride": "canvas_over_map",
        "rpn_convs": 1,
        "rpn_backbone": "shared",
        "rpn_pre_nms_train": 2000,
        "rpn_pre_nms_test": 1000,
        "rpn_post_nms_train": 2000,
        "rpn_post_nms_test": 1000,
        "rpn_nms_iou": 0.7,
        "rpn_rank": "probability",
        "rpn_score_threshold": 0.0,
        "rpn_min_side": 1e-3,
        "rpn_foreground_iou": 0.7,
        "rpn_background_iou": 0.3,
        "rpn_samples": 256,
        "rpn_positive_fraction": 0.5,
        "rpn_delta_weights": (1.0, 1.0, 1.0, 1.0),
        "delta_clamp": 4.135166556742356,
        "roi_canonical_size": 224.0,
        "roi_canonical_level": 4,
        "roi_level_rule": "torchvision",
        "roi_pool": "align",
        "roi_pool_mode": "avg",
        "roi_aligned": False,
        "roi_sampling_ratio": 2,
        "roi_samples": 512,
        "roi_positive_fraction": 0.25,
        "roi_foreground_iou": 0.5,
        "box_pool": 7,
        "roi_stage_stride": 1,
        "box_channels": (),
        "box_layers": 2,
        "box_hidden": 1024,
        "box_delta_weights": (10.0, 10.0, 5.0, 5.0),
        "smooth_l1_beta": 1 / 9,
        "mask_pool": 14,
        "mask_head": "fcn",
        "mask_output": "sigmoid",
        "mask_channels": (256, 256, 256, 256),
        "mask_deconv_channels": 256,
        "mask_hidden": (1024, 1024),
        "mask_side": 28,
        "mask_resize": None,
        "keypoint_pool": 14,
        "keypoint_channels": (512,) * 8,
        "keypoint_loss_weight": 1.0,
        "keypoint_score": "logit",
        "keypoint_offset": 0.0,
        "score_threshold": 0.05,
        "nms_iou": 0.5,
        "max_detections": 100,
        "box_min_side": 1e-2,
        "clip_to_image": False,
        "mask_threshold": 0.5,
        "paste": "torchvision",
    },
}
"""The default of every field when it was introduced, by class. Add a line for a new field; never change one.

The values are written out, since `model.config` may change its own. A field without a default always counts; a nested value
(`backbone`, `categories`) counts by its own differences.
"""

COUNTER = ".num_batches_tracked"
"""Suffix of the names of batch counters, which are not weights: they do not change results, and checkpoints need none."""


def model_id(config: ModelConfig, state: Mapping[str, Tensor]) -> str:
    """Returns the preset's name, a dash and the first 12 hex digits of the SHA-256 over every weight and the changes to the
    configuration.

    It is the same on every device, for every order of `state`, and after writing and reading a checkpoint.
    """
    facts = differing(config, FIRST_DEFAULTS)
    digest = hashlib.sha256(canonical_json(facts))
    for name in sorted(state):
        if name.endswith(COUNTER):
            continue
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"{config.preset}-{digest.hexdigest()[:12]}"


def differing(value: BaseModel, first_defaults: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the fields of `value`, by name, that differ from their first default.

    first_defaults: first defaults by name of the class and of the field. A field that is not in it is always included.
    """
    frozen = first_defaults.get(type(value).__name__, {})
    facts = {}
    for name in type(value).model_fields:
        content = getattr(value, name)
        if isinstance(content, BaseModel):
            content = differing(content, first_defaults)
            if not content:
                continue
        elif isinstance(content, tuple) and any(isinstance(item, BaseModel) for item in content):
            content = [differing(item, first_defaults) for item in content]
        elif name in frozen and content == frozen[name]:
            continue
        facts[name] = content
    return facts


def canonical_json(facts: Mapping[str, Any]) -> bytes:
    """Returns `facts` as JSON: equal facts give equal bytes, in any order of insertion, and 1 is 1.0."""
    return json.dumps(_plain(facts), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
