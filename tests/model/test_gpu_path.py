"""Every preset on a pretended GPU: detections and training steps are the CPU's, whatever an image or a target holds."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from masklake.model import boxes
from masklake.model.config import ModelConfig, PredictOptions, TrainedPart
from masklake.model.devices import resolved
from masklake.model.fields import Precision
from masklake.model.heads.box import BoxHead
from masklake.model.heads.keypoint import KeypointHead
from masklake.model.heads.mask import ConvMaskHead
from masklake.model.inference_network import DTYPES
from masklake.model.instances import Instances, Target
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.presets import PRESETS
from masklake.model.transform import _to_device
from masklake.pipeline.training.recipe import PAPER, build_optimizer, clip
from tests.pretend_cuda import Log, pretend_cuda

# The neighbour's models: tests are no package, and are collected by their paths.
_found = importlib.util.spec_from_file_location("presets_beside", Path(__file__).with_name("test_presets.py"))
assert _found is not None
assert _found.loader is not None
presets = importlib.util.module_from_spec(_found)
_found.loader.exec_module(presets)

EVERYTHING = "maskkeypointrcnn_resnet50_fpn"
CLIPPED = PAPER.model_copy(update={"clip_norm": 1.0})


def smallest(name: str) -> ModelConfig:
    """The narrow preset with a block a stage and few regions: presets that differ in depth alone are one model here."""
    config = presets.narrow(name)
    changes = {
        "preset": "",
        "backbone": config.backbone.model_copy(update={"depths": (1, 1, 1, 1)}),
        "box_hidden": 16,
        "rpn_pre_nms_train": 100,
        "rpn_pre_nms_test": 60,
        "rpn_post_nms_train": 60,
        "rpn_post_nms_test": 30,
    }
    return config.model_copy(update=changes)


REPRESENTATIVES = {smallest(name): name for name in sorted(PRESETS, reverse=True)}


@pytest.fixture(autouse=True)
def _one_suppression(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's on both devices: close calls fall otherwise by torchvision's on a CPU, see test_boxes.py."""

    def exactly(found: Tensor, scores: Tensor, groups: Tensor, numbers: Tensor, iou: float) -> Tensor:
        every = torch.ones_like(numbers, dtype=torch.bool)
        return boxes._suppress_by_group(found, scores, groups, numbers, iou, every, len(found))

    monkeypatch.setattr(boxes, "_suppress_image_by_image", exactly)


def images(picture: Callable[..., Tensor]) -> list[Tensor]:
    return [picture(64, 64, 1), picture(50, 80, 2)]


def find(config: ModelConfig, pictures: list[Tensor], device: str, **options: Any) -> list[Instances]:
    torch.manual_seed(0)
    model = MaskRCNN(config).to(device).eval()
    chosen = {"score_threshold": 0.0, "max_detections": 12, "batch_size": 1} | options
    return model.predict(pictures, PredictOptions.model_validate(chosen))


def assert_same(found: list[Instances], expected: list[Instances], exact_masks: bool = True) -> None:
    for one, other in zip(found, expected, strict=True):
        for name in ("size", "boxes", "scores", "labels", "areas", "keypoints"):
            left, right = getattr(one, name), getattr(other, name)
            assert (left is None) == (right is None)
            if left is not None and name not in (() if exact_masks else ("areas", "keypoints")):
                np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-3, err_msg=name)
        if exact_masks:
            assert one.rles == other.rles


def step(
    config: ModelConfig,
    pictures: list[Tensor],
    targets: list[Target],
    device: str,
    learn: TrainedPart = "joint",
    fixed: bool = False,
) -> tuple[dict[str, float], list[Tensor]]:
    """A whole step of training: losses, and the weights after it."""
    torch.manual_seed(0)
    model = MaskRCNN(config).to(device).set_trained_part(learn, fixed_backbone=fixed).train()
    optimizer = build_optimizer(model, CLIPPED, 0.01)
    losses = model(pictures, targets)
    torch.stack(list(losses.values())).sum().backward()
    clip(model.parameters(), CLIPPED)
    optimizer.step()
    return {name: float(loss.detach()) for name, loss in losses.items()}, [
        weight.detach().cpu() for weight in model.parameters()
    ]


def assert_trains_alike(config: ModelConfig, pictures: list[Tensor], targets: list[Target], **how: Any) -> Log:
    expected, weights = step(config, pictures, targets, "cpu", **how)
    with pretend_cuda() as log:
        losses, there = step(config, pictures, targets, "cuda", **how)
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for one, other in zip(there, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    return log


def nothing(config: ModelConfig) -> Target:
    """An image without instances."""
    keypoints = torch.zeros(0, config.num_keypoints, 3)
    return Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 64, 64, dtype=torch.uint8), keypoints)


OF_EACH_KIND = {
    "tiny": "basic blocks",
    "maskkeypointrcnn_resnet101_fpn": "a pyramid, all branches",
    "maskkeypointrcnn_resnet101_c4": "one map, whose last stage is the heads'",
    "fasterrcnn_resnext101_32x4d_c5": "one map, groups, boxes alone",
    "maskrcnn_resnet50_fpn_v2": "batch norm, convolutions in the box head",
}
"""What `make test` runs; `make test-faults` runs all."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in OF_EACH_KIND else pytest.mark.faults) for name in REPRESENTATIVES.values()],
)
def test_every_preset_detects_and_learns_there(name: str, picture: Callable[..., Tensor]) -> None:
    config, pictures = smallest(name), images(picture)[:1]
    precisions: list[Precision] = ["fp32", "bf16"] if name == "maskkeypointrcnn_resnet101_fpn" else ["fp32"]
    for precision in precisions:
        expected = find(config, pictures, "cpu", precision=precision)
        with pretend_cuda() as log:
            found = find(config, pictures, "cuda", precision=precision)
        assert_same(found, expected)
        assert sum(log.launches.values()) > 100
    assert_trains_alike(config, pictures, [presets.target(config)])


def test_every_preset_is_one_of_them() -> None:
    assert {smallest(name) for name in PRESETS} == set(REPRESENTATIVES)
    assert OF_EACH_KIND.keys() <= set(REPRESENTATIVES.values())


@pytest.mark.faults
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_by_its_own_depth(name: str, picture: Callable[..., Tensor]) -> None:
    config, pictures = presets.narrow(name), images(picture)
    expected = find(config, pictures, "cpu")
    with pretend_cuda():
        assert_same(find(config, pictures, "cuda"), expected)
    assert_trains_alike(config, pictures[:1], [presets.target(config)])


VARIANTS: dict[str, dict[str, Any]] = {
    "Detectron2's pasting and resizing": {
        "paste": "detectron2",
        "resize": "pil",
        "clip_to_image": True,
        "image_channels": "bgr",
    },
    "largest of RoIPool": {"roi_pool": "pool", "roi_pool_mode": "max"},
    "mean of RoIPool": {"roi_pool": "pool", "roi_pool_mode": "avg"},
    "RoIWarp, softmax": {"roi_pool": "warp", "mask_output": "softmax", "keypoint_offset": 0.5},
    "adaptive RoIAlign, one mask for all": {"roi_sampling_ratio": 0, "roi_aligned": True, "mask_output": "agnostic"},
    "a fully connected mask head": {"mask_head": "mlp", "mask_hidden": (32, 32)},
    "an RPN of its own": {"rpn_backbone": "own"},
    "keypoints' probabilities": {"keypoint_score": "probability", "rpn_rank": "logit"},
    "resized masks": {"mask_resize": 20},
}


TOGETHER = (
    ("Detectron2's pasting and resizing", "largest of RoIPool", "a fully connected mask head", "an RPN of its own"),
    ("mean of RoIPool", "keypoints' probabilities", "resized masks"),
    ("RoIWarp, softmax",),
    ("adaptive RoIAlign, one mask for all",),
)
"""Conventions of different parts, which need no model of their own each."""


def assert_detects_and_trains_alike(changes: dict[str, Any], pictures: list[Tensor]) -> None:
    config = smallest(EVERYTHING).model_copy(update=changes)
    expected = find(config, pictures, "cpu")
    with pretend_cuda():
        assert_same(find(config, pictures, "cuda"), expected)
    assert_trains_alike(config, pictures[:1], [presets.target(config)])


@pytest.mark.parametrize("names", TOGETHER, ids=" + ".join)
def test_every_convention_runs_there(names: tuple[str, ...], picture: Callable[..., Tensor]) -> None:
    changes = {field: value for name in names for field, value in VARIANTS[name].items()}
    assert_detects_and_trains_alike(changes, [picture(64, 64, 1)])


@pytest.mark.faults
@pytest.mark.parametrize("what", VARIANTS)
def test_each_convention_runs_there_alone(what: str, picture: Callable[..., Tensor]) -> None:
    assert_detects_and_trains_alike(VARIANTS[what], images(picture))


def test_every_convention_is_in_one_of_them() -> None:
    assert sorted(name for names in TOGETHER for name in names) == sorted(VARIANTS)


OPTIONS: tuple[dict[str, Any], ...] = (
    {"score_threshold": 1.0},
    {"tasks": frozenset({"box"})},
    {"tasks": frozenset({"mask"})},
    {"tasks": frozenset({"keypoint"})},
    {"precision": "fp16"},
    {"max_detections": 1},
    {"score_threshold": 1.0, "tasks": frozenset({"box"}), "batch_size": 4},
)


def test_every_option_runs_there(picture: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model, pictures = MaskRCNN(smallest(EVERYTHING)).eval(), images(picture)[1:]
    chosen = [PredictOptions(**{"score_threshold": 0.0, "max_detections": 12, "batch_size": 1} | each) for each in OPTIONS]
    expected = [model.predict(pictures, options) for options in chosen]
    with pretend_cuda():
        model.to("cuda")
        for options, there in zip(chosen, expected, strict=True):
            assert_same(model.predict(pictures, options), there)
            assert model.predict([], options) == []


def waits(log: Log) -> Counter[tuple[str, str]]:
    """How often the host waited, by what and in which file."""
    return sum((Counter({(what, at.rpartition(":")[0]): n}) for (what, at), n in log.syncs.items()), Counter())


def test_how_often_the_host_waits(picture: Callable[..., Tensor]) -> None:
    """For a batch of two images, and for a step of them: a GPU stands still each time, so none is added unnoticed."""
    config, pictures = smallest(EVERYTHING), [picture(64, 64, seed) for seed in (1, 2)]
    targets = [presets.target(config)] * 2
    with pretend_cuda() as log:
        torch.manual_seed(0)
        model = MaskRCNN(config).to("cuda").train()
        for _ in range(2):  # constants are sent at the first
            log.clear()
            torch.stack(list(model(pictures, targets).values())).sum().backward()
        assert waits(log) == {
            ("boolean index", "model/boxes.py"): 1,
            ("tolist", "model/sampling.py"): 2,  # of anchors and of regions
            ("nonzero", "model/sampling.py"): 2,
            ("tolist", "model/rois/targets.py"): 1,
            ("to the host", "model/devices.py"): 1,
            ("nonzero", "model/heads/keypoint.py"): 1,
        }, log.report()
        model.eval()
        for _ in range(2):
            log.clear()
            model.predict(pictures, PredictOptions(score_threshold=0.0, max_detections=12, batch_size=2))
        assert waits(log) == {
            ("boolean index", "model/boxes.py"): 2,
            ("nonzero", "model/inference.py"): 2,  # scores above the threshold, classes with keypoints
            ("to the host", "model/devices.py"): 1,
        }, log.report()


def test_proposals_are_the_cpus(picture: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = MaskRCNN(smallest(EVERYTHING)).eval()
    expected = model.propose(images(picture))
    with pretend_cuda():
        for one, other in zip(model.to("cuda").propose(images(picture)), expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-3)


def test_images_without_instances_are_learnt_from_there(picture: Callable[..., Tensor]) -> None:
    config, pictures = smallest(EVERYTHING), images(picture)
    assert_trains_alike(config, pictures, [nothing(config), nothing(config)])
    assert_trains_alike(config, pictures, [nothing(config), presets.target(config)])


@pytest.mark.parametrize(("learn", "fixed"), [("rpn", False), ("rpn", True), ("detector", True)])
def test_each_stage_learns_alone_there(learn: TrainedPart, fixed: bool, picture: Callable[..., Tensor]) -> None:
    config = smallest(EVERYTHING)
    assert_trains_alike(config, images(picture)[:1], [presets.target(config)], learn=learn, fixed=fixed)


def test_given_proposals_are_learnt_from_there(picture: Callable[..., Tensor]) -> None:
    config = smallest(EVERYTHING)
    target = presets.target(config)
    given = [
        dataclasses.replace(target, proposals=target.boxes + 3),
        dataclasses.replace(nothing(config), proposals=torch.zeros(0, 4)),
    ]
    assert_trains_alike(config, images(picture), given, learn="detector")


def test_a_batch_is_full_whatever_is_in_it(picture: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's library chooses by the number of images, so an image's label would depend on how many share its canvas."""
    config, alike = smallest(EVERYTHING), [picture(64, 64, seed) for seed in range(3)]
    seen: list[tuple[int, ...]] = []

    def batches(count: int, size: int) -> list[Instances]:
        seen.clear()
        with pretend_cuda():
            torch.manual_seed(0)
            model = MaskRCNN(config).to("cuda").eval()
            forward = type(model.network.backbone).forward

            def watched(backbone: Any, pixels: Tensor) -> Any:
                seen.append(tuple(pixels.shape))
                return forward(backbone, pixels)

            with monkeypatch.context() as patch:
                patch.setattr(type(model.network.backbone), "forward", watched)
                return model.predict(alike[:count], PredictOptions(score_threshold=0.0, max_detections=12, batch_size=size))

    alone = batches(1, 2)
    assert seen == [(2, 3, 64, 64)]
    together = batches(3, 2)
    assert seen == [(2, 3, 64, 64)] * 2
    assert_same(together[:1], alone)
    assert len(together) == 3
    assert_same(batches(3, 1), together, exact_masks=False)  # other batches may differ in last bits
    assert seen == [(1, 3, 64, 64)] * 3


def test_single_precision_is_one_thing_there_and_the_callers_settings_come_back(
    picture: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, seen = smallest("fasterrcnn_resnet50_c5"), []
    parts = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]

    def state() -> tuple[object, ...]:
        return (*[part.fp32_precision for part in parts], torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)

    with pretend_cuda(), monkeypatch.context() as patch:
        before = state()
        torch.manual_seed(0)
        model = MaskRCNN(config).to("cuda").eval()
        backbone = type(model.network.backbone)
        forward = backbone.forward
        patch.setattr(
            backbone, "forward", lambda part, pixels: (seen.append((state(), pixels.dtype)), forward(part, pixels))[1]
        )
        precisions: list[Any] = ["fp32", "tf32", "bf16", "auto"]
        for precision in precisions:
            model.predict(images(picture)[:1], PredictOptions(precision=precision))
            assert state() == before
        model.propose(images(picture)[:1])
        assert state() == before
    exact, rounded = ("ieee", "ieee", False, True), ("tf32", "tf32", False, True)
    single, half = torch.float32, torch.bfloat16
    assert seen == [(exact, single), (rounded, single), (exact, half), (exact, half), (exact, single)]


@pytest.mark.parametrize(("bf16", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_where_the_card_has_it(bf16: bool, expected: torch.dtype) -> None:
    with pretend_cuda(bf16=bf16):
        assert DTYPES[resolved("auto", torch.device("cuda"))] == expected
        assert resolved("auto", torch.device("cpu")) == "fp32"


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("maskrcnn_resnet50_fpn", [("BoxHead", 13), ("ConvMaskHead", 12)]),
        ("keypointrcnn_resnet50_fpn", [("BoxHead", 13), ("KeypointHead", 12)]),
    ],
)
def test_heads_always_get_as_many_regions(
    preset: str, sizes: list[tuple[str, int]], picture: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library's algorithm, and so the last bits, depend on that number: not on how many the batch has."""
    monkeypatch.setattr("masklake.model.inference.PROPOSALS_AT_ONCE", 13)
    config, given = smallest(preset), Counter[tuple[str, int]]()
    config = config.model_copy(update={"categories": tuple(c for c in config.categories if c.keypoints) or config.categories})
    expected = find(config, images(picture), "cpu")

    def count(part: nn.Module, inputs: Any) -> None:
        given[type(part).__name__, len(inputs[0])] += 1

    for head in (BoxHead, ConvMaskHead, KeypointHead):

        def make(self: Any, *args: Any, made: Any = head.__init__, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            self.register_forward_pre_hook(count)

        monkeypatch.setattr(head, "__init__", make)
    with pretend_cuda():
        for batch in (1, 2):
            assert_same(find(config, images(picture), "cuda", batch_size=batch), expected)
    assert sorted(given) == sizes, "one size for each head, whatever the batch"
    assert given["BoxHead", 13] > 4, "more than one block"


def test_images_travel_as_decoders_store_them(picture: Callable[..., Tensor]) -> None:
    """Pixel by pixel or plane by plane, and shapes that could be either; in one pinned copy."""
    by_plane = [picture(5, 7, 1), picture(3, 3, 2), picture(3, 1, 3)]
    by_pixel = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in by_plane]
    sent = [*by_plane, *by_pixel, picture(9, 9, 4)[:, 2:6, 1:8], picture(8, 6, 5).transpose(1, 2)]
    with pretend_cuda() as log:
        there = _to_device(sent, torch.device("cuda"))
        assert [(what, at.split(":")[0]) for what, at in log.copies] == [("to the device, pinned", "model/transform.py")]
        assert not log.syncs
        for image, original in zip(there, sent, strict=True):
            assert image.is_cuda
            assert torch.equal(image.cpu(), original)
