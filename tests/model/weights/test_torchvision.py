"""With torchvision's weights the outputs are torchvision's, one image at a time."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet50, resnext50_32x4d
from torchvision.models.detection import (
    MaskRCNN,
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn_v2,
    keypointrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from masklake.model.config import Category
from masklake.model.create import create_model, holds_classifier
from masklake.model.errors import CheckpointError
from masklake.model.instances import Instances
from masklake.model.presets import PRESETS
from masklake.model.weights.torchvision import norm_eps_of_file, our_name, rename

BACKGROUND = {"maskrcnn_resnet50_fpn": 9.0, "maskrcnn_resnet50_fpn_v2": 9.0, "keypointrcnn_resnet50_fpn": 3.5}
"""Bias of the background logit at which some tens of detections are left."""


def same_order(expected: dict[str, Tensor], found: Instances) -> np.ndarray:
    """For each of torchvision's detections ours of the same class and place: scores 1e-7 apart may change places."""
    distance = np.abs(expected["boxes"].numpy()[:, None] - found.boxes[None]).max(axis=2)
    distance[expected["labels"].numpy()[:, None] != found.labels[None]] = np.inf
    order = distance.argmin(axis=1)
    assert sorted(order) == list(range(len(found)))
    return order


def assert_equal(expected: dict[str, Tensor], found: Instances) -> int:
    """Within 0.01 pixels, 1e-4 of a score, 0.05 pixels of a keypoint, 1e-4 of a pixel's probability to be in the mask.

    Returns how many masks are not equal byte by byte: those with a pixel so close to one half that rounding decided.
    """
    assert len(found) == len(expected["boxes"])
    if not len(found):
        return 0
    different = 0
    order = same_order(expected, found)
    np.testing.assert_allclose(found.boxes[order], expected["boxes"].numpy(), rtol=0, atol=0.01)
    np.testing.assert_allclose(found.scores[order], expected["scores"].numpy(), rtol=0, atol=1e-4)
    if "masks" in expected:
        for ours, probability in zip(order, expected["masks"][:, 0].numpy(), strict=True):
            pasted = np.asfortranarray((probability > 0.5).astype(np.uint8))
            counts = found.rles[ours]
            mask = pycocotools.mask.decode({"size": list(pasted.shape), "counts": counts})
            assert np.all(np.abs(probability[mask != pasted] - 0.5) < 1e-4)
            assert found.areas[ours] == mask.sum()
            different += counts != pycocotools.mask.encode(pasted)["counts"]
    if "keypoints" in expected:
        keypoints = found.keypoints[order]
        np.testing.assert_allclose(keypoints[..., :2], expected["keypoints"][..., :2].numpy(), rtol=0, atol=0.05)
        np.testing.assert_allclose(keypoints[..., 2], expected["keypoints_scores"].numpy(), rtol=0, atol=1e-3)
    return different


def compare(name: str, model: nn.Module, weights: bytes, images: list[Tensor], min_size: int, max_size: int) -> list[int]:
    """Numbers of detections, after checking that both systems found the same."""
    config = PRESETS[name].model_copy(update={"min_sizes": (min_size,), "max_size": max_size})
    ours = create_model(config, weights=weights)
    counts, different = [], 0
    for image, found in zip(images, ours.predict(images), strict=True):
        with torch.inference_mode():
            different += assert_equal(model([image.float() / 255])[0], found)
        counts.append(len(found))
    assert different <= max(2, 0.03 * sum(counts))  # those that hold a pixel at one half: 3 of 100 with torch 2.11
    return counts


@pytest.mark.parametrize("name", sorted(BACKGROUND))
def test_generated_images_give_torchvisions_detections(
    name: str,
    torchvision_model: Callable[..., nn.Module],
    state_dict_bytes: Callable[[nn.Module], bytes],
    picture: Callable[..., Tensor],
) -> None:
    images = [picture(200, 300, 1), picture(260, 170, 2), picture(97, 400, 3)]
    model = torchvision_model(name, images[0], BACKGROUND[name], min_size=192, max_size=320)
    counts = compare(name, model, state_dict_bytes(model), images, 192, 320)
    assert max(counts) >= 10


@pytest.mark.parametrize(
    ("name", "min_size"),
    [
        ("maskrcnn_resnet50_fpn", 320),
        ("keypointrcnn_resnet50_fpn", 320),
        pytest.param("maskrcnn_resnet50_fpn", 800, marks=pytest.mark.faults),
    ],
)
def test_real_images_give_torchvisions_detections(
    name: str,
    min_size: int,
    torchvision_model: Callable[..., nn.Module],
    state_dict_bytes: Callable[[nn.Module], bytes],
    shared_data: Path,
) -> None:
    files = sorted((shared_data / "coco_mini" / "val2017").glob("*.jpg"))[1:2]
    images = [torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) for file in files]
    model = torchvision_model(name, images[0], BACKGROUND[name], min_size)
    counts = compare(name, model, state_dict_bytes(model), images, min_size, 1333)
    assert max(counts) >= 10


def of_backbone(name: str) -> Callable[..., nn.Module]:
    """Mask R-CNN on another residual network, as torchvision's users build it."""

    def build(weights: None, weights_backbone: None) -> nn.Module:
        return MaskRCNN(resnet_fpn_backbone(backbone_name=name, weights=weights_backbone), num_classes=91)

    return build


@pytest.mark.parametrize(
    ("name", "builder"),
    [
        ("fasterrcnn_resnet50_fpn", fasterrcnn_resnet50_fpn),
        ("fasterrcnn_resnet50_fpn_v2", fasterrcnn_resnet50_fpn_v2),
        ("maskrcnn_resnet50_fpn", maskrcnn_resnet50_fpn),
        ("maskrcnn_resnet50_fpn_v2", maskrcnn_resnet50_fpn_v2),
        ("keypointrcnn_resnet50_fpn", keypointrcnn_resnet50_fpn),
        ("maskrcnn_resnet101_fpn", of_backbone("resnet101")),
        ("maskrcnn_resnext50_32x4d_fpn", of_backbone("resnext50_32x4d")),
        ("maskrcnn_resnext101_32x8d_fpn", of_backbone("resnext101_32x8d")),
    ],
)
def test_every_weight_finds_its_place(name: str, builder: Callable[..., nn.Module]) -> None:
    theirs = rename(builder(weights=None, weights_backbone=None).state_dict())
    ours = create_model(name).network.state_dict()
    assert shapes(theirs) == shapes(ours)


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("maskrcnn_resnet50_fpn", resnet50),
        ("maskrcnn_resnet50_c4", resnet50),
        ("maskrcnn_resnext50_32x4d_fpn", resnext50_32x4d),
    ],
)
def test_a_classifier_begins_the_backbone_and_nothing_else(
    name: str, classifier: Callable[..., nn.Module], state_dict_bytes: Callable[[nn.Module], bytes]
) -> None:
    torch.manual_seed(0)
    theirs = classifier(weights=None).eval()
    for norm in (module for module in theirs.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.1, 0.1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    weights = state_dict_bytes(theirs)
    assert holds_classifier(weights)
    model = create_model(name, weights=weights, reset_predictors=True)
    network = model.network
    pixels = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        expected = theirs.layer3(theirs.layer2(theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(pixels)))))))
        torch.testing.assert_close(network.backbone.body(pixels)[2], expected, rtol=1e-4, atol=1e-4)
    fifth = network.roi_stage if model.config.features == "c4" else network.backbone.body.stages[3]
    for (key, tensor), (_, own) in zip(in_order_of_values(theirs.layer4), in_order_of_values(fifth), strict=True):
        assert torch.equal(tensor, own), key

    torch.manual_seed(1)
    fresh = create_model(name).network.state_dict()
    torch.manual_seed(1)
    again = create_model(name, weights=weights, reset_predictors=True).network.state_dict()
    assert {key for key in fresh if not torch.equal(fresh[key], again[key])} <= {
        key for key in fresh if key.startswith(("backbone.body.", "roi_stage."))
    }
    two = create_model(PRESETS[name].changed(rpn_backbone="own"), weights=weights, reset_predictors=True).network
    assert torch.equal(two.rpn_backbone.body.stem[0].weight, theirs.conv1.weight)
    with pytest.raises(CheckpointError, match=r"is a classifier, which finds nothing.*--reset-predictors"):
        create_model(name, weights=weights)


def test_a_classifier_of_another_network_is_refused(state_dict_bytes: Callable[[nn.Module], bytes]) -> None:
    with pytest.raises(CheckpointError, match=r"another architecture .*it is ResNet-50, a classifier, .* is ResNet-101$"):
        create_model("maskrcnn_resnet101_fpn", weights=state_dict_bytes(resnet50(weights=None)), reset_predictors=True)
    assert not holds_classifier(state_dict_bytes(maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)))
    with pytest.raises(CheckpointError, match="no state dict: expected tensors by name, found nothing"):
        holds_classifier(state_dict_bytes(nn.Module()))


def in_order_of_values(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Weights in the order of their sizes and values: the systems list a block's parts in different orders."""
    state = [(key, tensor) for key, tensor in module.state_dict().items() if not key.endswith("num_batches_tracked")]
    return sorted(state, key=lambda item: (tuple(item[1].shape), item[1].flatten()[:8].tolist()))


def shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Of everything but the norms' counters of batches, which are no weights."""
    return {key: tensor.shape for key, tensor in state.items() if not key.endswith("num_batches_tracked")}


def test_key_names_of_the_oldest_files_are_understood() -> None:
    assert our_name("roi_heads.mask_head.mask_fcn1.weight") == our_name("roi_heads.mask_head.0.0.weight")
    assert our_name("rpn.head.conv.weight") == our_name("rpn.head.conv.0.0.weight")
    assert our_name("backbone.fpn.inner_blocks.2.bias") == our_name("backbone.fpn.inner_blocks.2.0.bias")


def test_a_weight_under_an_old_and_a_new_name_is_refused() -> None:
    old, new = "backbone.fpn.inner_blocks.0.weight", "backbone.fpn.inner_blocks.0.0.weight"
    with pytest.raises(CheckpointError, match=f"two names: {re.escape(old)} and {re.escape(new)}"):
        rename({old: torch.zeros(1), new: torch.ones(1)})


def test_a_state_dict_of_another_model_is_refused_with_the_first_keys(state_dict_bytes: Callable[[nn.Module], bytes]) -> None:
    with pytest.raises(CheckpointError, match=r"another architecture.* the names in it are no layers'.*\(0\.bias, 0\.weight\)"):
        create_model("maskrcnn_resnet50_fpn", weights=state_dict_bytes(nn.Sequential(nn.Linear(2, 2))))


def test_the_eps_of_an_unknown_file_is_torchs_and_a_configuration_overrides_it(
    state_dict_bytes: Callable[[nn.Module], bytes],
) -> None:
    weights = state_dict_bytes(maskrcnn_resnet50_fpn(weights=None, weights_backbone=None))
    assert norm_eps_of_file(weights) == 1e-5
    preset = PRESETS["maskrcnn_resnet50_fpn"]
    assert create_model("maskrcnn_resnet50_fpn", weights=weights).config.backbone.norm_eps == 1e-5
    exact = preset.model_copy(update={"backbone": preset.backbone.model_copy(update={"norm_eps": 0.0})})
    assert create_model(exact, weights=weights).config.backbone.norm_eps == 0.0


def test_weights_by_torchvisions_name_are_downloaded_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state_dict_bytes: Callable[[nn.Module], bytes]
) -> None:
    weights = state_dict_bytes(keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None))
    asked = []

    def download(url: str, kept: str, digest: str, progress: bool) -> None:
        asked.append((url.rpartition("/")[2], digest))
        Path(kept).write_bytes(weights)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    for _ in range(2):
        ours = create_model("keypointrcnn_resnet50_fpn", weights="KeypointRCNN_ResNet50_FPN_Weights.COCO_V1")
        assert ours.config.backbone.norm_eps == 0.0
    legacy = create_model("keypointrcnn_resnet50_fpn", weights="KeypointRCNN_ResNet50_FPN_Weights.COCO_LEGACY")
    assert legacy.config.backbone.norm_eps == 1e-5
    assert asked == [
        ("keypointrcnn_resnet50_fpn_coco-fc266e95.pth", "fc266e95"),
        ("keypointrcnn_resnet50_fpn_coco-9f466800.pth", "9f466800"),
    ]


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails the test that would fetch weights."""

    def download(url: str, *_: object, **__: object) -> None:
        pytest.fail(f"{url} would be downloaded")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", download)


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize(
    ("preset", "weights", "said"),
    [
        ("maskrcnn_resnet50_fpn", "ResNet18_Weights.IMAGENET1K_V1", "it is ResNet-18, a classifier, .* is ResNet-50$"),
        ("maskrcnn_resnet50_fpn", "ResNet34_Weights.DEFAULT", "it is ResNet-34, a classifier, .* is ResNet-50$"),
        ("maskrcnn_resnet50_c4", "ResNet152_Weights.IMAGENET1K_V2", "it is ResNet-152, a classifier, .* is ResNet-50$"),
        ("maskrcnn_resnet50_fpn", "Wide_ResNet50_2_Weights.IMAGENET1K_V1", "it is Wide ResNet-50, .* is ResNet-50$"),
        ("maskrcnn_resnext101_32x8d_fpn", "ResNeXt101_64X4D_Weights.DEFAULT", "ResNeXt-101 64x4d, .* ResNeXt-101 32x8d$"),
        ("tiny", "ResNet50_Weights.IMAGENET1K_V1", "it is ResNet-50, a classifier"),
        ("maskrcnn_resnet101_fpn", "MaskRCNN_ResNet50_FPN_Weights.COCO_V1", "it lacks backbone"),
        ("maskrcnn_resnet50_fpn", "MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1", "the model has no"),
        ("maskrcnn_resnet50_c4", "FasterRCNN_ResNet50_FPN_Weights.COCO_V1", "it lacks"),
    ],
)
def test_names_of_what_cannot_fit_are_refused_before_a_download(preset: str, weights: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^weights {re.escape(weights)} is of another architecture .*{said}"):
        create_model(preset, weights=weights, reset_predictors=True)


@pytest.mark.usefixtures("no_download")
def test_what_a_name_is_of_is_known_without_a_download() -> None:
    assert holds_classifier("ResNeXt50_32X4D_Weights.DEFAULT")
    assert not holds_classifier("KeypointRCNN_ResNet50_FPN_Weights.COCO_LEGACY")
    with pytest.raises(CheckpointError, match=r"is a classifier, which finds nothing.*--reset-predictors"):
        create_model("maskrcnn_resnet50_fpn", weights="ResNet50_Weights.IMAGENET1K_V1")
    with pytest.raises(CheckpointError, match=r"trained on 90 categories, .* here has 2; "):
        create_model(
            "maskrcnn_resnet50_fpn",
            "MaskRCNN_ResNet50_FPN_Weights.DEFAULT",
            categories=[Category(id=n, name=f"{n}") for n in (1, 2)],
        )


def test_a_refused_name_is_refused_in_the_words_of_its_file(
    no_download: None, state_dict_bytes: Callable[[nn.Module], bytes]
) -> None:
    said = []
    theirs = state_dict_bytes(maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None))
    for weights, name in (
        (theirs, "MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1"),
        ("MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1", None),
    ):
        with pytest.raises(CheckpointError) as refused:
            create_model("maskrcnn_resnext50_32x4d_fpn", weights=weights, weights_name=name)
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_what_torchvisions_training_script_saves_is_read(
    state_dict_bytes: Callable[[nn.Module], bytes], tmp_path: Path
) -> None:
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    saved = {"model": model.state_dict(), "args": argparse.Namespace(lr=0.02, output_dir="out"), "epoch": 25}
    torch.save(saved, tmp_path / "model_25.pth")
    ours = create_model("maskrcnn_resnet50_fpn", weights=tmp_path / "model_25.pth")
    assert ours.model_id == create_model("maskrcnn_resnet50_fpn", weights=state_dict_bytes(model)).model_id


def test_tensors_without_names_are_refused(tmp_path: Path) -> None:
    torch.save({1: torch.zeros(2), "a": torch.zeros(2)}, tmp_path / "numbers.pth")
    with pytest.raises(CheckpointError, match="is no state dict: expected tensors by name"):
        create_model("maskrcnn_resnet50_fpn", weights=tmp_path / "numbers.pth")


def test_what_lies_among_torch_hubs_files_is_not_unpickled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: type
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    kept = tmp_path / "hub" / "checkpoints" / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"
    kept.parent.mkdir(parents=True)
    torch.save({"a": calls(Path.touch, tmp_path / "trace")}, kept)
    with pytest.raises(CheckpointError, match=r"COCO_V1 \(.*bf2d0c1e.pth\).*refused"):
        create_model("maskrcnn_resnet50_fpn", weights="MaskRCNN_ResNet50_FPN_Weights.COCO_V1")
    assert not (tmp_path / "trace").exists()


def test_unknown_names_and_failed_downloads_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    for name, said in {
        "MaskRCNN_ResNet50_FPN_Weights.COCO_V9": r"called .*; of this model it has MaskRCNN_ResNet50_FPN_Weights\.COCO_V1",
        "MaskRCNN_resnet50_Weights.COCO_V1": "no weights called .*no model of that name",
        "FCOS_ResNet50_FPN_Weights.COCO_V1": "of a network that MaskLake cannot take",
        "FasterRCNN_MobileNet_V3_Large_FPN_Weights.DEFAULT": "of a network that MaskLake cannot take",
        "ViT_B_16_Weights.DEFAULT": "of a network that MaskLake cannot take",
    }.items():
        with pytest.raises(CheckpointError, match=said):
            create_model("maskrcnn_resnet50_fpn", weights=name)
    with pytest.raises(CheckpointError, match="cannot download"):
        create_model("maskrcnn_resnet50_fpn", weights="ResNet50_Weights.DEFAULT", reset_predictors=True)
    with pytest.raises(CheckpointError, match=r"cannot download.*no route to host"):
        create_model("maskrcnn_resnet50_fpn", weights="MaskRCNN_ResNet50_FPN_Weights.COCO_V1")
