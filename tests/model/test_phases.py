"""The paper's ways to train: each phase changes what it trains and leaves everything else as it is, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from masklake.model.config import BackboneConfig, ModelConfig, PredictOptions
from masklake.model.create import create_model
from masklake.model.errors import ConfigError
from masklake.model.instances import Target
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.phases import PHASES, Phase, begin_phase, with_rpn_backbone
from masklake.model.weights.checkpoint import dumps, load_checkpoint

LOOSE = PredictOptions(score_threshold=0.0, max_detections=20)  # random weights: report something
FIRST = {"rpn_objectness", "rpn_box"}
SECOND = {"classifier", "box", "mask", "keypoint"}


@pytest.fixture
def model(tiny_config: ModelConfig) -> MaskRCNN:
    torch.manual_seed(0)
    return create_model(tiny_config)


@pytest.fixture
def image(picture: Callable[..., Tensor]) -> Tensor:
    return picture(64, 96, 1)


def target(proposals: Tensor | None = None) -> Target:
    masks = torch.zeros(2, 64, 96, dtype=torch.uint8)
    masks[0, 8:40, 8:40], masks[1, 20:60, 40:90] = 1, 1
    keypoints = torch.zeros(2, 4, 3)
    keypoints[1] = torch.tensor([[50.0, 30, 2], [60, 50, 2], [70, 30, 1], [80, 40, 2]])
    boxes = torch.tensor([[8.0, 8, 40, 40], [40, 20, 90, 60]])
    return Target(boxes, torch.tensor([3, 20]), masks, keypoints, proposals)


def without_objects(proposals: Tensor | None = None) -> Target:
    masks = torch.zeros(0, 64, 96, dtype=torch.uint8)
    return Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), masks, torch.zeros(0, 4, 3), proposals)


def train(model: MaskRCNN, image: Tensor, truth: Target, steps: int = 2) -> set[str]:
    """A few updates; the names of the losses. Every weight that learns must get a gradient, and no other."""
    model.train()
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(steps):
        losses = model([image], [truth])
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        assert {n for n, w in model.named_parameters() if w.grad is not None} == {
            n for n, w in model.named_parameters() if w.requires_grad
        }
        optimizer.step()
    return set(losses)


def copy_of(model: MaskRCNN) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


def changed_parts(before: Mapping[str, Tensor], model: MaskRCNN) -> set[str]:
    """The network's parts of which any weight or statistic is another one now."""
    after = model.network.state_dict()
    assert before.keys() == after.keys()
    return {name.partition(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}


HEADS = {"box_head", "mask_head", "keypoint_head"}


@pytest.mark.parametrize(
    ("phase", "changes", "names"),
    [
        (Phase("joint"), {"backbone", "rpn", *HEADS}, FIRST | SECOND),
        (Phase("joint", "own"), {"backbone", "rpn_backbone", "rpn", *HEADS}, FIRST | SECOND),
        (Phase("rpn"), {"backbone", "rpn"}, FIRST),
        (PHASES["four_step"][0], {"rpn_backbone", "rpn"}, FIRST),
        (PHASES["four_step"][1], {"backbone", *HEADS}, SECOND),
        (PHASES["four_step"][2], {"rpn"}, FIRST),
        (PHASES["four_step"][3], HEADS, SECOND),
    ],
)
def test_only_what_learns_changes(phase: Phase, changes: set[str], names: set[str], model: MaskRCNN, image: Tensor) -> None:
    model = begin_phase(model, phase)
    before = copy_of(model)
    assert train(model, image, target()) == names
    assert changed_parts(before, model) == changes


def test_the_four_steps_end_in_one_network_on_one_backbone(model: MaskRCNN, image: Tensor) -> None:
    keys, states = set(model.network.state_dict()), []
    for phase in PHASES["four_step"]:
        model = begin_phase(model, phase)
        train(model, image, target())
        states.append(copy_of(model))
    rpn, detector, shared, final = states
    assert set(final) == keys
    assert any(name.startswith("rpn_backbone.") for name in rpn)

    def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor], *parts: str) -> bool:
        return all(torch.equal(left[name], right[name]) for name in left if name.partition(".")[0] in parts)

    assert equal(rpn, detector, "rpn", "rpn_backbone")
    assert equal(detector, shared, "backbone", *HEADS)
    assert equal(shared, final, "backbone", "rpn")
    assert not equal(detector, shared, "rpn"), "the RPN of other maps is not kept"
    assert model.config.rpn_backbone == "shared"
    assert len(model.predict([image], LOOSE)[0]) == 20


@pytest.mark.parametrize("features", ["fpn", "c4"])
def test_a_fixed_part_keeps_its_statistics_and_frozen_stages_stay_frozen(
    features: str, tiny_config: ModelConfig, image: Tensor
) -> None:
    backbone = BackboneConfig.model_validate({**tiny_config.backbone.model_dump(), "norm": "batch", "frozen_stages": 2})
    changes: dict[str, object] = {"backbone": backbone, "features": features}
    if features == "c4":
        changes |= {"anchor_sizes": ((12, 24, 48, 96, 192),), "box_layers": 0}
    model = create_model(ModelConfig.model_validate({**tiny_config.model_dump(), **changes}))
    for phase, changing in zip(PHASES["separate"], ("rpn_backbone", "backbone"), strict=True):
        model = begin_phase(model, phase)
        before = copy_of(model)
        train(model, image, target())
        fixed = ({"backbone", "rpn_backbone"} - {changing}).pop()
        assert changing in changed_parts(before, model)
        assert fixed not in changed_parts(before, model)
        learning = {name for name, weight in model.network.named_parameters() if weight.requires_grad}
        assert not any(name.startswith((f"{changing}.body.stem.", f"{changing}.body.stages.0.")) for name in learning)
        assert any(name.startswith(f"{changing}.body.stages.1.") for name in learning)
    assert (features == "c4") == any(name.startswith("roi_stage.") for name in learning)
    names = set(dict(model.set_trained_part("joint").network.named_parameters()))
    learning = {name for name, weight in model.network.named_parameters() if weight.requires_grad}
    assert names - learning == {name for name in names if ".body.stem." in name or ".body.stages.0." in name}


def test_a_backbone_of_the_rpns_own_starts_as_a_copy(model: MaskRCNN, image: Tensor) -> None:
    own = with_rpn_backbone(model, "own")
    for left, right in zip(model.predict([image], LOOSE), own.predict([image], LOOSE), strict=True):
        np.testing.assert_array_equal(left.boxes, right.boxes)
        np.testing.assert_array_equal(left.scores, right.scores)
    assert own.model_id != model.model_id
    assert with_rpn_backbone(own, "own") is own


def test_both_networks_travel_in_one_checkpoint(model: MaskRCNN, image: Tensor) -> None:
    own = begin_phase(model, PHASES["separate"][0])
    train(own, image, target())
    again = load_checkpoint(dumps(own))
    assert again.model_id == own.model_id
    np.testing.assert_array_equal(again.propose([image])[0], own.eval().propose([image])[0])
    with torch.no_grad():
        again.network.backbone.fpn.output[0][0].weight.zero_()
    np.testing.assert_array_equal(again.propose([image])[0], own.propose([image])[0])
    with torch.no_grad():
        again.network.rpn_backbone.fpn.output[0][0].weight.zero_()
    assert not np.array_equal(again.propose([image])[0], own.propose([image])[0])


def test_proposals_are_in_the_images_pixels_and_as_many_as_in_training(tiny_config: ModelConfig, image: Tensor) -> None:
    torch.manual_seed(0)
    config = tiny_config.model_copy(update={"upscale": True, "min_sizes": (128,), "rpn_post_nms_test": 3})
    model = create_model(config)
    [boxes] = model.propose([image])
    assert 3 < len(boxes) <= config.rpn_post_nms_train
    assert (boxes[:, 2:] <= (96, 64)).all()
    assert boxes[:, 2].max() > 90, "twice as large on the canvas"
    assert not model.network.rpn.training


def test_given_proposals_take_the_place_of_the_rpns(model: MaskRCNN, image: Tensor) -> None:
    model = begin_phase(model, PHASES["separate"][1]).train()
    [proposals] = model.propose([image])

    def losses(given: Tensor | None) -> list[float]:
        torch.manual_seed(3)
        return [loss.item() for loss in model([image], [target(given)]).values()]

    # What inference computes differs from training's arithmetic in its last bits alone.
    assert losses(torch.from_numpy(proposals)) == pytest.approx(losses(None), rel=1e-2)
    assert losses(torch.zeros(0, 4))[1] > 2 * losses(None)[1], "ground truth alone: every region is an object"


@pytest.mark.parametrize("proposals", [torch.zeros(0, 4), torch.tensor([[4.0, 4, 30, 30]])])
def test_an_image_without_objects_trains_a_detector_on_given_proposals(
    proposals: Tensor, model: MaskRCNN, image: Tensor
) -> None:
    """The helper checks that every weight gets a gradient: with several workers each waits for all of them."""
    train(begin_phase(model, Phase("detector")), image, without_objects(proposals))


def test_proposals_that_cannot_be_are_refused(model: MaskRCNN, image: Tensor) -> None:
    model.set_trained_part("detector").train()
    with pytest.raises(ConfigError, match="1 of the 2 targets has proposals"):
        model([image, image], [target(torch.zeros(0, 4)), target()])
    with pytest.raises(ConfigError, match=r"a backbone that learns with it.*rpn_backbone"):
        model([image], [target()])
    model.set_trained_part("detector", fixed_backbone=True)([image], [target()])
