"""`--weights` in every form that names its model; anything else is refused with the command that converts it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from masklake.jobs.weights import read_detector, read_model
from masklake.model.create import create_model, preset_of_weights
from masklake.model.errors import CheckpointError
from masklake.model.presets import PRESETS
from masklake.model.weights.checkpoint import dumps, load_checkpoint
from masklake.pipeline.errors import InputNotFoundError
from masklake.pipeline.storage.storage import Storage


def test_a_checkpoint_is_taken_as_it_is(tmp_path: Path) -> None:
    data = dumps(create_model("tiny"))
    (tmp_path / "model.safetensors").write_bytes(data)
    assert read_model(Storage(), str(tmp_path / "model.safetensors")) == data


def test_the_folder_of_a_training_run_is_told_the_file_in_it(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(CheckpointError, match=rf"is a folder; name the checkpoint in it: {tmp_path}/model\.safetensors"):
        read_detector(Storage(), str(tmp_path))


def test_torchvisions_names_say_their_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "MaskRCNN_ResNet50_FPN_Weights.COCO_V1": "maskrcnn_resnet50_fpn",
        "MaskRCNN_ResNet50_FPN_V2_Weights.DEFAULT": "maskrcnn_resnet50_fpn_v2",
        "KeypointRCNN_ResNet50_FPN_Weights.COCO_LEGACY": "keypointrcnn_resnet50_fpn",
        "FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1": "fasterrcnn_resnet50_fpn_v2",
        "runs/x/model.safetensors": None,
    }
    assert {name: preset_of_weights(name) for name in names} == names
    with pytest.raises(CheckpointError, match="not a whole detector's weights"):
        read_model(Storage(), "ResNet50_Weights.IMAGENET1K_V1")
    model = create_model(PRESETS["tiny"])
    monkeypatch.setattr("masklake.jobs.weights.create_model", lambda preset, weights: model)
    converted = read_model(Storage(), "MaskRCNN_ResNet50_FPN_Weights.COCO_V1")
    assert load_checkpoint(converted).model_id == model.model_id


def test_other_files_are_refused_with_what_they_are_or_the_command_that_converts_them(tmp_path: Path) -> None:
    path = tmp_path / "model_final.pth"
    torch.save({"model": {"weight": torch.zeros(1)}}, path)
    with pytest.raises(CheckpointError, match=rf"masklake convert {path} model\.safetensors --preset PRESET"):
        read_model(Storage(), str(path))
    path.write_bytes(save({"weight": torch.zeros(1)}, metadata={"format": "other/1"}))
    with pytest.raises(CheckpointError, match=r"no installed package reads its format 'other/1'.*masklake convert"):
        read_model(Storage(), str(path))
    path.write_text("<html>404</html>")
    with pytest.raises(CheckpointError, match="is not a MaskLake checkpoint: it is a web page"):
        read_model(Storage(), str(path))
    with pytest.raises(InputNotFoundError, match=r"none\.safetensors"):
        read_model(Storage(), str(tmp_path / "none.safetensors"))
