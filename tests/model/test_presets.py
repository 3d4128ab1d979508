"""Every instantiation of the paper trains and predicts, with its layers made narrow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from masklake.model import create_model
from masklake.model.build import build_mask_head
from masklake.model.config import Category, ModelConfig
from masklake.model.errors import UnknownPresetError
from masklake.model.instances import Target
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.presets import PRESETS, preset

CATEGORIES = (Category(id=1, name="disk"), Category(id=2, name="arrow", keypoints=("tip", "tail")))
BACKBONES = sorted({name.split("_", 1)[1].rpartition("_")[0] for name in PRESETS if name.endswith("_c4")})
FEATURES = ("fpn", "c4", "c5", "dc5")
TASKS = ("fasterrcnn", "maskrcnn", "keypointrcnn", "maskkeypointrcnn")


def narrow(name: str) -> ModelConfig:
    """The preset's own shape with an eighth of its channels and small images, so that a step takes a moment."""
    config = PRESETS[name]
    backbone = config.backbone.model_copy(
        update={"widths": (16, 16, 32, 64), "stem_channels": 16, "norm": "group", "frozen_stages": 0}
        | ({"groups": 8, "group_width": 8 * 64 // 16} if config.backbone.groups > 1 else {})
    )
    changes = {
        "categories": CATEGORIES,
        "backbone": backbone,
        "fpn_channels": 32,
        "box_hidden": 32,
        "box_channels": (32,) * len(config.box_channels),
        "mask_channels": (16,) * len(config.mask_channels),
        "mask_deconv_channels": 16,
        "keypoint_channels": (16, 16),
        "min_sizes": (64,),
        "max_size": 128,
        "roi_samples": 16,
        "anchor_sizes": tuple(tuple(size // 4 for size in sizes) for sizes in config.anchor_sizes),
    }
    return ModelConfig.model_validate(config.model_copy(update=changes).model_dump())


def target(config: ModelConfig) -> Target:
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 8:40, 8:40], masks[1, 20:60, 30:60] = 1, 1
    return Target(
        boxes=torch.tensor([[8.0, 8, 40, 40], [30, 20, 60, 60]]),
        labels=torch.tensor([1, 2]),
        masks=masks,
        keypoints=torch.tensor([[[0.0, 0, 0]] * 2, [[40.0, 30, 2], [50, 50, 2]]]),
    )


def train(config: ModelConfig, image: Tensor, steps: int = 3) -> list[float]:
    torch.manual_seed(0)
    model = MaskRCNN(config).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    totals = []
    for _ in range(steps):
        losses = model([image], [target(config)])
        expected = {"rpn_objectness", "rpn_box", "classifier", "box", *config.tasks - {"box"}}
        assert set(losses) == expected
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not without, "a weight that no loss reaches"
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        totals.append(float(total.detach()))
    found = model.predict([image])[0]
    assert (found.rles is not None, found.keypoints is not None) == ("mask" in config.tasks, "keypoint" in config.tasks)
    return totals


NAMES = [f"maskkeypointrcnn_{backbone}_{kind}" for backbone in BACKBONES for kind in FEATURES]
NAMES += [f"{task}_resnet50_{kind}" for task in TASKS[:3] for kind in FEATURES]
NAMES += ["fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2"]


@pytest.mark.parametrize("name", NAMES)
def test_instantiations_train_and_predict(name: str, picture: Callable[..., Tensor]) -> None:
    totals = train(narrow(name), picture(64, 64, 1))
    assert all(total == total and total < 1e4 for total in totals)


@pytest.mark.parametrize("pool", ["align", "pool", "warp"])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_region_operators_are_a_matter_of_configuration(pool: str, mode: str, picture: Callable[..., Tensor]) -> None:
    config = narrow("maskrcnn_resnet50_fpn").model_copy(update={"roi_pool": pool, "roi_pool_mode": mode})
    totals = train(config, picture(64, 64, 1), steps=8)
    assert min(totals[-3:]) < totals[0]


@pytest.mark.parametrize("kind", ["fcn", "mlp"])
@pytest.mark.parametrize("output", ["sigmoid", "softmax", "agnostic"])
@pytest.mark.parametrize("features", ["fpn", "c4"])
def test_mask_heads_are_a_matter_of_configuration(
    kind: str, output: str, features: str, picture: Callable[..., Tensor]
) -> None:
    changes = {"mask_head": kind, "mask_output": output, "mask_hidden": (32, 32)}
    train(narrow(f"maskrcnn_resnet50_{features}").model_copy(update=changes), picture(64, 64, 1))


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"tiny"}))
def test_the_papers_numbers(name: str) -> None:
    """docs/models.md, "The paper's numbers", says which section each is from."""
    config = PRESETS[name]
    one_map = config.features != "fpn"
    assert (config.roi_samples, config.rpn_post_nms_test) == ((64, 300) if config.features == "c4" else (512, 1000))
    assert (config.roi_positive_fraction, config.roi_foreground_iou) == (0.25, 0.5)
    scales = (32, 64, 128, 256, 512)
    assert config.anchor_sizes == ((scales,) if one_map else tuple((scale,) for scale in scales))
    assert config.anchor_ratios == (0.5, 1.0, 2.0)
    assert (config.rpn_foreground_iou, config.rpn_background_iou) == (0.7, 0.3)
    assert (config.rpn_samples, config.rpn_positive_fraction) == (256, 0.5)
    assert (config.rpn_nms_iou, config.rpn_post_nms_train) == (0.7, 2000)
    assert (config.rpn_pre_nms_train, config.rpn_pre_nms_test) == ((12000, 6000) if one_map else (2000, 1000))
    assert (config.roi_canonical_size, config.roi_canonical_level) == (224, 4)
    assert (config.nms_iou, config.score_threshold, config.max_detections) == (0.5, 0.05, 100)
    assert config.mask_threshold == 0.5
    assert (min(config.min_sizes), config.min_sizes[-1], config.max_size) == (640 if config.keypoint else 800, 800, 1333)
    assert config.rpn_backbone == "shared"


@pytest.mark.parametrize(("features", "side"), [("fpn", 28), ("c4", 14)])
def test_the_papers_masks_are_of_its_size(features: str, side: int) -> None:
    """Figure 4."""
    assert build_mask_head(PRESETS[f"maskrcnn_resnet50_{features}"]).side == side


def test_parameters_of_the_well_known_ones() -> None:
    """Counted in torchvision's and Detectron2's models."""
    millions = {
        name: sum(parameter.numel() for parameter in create_model(name).parameters()) / 1e6
        for name in ("maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2")
    }
    assert millions == {
        "maskrcnn_resnet50_fpn": pytest.approx(44.3, abs=0.2),
        "maskrcnn_resnet50_fpn_v2": pytest.approx(46.4, abs=0.2),
    }


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        UnknownPresetError, match=r"did you mean maskrcnn_resnet50_fpn.*known presets: .*tiny.*resnext101_32x8d"
    ):
        preset("maskrcnn_resnet_50_fpn")
