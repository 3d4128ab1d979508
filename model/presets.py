"""Named configurations of Mask R-CNN: `<task>rcnn_<backbone>_<features>`, torchvision's V2 variants, and `tiny`.

Values are the paper's if it gives them (section 3.1; 4.1 and table 2 for the backbones), and torchvision's otherwise.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from masklake.model.coco_categories import COCO_CATEGORIES, COCO_RAW_CATEGORIES, PERSON
from masklake.model.config import BackboneConfig, ModelConfig
from masklake.model.errors import UnknownPresetError
from masklake.model.wording import one_of

_KEYPOINT_SIZES = {"min_sizes": (640, 672, 704, 736, 768, 800)}

_TASKS: Mapping[str, dict[str, Any]] = {
    "fasterrcnn": {"categories": COCO_RAW_CATEGORIES, "mask": False},
    "maskrcnn": {"categories": COCO_RAW_CATEGORIES},
    "keypointrcnn": {"categories": (PERSON,), "mask": False, "keypoint": True, **_KEYPOINT_SIZES},
    "maskkeypointrcnn": {"categories": COCO_CATEGORIES, "keypoint": True, **_KEYPOINT_SIZES},
}

_DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}

_BACKBONES: Mapping[str, BackboneConfig] = {
    **{f"resnet{depth}": BackboneConfig(depths=blocks) for depth, blocks in _DEPTHS.items()},
    **{
        f"resnext{depth}_{groups}x{width}d": BackboneConfig(depths=blocks, groups=groups, group_width=width)
        for depth, blocks in _DEPTHS.items()
        for groups, width in ((32, 4), (32, 8), (64, 4))
    },
}

# One map instead of a pyramid has all five sizes of anchors on it, and more candidates at its one level (Ren et al. 2015).
_ONE_MAP: dict[str, Any] = {
    "anchor_sizes": ((32, 64, 128, 256, 512),),
    "rpn_pre_nms_train": 12000,
    "rpn_pre_nms_test": 6000,
}

_FEATURES: Mapping[str, dict[str, Any]] = {
    "fpn": {"features": "fpn"},
    # Figure 4, left: the fifth stage on 7 x 7 bins, with stride 1, for both branches; 64 regions an image to train on, 300
    # proposals at inference (section 3.1).
    "c4": {
        "features": "c4",
        **_ONE_MAP,
        "rpn_post_nms_test": 300,
        "roi_samples": 64,
        "box_layers": 0,
        "mask_channels": (),
    },
    "c5": {"features": "c5", **_ONE_MAP},
    "dc5": {"features": "dc5", **_ONE_MAP},
}

_V2: dict[str, Any] = {
    "backbone": BackboneConfig(norm="batch"),
    "head_norm": "batch",
    "rpn_convs": 2,
    "box_channels": (256,) * 4,
    "box_layers": 1,
}
"""torchvision's improved baselines (Li et al. 2021): batch norm everywhere, deeper heads."""

# For demos, tests and small objects: trains from scratch in minutes on a CPU. Group norm, because batches have 2 to 4 images
# per worker, whose batch statistics are noise. Images keep their size up to 256 pixels; anchors start at 12.
_TINY = ModelConfig(
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
    mask_deconv_channels=64,
    keypoint_channels=(64, 64, 64),
)


def _instantiations() -> Iterator[ModelConfig]:
    for task, task_fields in _TASKS.items():
        for name, backbone in _BACKBONES.items():
            for kind, features in _FEATURES.items():
                yield ModelConfig(preset=f"{task}_{name}_{kind}", backbone=backbone, **task_fields, **features)
    for task in ("fasterrcnn", "maskrcnn"):
        yield ModelConfig(preset=f"{task}_resnet50_fpn_v2", **_TASKS[task], **_V2)
    yield _TINY


PRESETS: Mapping[str, ModelConfig] = MappingProxyType({config.preset: config for config in _instantiations()})
"""Model configurations by name."""


def preset(name: str) -> ModelConfig:
    """Returns the configuration of that name. Raises UnknownPresetError, which lists the names that exist."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=3)
    others = sorted(set(PRESETS) - {"_".join(parts) for parts in _composed()})
    raise UnknownPresetError(
        f"no model preset {name!r}{'; did you mean ' + one_of(near) + '?' if near else ''}; known presets: "
        f"{', '.join(others)}, and TASK_BACKBONE_FEATURES with TASK one of {', '.join(_TASKS)}; "
        f"BACKBONE one of {', '.join(_BACKBONES)}; FEATURES one of {', '.join(_FEATURES)}"
    )


def _composed() -> Iterator[tuple[str, str, str]]:
    return ((task, backbone, kind) for task in _TASKS for backbone in _BACKBONES for kind in _FEATURES)
