"""Training from COCO files to a checkpoint with its scores: plans are checked before anything starts, runs resume."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torchvision
from PIL import Image

from masklake.jobs.cluster.connection import Capacity
from masklake.jobs.shapes import CATEGORIES, generate
from masklake.jobs.train import describe_data, run
from masklake.jobs.training.fit import workers_get_gpus
from masklake.jobs.training.initial_model import build_model
from masklake.jobs.training.options import TrainOptions
from masklake.jobs.training.worker import user_error
from masklake.model.create import create_model
from masklake.model.errors import CheckpointError, ConfigError, UnknownPresetError
from masklake.model.weights.checkpoint import dumps, load_checkpoint
from masklake.pipeline.coco.dataset import REPEATED_IMAGE, ZERO_AREA
from masklake.pipeline.coco.document import to_document
from masklake.pipeline.coco.reading import parse_coco
from masklake.pipeline.errors import AnnotationError, ClusterTooSmallError, TrainingError
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.training.run_folder import read_latest


def options(**changes: Any) -> TrainOptions:
    return TrainOptions.model_validate({"train": "train.json", "output": "runs", "name": "r", **changes})


def shapes(keypoints: bool = True) -> Any:
    categories = CATEGORIES if keypoints else CATEGORIES[:2]
    square = {"image_id": 1, "category_id": 1, "bbox": [2, 2, 9, 9], "segmentation": [[2, 2, 11, 2, 11, 11, 2, 11]]}
    images = [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}]
    return parse_coco({"images": images, "annotations": [square], "categories": categories}, "shapes.json")


def test_wrong_recipes_and_models_are_named() -> None:
    with pytest.raises(ConfigError, match="recipe: epoch: no such option; did you mean epochs"):
        run(options(recipe={"epoch": 3}))
    with pytest.raises(ConfigError, match="model: min_sizs: no such option; did you mean min_sizes"):
        build_model(options(model={"min_sizs": [3]}), shapes(), Storage())


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_one_of_each_reads_as_one() -> None:
    document = to_document(shapes())
    document["categories"] = [{"id": 1, "name": "disk", "keypoints": ["tip"]}]
    data = dataclasses.replace(parse_coco(document, "x.json"), dropped={ZERO_AREA: 1, REPEATED_IMAGE: 2})
    assert describe_data(data) == (
        "1 image with 1 instance of 1 category (x.json); 1 instance without keypoints: it counts in all else; "
        "left out: 1 box without an area; left out: 2 repeated image rows"
    )


def test_a_cluster_that_is_too_small_is_refused_before_the_start() -> None:
    with pytest.raises(ClusterTooSmallError, match=r"4 workers need a CPU each .* has 4 CPUs .* Give --workers 3, or a larger"):
        workers_get_gpus(options(workers=4), Capacity(cpus=4, gpus=0, memory=1e9))
    with pytest.raises(ClusterTooSmallError, match="Give --workers 2, or a larger cluster"):
        workers_get_gpus(options(workers=3), Capacity(cpus=4, gpus=0, memory=1e9, embedded=True))
    with pytest.raises(ClusterTooSmallError, match="2 workers need 2 GPUs, the cluster has 1"):
        workers_get_gpus(options(workers=2, device="cuda"), Capacity(cpus=16, gpus=1, memory=1e9))
    alone = r"^1 worker needs a CPU and loading needs one: the cluster has 1 CPU in all, 0 of them .* Give a larger cluster"
    with pytest.raises(ClusterTooSmallError, match=alone):
        workers_get_gpus(options(), Capacity(cpus=1, gpus=0, memory=1e9))
    with pytest.raises(ClusterTooSmallError, match=r"^1 worker needs 1 GPU, the cluster has 0\. Give --device cpu\.$"):
        workers_get_gpus(options(device="cuda"), Capacity(cpus=16, gpus=0, memory=1e9))
    assert workers_get_gpus(options(workers=2), Capacity(cpus=16, gpus=2, memory=1e9))
    assert not workers_get_gpus(options(workers=2), Capacity(cpus=16, gpus=1, memory=1e9))


def test_the_model_learns_what_preset_and_data_have() -> None:
    assert build_model(options(), shapes(), Storage()).config.tasks == {"box", "mask", "keypoint"}
    assert build_model(options(), shapes(keypoints=False), Storage()).config.tasks == {"box", "mask"}
    assert build_model(options(tasks={"box"}), shapes(), Storage()).config.tasks == {"box"}
    with pytest.raises(ConfigError, match="has no annotations for keypoint"):
        build_model(options(tasks={"box", "keypoint"}), shapes(keypoints=False), Storage())


def test_single_fields_of_a_presets_tables_can_be_changed() -> None:
    config = build_model(options(model={"max_size": 300, "backbone": {"stem_channels": 16}}), shapes(), Storage()).config
    assert (config.max_size, config.backbone.stem_channels, config.backbone.block) == (300, 16, "basic")


def test_frozen_norms_need_weights() -> None:
    with pytest.raises(ConfigError, match="cannot be trained from random weights: give --weights"):
        build_model(options(preset="maskrcnn_resnet50_fpn"), shapes(), Storage())
    with pytest.raises(UnknownPresetError, match="known presets"):
        build_model(options(preset="maskrcnn"), shapes(), Storage())


def test_weights_of_other_categories_need_new_predictors(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(dumps(create_model("tiny")))
    weights = {"weights": str(tmp_path / "w.safetensors")}
    with pytest.raises(CheckpointError, match=r"weights .*w\.safetensors: trained on .*--reset-predictors"):
        build_model(options(**weights), shapes(), Storage())
    model = build_model(options(**weights, reset_predictors=True), shapes(), Storage())
    assert [category.name for category in model.config.categories] == ["disk", "triangle", "arrow"]
    assert torch.equal(
        next(model.network.backbone.parameters()),
        next(load_checkpoint(tmp_path / "w.safetensors").network.backbone.parameters()),
    )


def test_a_classifier_begins_a_backbone_whatever_the_heads_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "resnet50.pth")
    weights = {"preset": "maskrcnn_resnet50_fpn", "weights": str(tmp_path / "resnet50.pth")}
    with pytest.raises(CheckpointError, match=r"weights .*resnet50\.pth is a classifier.*--reset-predictors"):
        build_model(options(**weights), shapes(), Storage())
    changes = {"mask_head": "mlp", "mask_hidden": [64], "rpn_backbone": "own"}
    with pytest.raises(ConfigError, match="needs proposals"):
        build_model(options(**weights, reset_predictors=True, learn="detector", model=changes), shapes(), Storage())
    model = build_model(options(**weights, reset_predictors=True, model=changes), shapes(), Storage())
    state = model.network.state_dict()
    for backbone in ("backbone", "rpn_backbone"):
        assert torch.equal(state[f"{backbone}.body.stem.0.weight"], torch.load(tmp_path / "resnet50.pth")["conv1.weight"])
    assert (model.config.mask_hidden, len(model.config.categories)) == ((64,), 3)


def test_branches_come_and_go_with_the_data(tmp_path: Path) -> None:
    """A checkpoint with all branches is fine-tuned on boxes alone, and one of boxes gets new branches."""
    whole = build_model(options(), shapes(), Storage())
    assert whole.config.tasks == {"box", "mask", "keypoint"}
    (tmp_path / "whole.safetensors").write_bytes(dumps(whole))
    boxes = build_model(options(weights=str(tmp_path / "whole.safetensors"), tasks=["box"]), shapes(), Storage())
    assert boxes.config.tasks == {"box"}
    (tmp_path / "boxes.safetensors").write_bytes(dumps(boxes))
    again = build_model(options(weights=str(tmp_path / "boxes.safetensors"), reset_predictors=True), shapes(), Storage())
    assert again.config.tasks == {"box", "mask", "keypoint"}
    for model in (boxes, again):
        ours, theirs = model.network.state_dict(), whole.network.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours if key.startswith(("backbone.", "rpn.", "box_head.")))
    plain = [
        category.model_copy(update={"keypoints": (), "flip_pairs": (), "skeleton": ()}) for category in shapes().categories
    ]
    without = create_model("tiny", tmp_path / "whole.safetensors", categories=plain, reset_predictors=True)
    assert without.config.tasks == {"box", "mask"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"epoch": "x", "checkpoint": "c"}'])
def test_a_damaged_pointer_is_told_and_not_trained_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "latest.json").write_text(text)
    with pytest.raises(TrainingError, match=r"latest\.json is damaged.*checkpoint_0003"):
        read_latest(Storage(), str(tmp_path))


def test_our_error_is_found_behind_others() -> None:
    inner = AnnotationError("a.png")
    outer = RuntimeError("task failed")
    outer.__cause__ = inner
    assert user_error(outer) is inner
    assert user_error(RuntimeError("x")) is None


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    generate(folder / "train", 17, 96, seed=1)
    generate(folder / "val", 5, 96, seed=2)
    return folder


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    """`run` starts a cluster in this process; the tests here share it, others must not find it."""
    yield
    ray.shutdown()


def small_run(data: Path, output: str, **changes: Any) -> TrainOptions:
    values = {"train": str(data / "train" / "instances.json"), "output": output, "name": "small", "threads": 1}
    recipe = {"epochs": 1, "batch_size": 2, **changes.pop("recipe", {})}
    return options(**{**values, "recipe": recipe, **changes})


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("own_ray")
def test_two_workers_train_score_and_resume(data: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    values = {"val": str(data / "val" / "instances.json"), "workers": 2}
    first = run(small_run(data, str(tmp_path), **values), lines.append)
    assert (first.epochs, first.resumed_from, first.device) == (1, 0, "cpu")
    assert set(first.scores) == {"bbox", "segm", "keypoints"}
    assert any("17 images with" in line for line in lines)
    assert any(line.startswith("epoch 1/1, step 4/4: loss ") for line in lines), lines

    model = load_checkpoint(first.checkpoint)
    assert model.model_id == first.model_id
    assert Image.open(first.curves).size == (1200, 480)

    lines.clear()
    again = run(small_run(data, str(tmp_path), **values), lines.append)
    assert lines == [f"run 'small' is complete: 1 epoch. Its results are in {tmp_path / 'small'}."]
    assert again.model_id == first.model_id

    longer = run(small_run(data, str(tmp_path), **values, recipe={"epochs": 2}), lines.append)
    assert (longer.epochs, longer.resumed_from) == (2, 1)
    assert any("continues after epoch 1 of 2" in line for line in lines)
    assert not any(line.startswith("epoch 1/") for line in lines)
    history = json.loads(Path(longer.metrics).read_text())["history"]
    assert [row["epoch"] for row in history] == [1, 2]

    with pytest.raises(ConfigError, match="--seed was 0, is 5"):
        run(small_run(data, str(tmp_path), **values, seed=5, recipe={"epochs": 3}))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("own_ray")
def test_what_ends_a_run_is_said_once_and_not_tried_again(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"training diverged in epoch 1 .*Lower --learning-rate"):
        run(small_run(data, str(tmp_path), name="hot", recipe={"learning_rate": 1e30, "clip_norm": None, "optimizer": "sgd"}))
    victim = break_an_image(data, tmp_path)
    with pytest.raises(AnnotationError, match=rf"^1 of the 17 images of \S+ cannot be used: {victim}: .*--allow-missing"):
        run(small_run(data, str(tmp_path), name="broken", train=str(tmp_path / "instances.json"), max_failures=0))


def break_an_image(data: Path, folder: Path) -> str:
    """A copy of the training data with one image cut short; its name."""
    shutil.copytree(data / "train", folder, dirs_exist_ok=True)
    victim = sorted((folder / "images").iterdir())[3]
    victim.write_bytes(victim.read_bytes()[:300])
    return victim.name


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("own_ray")
def test_data_and_runs_live_on_s3_and_bad_images_can_be_left_out(data: Path, tmp_path: Path, s3: Any) -> None:
    ray.shutdown()  # its processes were started without the variables that name the server
    break_an_image(data, tmp_path)
    for path in tmp_path.rglob("*.*"):
        s3.client.put_object(Bucket=s3.bucket, Key=f"in/{path.relative_to(tmp_path)}", Body=path.read_bytes())
    source = {"train": f"s3://{s3.bucket}/in/instances.json", "val": f"s3://{s3.bucket}/in/instances.json"}
    report = run(small_run(data, f"s3://{s3.bucket}/runs", **source, keep="best", max_unusable=0.1))
    assert report.checkpoint == f"s3://{s3.bucket}/runs/small/model.safetensors"
    storage = Storage()
    assert load_checkpoint(storage.read_bytes(report.checkpoint)).model_id == report.model_id
    assert Image.open(io.BytesIO(storage.read_bytes(report.curves))).size == (1200, 480)
