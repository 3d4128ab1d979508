"""`masklake convert`: torchvision's state dict becomes a checkpoint that predicts the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.detection import maskrcnn_resnet50_fpn
from typer.testing import CliRunner

from jobs.cli import app
from model import create_model, load_checkpoint
from model.errors import CheckpointError, ConfigError


def convert(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["convert", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_state_dict_becomes_a_checkpoint_of_the_same_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    source, target = tmp_path / "in.pth", tmp_path / "new folder" / "out.safetensors"
    torch.save({key: value for key, value in state.items() if "num_batches_tracked" not in key}, source)
    report = json.loads(convert(str(source), str(target), "--preset", "maskrcnn_resnet50_fpn", "--json"))
    model = load_checkpoint(target)
    assert report["model_id"] == model.model_id
    assert report["categories"] == len(model.config.categories)
    direct = create_model("maskrcnn_resnet50_fpn", weights=source)
    for mine, theirs in zip(model.parameters(), direct.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    np.testing.assert_array_equal(
        model.network.state_dict()["mask_head.logits.weight"].numpy(),
        state["roi_heads.mask_predictor.mask_fcn_logits.weight"].numpy(),
    )


def test_the_eps_of_the_norms_can_be_said(tmp_path: Path) -> None:
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save(maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict(), source)
    assert json.loads(convert(str(source), str(target), "--preset", "maskrcnn_resnet50_fpn", "--json"))["norm_eps"] == 1e-5
    said = convert(str(source), str(target), "--preset", "maskrcnn_resnet50_fpn", "--norm-eps", "0")
    assert "eps of the norms 0" in said
    assert load_checkpoint(target).config.backbone.norm_eps == 0.0


def test_a_state_dict_of_another_model_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "in.pth"
    torch.save({"weight": torch.zeros(3)}, source)
    with pytest.raises(CheckpointError, match=str(source)):
        convert(str(source), str(tmp_path / "out.safetensors"), "--preset", "maskrcnn_resnet50_fpn")
    assert not (tmp_path / "out.safetensors").exists()


def test_the_target_must_be_named_as_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\*\.safetensors"):
        convert(str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), "--preset", "tiny")
