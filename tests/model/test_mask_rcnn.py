"""The model learns, answers in the data set's categories, and survives odd images."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from masklake.model.config import ModelConfig, PredictOptions
from masklake.model.create import create_model
from masklake.model.errors import ConfigError
from masklake.model.instances import Instances, Target
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.masks.rle import decode
from masklake.model.weights.checkpoint import save_checkpoint

LOOSE = PredictOptions(score_threshold=0.0, max_detections=30)  # random weights: report something


def drawn(seed: int, size: int = 96) -> tuple[Tensor, Target]:
    """A dark picture with a disk (3), a square (7) and a diamond (20) whose keypoints are its corners."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    image = torch.full((3, size, size), 40.0) + torch.randn(3, size, size, generator=generator) * 4
    masks, keypoints = [], torch.zeros(3, 4, 3)
    for index, (cx, cy) in enumerate([(24, 26), (68, 24), (46, 68)]):
        shift = torch.rand(2, generator=generator) * 8 - 4
        cx, cy, radius = cx + float(shift[0]), cy + float(shift[1]), 12.0 + 4 * index
        dx, dy = (x - cx).abs(), (y - cy).abs()
        inside = [dx**2 + dy**2 < radius**2, torch.maximum(dx, dy) < radius * 0.8, dx + dy < radius][index]
        image[index, inside] = 220
        masks.append(inside)
        if index == 2:
            keypoints[2, :, :2] = torch.tensor([[0, -1], [-1, 0], [1, 0], [0, 1]]) * (radius - 1) + torch.tensor([cx, cy])
            keypoints[2, :, 2] = 2
    stack = torch.stack(masks)
    boxes = torch.stack([torch.cat([p.flip(1).amin(0), p.flip(1).amax(0) + 1]) for p in map(torch.nonzero, stack)]).float()
    target = Target(boxes, torch.tensor([3, 7, 20]), stack.to(torch.uint8), keypoints)
    return image.clamp(0, 255).to(torch.uint8), target


def empty_target(size: int) -> Target:
    return Target(
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, size, size, dtype=torch.uint8),
        torch.zeros(0, 4, 3),
    )


@pytest.fixture
def model(tiny_config: ModelConfig) -> MaskRCNN:
    torch.manual_seed(0)
    return create_model(tiny_config)


@pytest.fixture(scope="module")
def trained(tiny_config: ModelConfig) -> tuple[MaskRCNN, list[tuple[Tensor, Target]], list[float]]:
    """`tiny` overfitted to three pictures, and its loss at every step."""
    torch.manual_seed(0)
    model = create_model(tiny_config).train()
    pictures = [drawn(seed) for seed in range(3)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(80):
        loss = torch.stack(list(model(*zip(*pictures, strict=True)).values())).sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimiser.step()
        losses.append(loss.item())
    return model.eval(), pictures, losses


def assert_same(left: Instances, right: Instances) -> None:
    """Bit by bit."""
    for name in ("boxes", "scores", "labels", "areas", "keypoints"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    assert left.rles == right.rles
    assert left.size == right.size


def test_training_lowers_the_loss(trained: tuple[MaskRCNN, object, list[float]]) -> None:
    losses = trained[2]
    assert np.mean(losses[-5:]) < 0.3 * losses[0]


def test_a_trained_model_finds_the_shapes_their_masks_and_keypoints(
    trained: tuple[MaskRCNN, list[tuple[Tensor, Target]], list[float]],
) -> None:
    model, pictures, _ = trained
    found = model.predict([image for image, _ in pictures], PredictOptions(score_threshold=0.5))
    for instances, (_, target) in zip(found, pictures, strict=True):
        for index, label in enumerate(target.labels.tolist()):
            rows = np.flatnonzero(instances.labels == label)
            assert len(rows) >= 1
            row = rows[0]
            mask, truth = decode(instances.rles[row], instances.size).astype(bool), target.masks[index].numpy().astype(bool)
            assert (mask & truth).sum() / (mask | truth).sum() > 0.6
            assert instances.areas[row] == mask.sum()
            if label == 20:
                distance = np.abs(instances.keypoints[row, :, :2] - target.keypoints[index, :, :2].numpy())
                assert np.median(distance) < 4
            else:
                assert np.isnan(instances.keypoints[row]).all()


def test_gradients_reach_every_trainable_weight(model: MaskRCNN) -> None:
    images, targets = zip(*(drawn(seed) for seed in range(2)), strict=True)
    sum(model.train()(images, targets).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_an_image_without_objects_still_trains_and_gives_every_weight_a_gradient(model: MaskRCNN) -> None:
    losses = model.train()([drawn(0)[0]], [empty_target(96)])
    sum(losses.values()).backward()
    assert losses["mask"] == 0
    assert losses["keypoint"] == 0
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_objects_without_area_are_left_out(model: MaskRCNN) -> None:
    image, target = drawn(0)
    flat = Target(
        torch.cat([target.boxes, torch.tensor([[5.0, 5, 5, 9]])]),
        torch.cat([target.labels, torch.tensor([3])]),
        torch.cat([target.masks, torch.zeros_like(target.masks[:1])]),
        torch.cat([target.keypoints, torch.zeros(1, 4, 3)]),
    )
    assert all(loss.isfinite() for loss in model.train()([image], [flat]).values())


def test_a_batch_of_different_sizes_trains(model: MaskRCNN) -> None:
    images, targets = zip(drawn(0, 96), drawn(1, 128), strict=True)
    assert all(loss.isfinite() for loss in model.train()(images, targets).values())


def test_targets_that_do_not_fit_are_named(model: MaskRCNN) -> None:
    image, target = drawn(0)
    with pytest.raises(ConfigError, match=r"\[5\] are not categories"):
        model([image], [Target(target.boxes, torch.tensor([3, 5, 20]), target.masks, target.keypoints)])
    with pytest.raises(ConfigError, match="mask branch"):
        model([image], [Target(target.boxes, target.labels, None, target.keypoints)])
    with pytest.raises(ConfigError, match="keypoint branch"):
        model([image], [Target(target.boxes, target.labels, target.masks, None)])
    with pytest.raises(ConfigError, match="one target per image"):
        model([image], [])


def test_results_do_not_depend_on_batch_mates(
    trained: tuple[MaskRCNN, list[tuple[Tensor, Target]], list[float]], picture: Callable[..., Tensor]
) -> None:
    model, pictures, _ = trained
    images = [image for image, _ in pictures] + [picture(96, 90, 1), picture(128, 60, 2), picture(70, 96, 3)]
    alone = [model.predict([image], LOOSE)[0] for image in images]
    for batch_size in (1, 4, 8):
        together = model.predict(images, LOOSE.model_copy(update={"batch_size": batch_size}))
        for left, right in zip(alone, together, strict=True):
            assert_same(left, right)


def test_a_batch_finds_what_its_images_give_alone(
    trained: tuple[MaskRCNN, list[tuple[Tensor, Target]], list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batched path that a GPU takes, on this device: equal up to the order of sums."""
    model, pictures, _ = trained
    images = [image for image, _ in pictures]
    options = PredictOptions(score_threshold=0.5)
    alone = model.predict(images, options)
    monkeypatch.setattr(MaskRCNN, "_batch_size", lambda self, options: 4)
    for left, right in zip(alone, model.predict(images, options), strict=True):
        assert left.labels.tolist() == right.labels.tolist()
        np.testing.assert_allclose(left.boxes, right.boxes, atol=1e-2)
        np.testing.assert_allclose(left.keypoints, right.keypoints, atol=0.5)


def test_answers_are_in_the_data_sets_terms(model: MaskRCNN, picture: Callable[..., Tensor]) -> None:
    [found] = model.predict([picture(120, 80)], LOOSE)
    assert len(found) == 30
    assert found.boxes.dtype == found.scores.dtype == np.float32
    assert found.labels.dtype == np.int64
    assert set(found.labels.tolist()) <= {3, 7, 20}
    assert (np.diff(found.scores) <= 0).all()
    assert (found.boxes >= 0).all()
    assert (found.boxes[:, 2] <= 80).all()
    assert (found.boxes[:, 3] <= 120).all()
    assert decode(found.rles[0], found.size).shape == (120, 80)
    assert found.keypoints.shape == (30, 4, 3)


def test_only_the_wanted_tasks_run(model: MaskRCNN, picture: Callable[..., Tensor]) -> None:
    [found] = model.predict([picture(64, 64)], LOOSE.model_copy(update={"tasks": frozenset({"box"})}))
    assert found.rles is None
    assert found.areas is None
    assert found.keypoints is None


def test_a_task_without_a_branch_is_refused(tiny_config: ModelConfig, picture: Callable[..., Tensor]) -> None:
    model = create_model(tiny_config.model_copy(update={"keypoint": False}))
    with pytest.raises(ConfigError, match="no branch for keypoint"):
        model.predict([picture(64, 64)], PredictOptions(tasks=frozenset({"keypoint"})))


def test_categories_without_keypoints_build_no_keypoint_branch(tiny_config: ModelConfig) -> None:
    config = ModelConfig.model_validate({**tiny_config.model_dump(), "categories": tiny_config.categories[:2]})
    assert config.tasks == {"box", "mask"}
    assert not any(name.startswith("keypoint_head") for name in create_model(config).network.state_dict())


def test_nothing_in_nothing_out(model: MaskRCNN, picture: Callable[..., Tensor]) -> None:
    assert model.predict([]) == []
    [found] = model.predict([picture(64, 64)], PredictOptions(score_threshold=1.0))
    assert len(found) == 0
    assert found.rles == []
    assert found.boxes.shape == (0, 4)
    assert found.keypoints.shape == (0, 4, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 10_000), (10_000, 40)])
def test_odd_images_are_answered(size: tuple[int, int], model: MaskRCNN, picture: Callable[..., Tensor]) -> None:
    [found] = model.predict([picture(*size)], LOOSE)
    assert found.size == size
    assert np.isfinite(found.boxes).all()


def test_a_large_image_with_many_detections_needs_little_memory(tmp_path: Path, tiny_config: ModelConfig) -> None:
    """Twelve megapixels and 300 instances, most of them large: whole masks alone would take 3.6 GB."""
    sizes = tuple((size,) for size in (32, 64, 64, 96, 96))  # of a canvas of 96 x 128
    changes = {"rpn_score_threshold": 0.0, "nms_iou": 1.0, "score_threshold": 0.0, "anchor_sizes": sizes}
    torch.manual_seed(0)
    model = create_model(tiny_config.model_copy(update=changes))
    torch.nn.init.constant_(model.network.mask_head.logits.bias, 3.0)
    save_checkpoint(model, tmp_path / "tiny.safetensors")
    script = (
        "import resource, sys, torch\n"
        "from masklake.model import PredictOptions, load_checkpoint\n"
        "model = load_checkpoint(sys.argv[1])\n"
        "options = PredictOptions(max_detections=300)\n"
        "model.predict([torch.zeros(3, 96, 96, dtype=torch.uint8)], options)\n"
        "image = torch.randint(0, 256, (3, 3000, 4000), dtype=torch.uint8)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "[found] = model.predict([image], options)\n"
        "print(len(found), int(found.areas.max()), (peak() - before) // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "tiny.safetensors"], capture_output=True, text=True, check=True
    )
    count, largest, mebibytes = map(int, done.stdout.split())
    assert count == 300
    assert largest > 1_000_000
    assert mebibytes < 1024


def test_weights_that_are_not_finite_find_nothing_and_do_not_crash(model: MaskRCNN, picture: Callable[..., Tensor]) -> None:
    with torch.no_grad():
        model.network.box_head.bbox_pred.bias.fill_(torch.nan)
    assert len(model.predict([picture(64, 64)], LOOSE)[0]) == 0


def test_bf16_agrees_with_fp32_in_the_large(trained: tuple[MaskRCNN, list[tuple[Tensor, Target]], list[float]]) -> None:
    model, pictures, _ = trained
    for image, _ in pictures:
        exact = model.predict([image], PredictOptions(score_threshold=0.5))[0]
        rough = model.predict([image], PredictOptions(score_threshold=0.5, precision="bf16"))[0]
        assert exact.labels.tolist() == rough.labels.tolist() or abs(len(exact) - len(rough)) <= 1
        distance = np.abs(exact.boxes[:, None] - rough.boxes[None]).max(axis=2).min(axis=1)
        assert np.median(distance) < 1


@pytest.mark.filterwarnings("ignore:no kernel finds the edges of masks on cpu")
def test_masks_cut_on_the_device_are_those_cut_on_the_host(
    model: MaskRCNN, picture: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does after the network, here with the reference in the kernel's place; keypoints come in the same copy."""
    pictures = [picture(60, 90), picture(50, 80)]
    expected = model.predict(pictures, LOOSE)
    monkeypatch.setattr("masklake.model.inference.on_device", lambda masks, paste: paste == "torchvision")
    for left, right in zip(model.predict(pictures, LOOSE), expected, strict=True):
        assert left.rles == right.rles
        assert_same(left, right)
    none = model.predict(pictures, PredictOptions(score_threshold=1.0))
    assert [len(found.scores) for found in none] == [0, 0]
    assert all(found.rles == [] and found.areas is not None and len(found.areas) == 0 for found in none)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_what_the_cpu_finds(trained: tuple[MaskRCNN, list[tuple[Tensor, Target]], list[float]]) -> None:
    """Boxes by rounding alone; masks by a few pixels of their borders."""
    model, pictures, _ = trained
    images = [image for image, _ in pictures]
    expected = model.predict(images)
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = model.to("cuda").predict(images)
    model.to("cpu")
    for left, right in zip(found, expected, strict=True):
        assert left.labels.tolist() == right.labels.tolist()
        np.testing.assert_allclose(left.boxes, right.boxes, atol=0.1)
        assert np.abs(left.areas - right.areas).max() <= 0.02 * right.areas.max()


def test_predictions_follow_changed_weights(model: MaskRCNN, picture: Callable[..., Tensor]) -> None:
    image = picture(64, 64)
    before = model.predict([image], LOOSE)[0]
    with torch.no_grad():
        model.network.box_head.cls_score.weight.mul_(3)
    assert not np.array_equal(before.scores, model.predict([image], LOOSE)[0].scores)


def test_predictions_follow_a_fused_optimiser(model: MaskRCNN, picture: Callable[..., Tensor]) -> None:
    """It changes weights without counting a version."""
    image = picture(64, 64)
    before = model.eval().predict([image], LOOSE)[0]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    seen = [before.scores]
    for _ in range(2):  # the second time with what the first prediction may have kept
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        seen.append(model.predict([image], LOOSE)[0].scores)
    assert not np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[1], seen[2])
    np.testing.assert_array_equal(model.eval().predict([image], LOOSE)[0].scores, seen[2])


def test_predict_leaves_training_mode_as_it_was(model: MaskRCNN, picture: Callable[..., Tensor]) -> None:
    model.train()
    model.predict([picture(64, 64)])
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
