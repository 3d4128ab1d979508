"""Configurations refuse contradictions, and COCO's categories are COCO's."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from torchvision.models.detection import KeypointRCNN_ResNet50_FPN_Weights, MaskRCNN_ResNet50_FPN_Weights

from masklake.model.coco_categories import COCO_CATEGORIES, PERSON
from masklake.model.config import Category, ModelConfig, PredictOptions
from masklake.model.presets import PRESETS


def test_the_class_logits_are_named_as_torchvisions() -> None:
    theirs = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    config = PRESETS["maskrcnn_resnet50_fpn"]
    assert [config.category_names.get(index, "__background__") for index in range(91)] == theirs
    assert config.num_classes == 91


def test_coco_has_80_categories_with_their_own_ids() -> None:
    assert len(COCO_CATEGORIES) == 80
    assert (COCO_CATEGORIES[0].id, COCO_CATEGORIES[-1].id) == (1, 90)
    assert {category.id for category in COCO_CATEGORIES}.isdisjoint({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})


def test_the_persons_keypoints_are_torchvisions_and_its_pairs_are_left_and_right() -> None:
    assert list(PERSON.keypoints) == KeypointRCNN_ResNet50_FPN_Weights.COCO_V1.meta["keypoint_names"]
    assert len(PERSON.flip_pairs) == 8
    for left, right in PERSON.flip_pairs:
        assert PERSON.keypoints[left].replace("left", "right") == PERSON.keypoints[right]


def test_a_preset_says_what_it_answers() -> None:
    tasks = {name: sorted(config.tasks) for name, config in PRESETS.items() if name.endswith("resnet50_fpn") or name == "tiny"}
    assert tasks == {
        "fasterrcnn_resnet50_fpn": ["box"],
        "maskrcnn_resnet50_fpn": ["box", "mask"],
        "keypointrcnn_resnet50_fpn": ["box", "keypoint"],
        "maskkeypointrcnn_resnet50_fpn": ["box", "keypoint", "mask"],
        "tiny": ["box", "keypoint", "mask"],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": (Category(id=1, name="a"), Category(id=1, name="b"))}, "same id"),
        ({"categories": (Category(id=1, name="a", keypoints=("x",), flip_pairs=((0, 1),)),)}, "does not have"),
        ({"categories": ()}, "at least 1 item"),
        ({"anchor_sizes": ((32,),)}, "P2..P6"),
        ({"score_treshold": 0.3}, "score_treshold"),
        ({"anchor_sizes": ((),) * 5}, "anchor_sizes"),
        ({"anchor_sizes": ((0,),) * 5}, "greater than 0"),
        ({"anchor_ratios": ()}, "anchor_ratios"),
        ({"anchor_ratios": (1.0, float("nan"))}, "finite"),
        ({"image_std": (0.0, 1.0, 1.0)}, "greater than 0"),
        ({"image_mean": (float("nan"), 0.0, 0.0)}, "finite"),
        ({"min_sizes": (-1,)}, "greater than 0"),
        ({"mask_channels": (64, 0)}, "greater than 0"),
        ({"keypoint_channels": (-1,)}, "greater than 0"),
        ({"mask_hidden": (0,)}, "greater than 0"),
        ({"box_delta_weights": (1.0, 1.0, 0.0, 1.0)}, "greater than 0"),
        ({"delta_clamp": float("inf")}, "finite"),
        ({"fpn_channels": 10**12}, "less than or equal"),
        ({"rpn_foreground_iou": 0.1, "rpn_background_iou": 0.9}, "would be both"),
        ({"backbone": {"depths": (0, 1, 1, 1)}}, "greater than 0"),
        ({"backbone": {"widths": (8, -1, 8, 8)}}, "greater than 0"),
    ],
)
def test_contradictions_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate({**PRESETS["tiny"].model_dump(), **change})


def test_a_configuration_survives_json() -> None:
    for config in PRESETS.values():
        assert ModelConfig.model_validate_json(config.model_dump_json()) == config


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_detections"):
        PredictOptions(max_detections=1001)
