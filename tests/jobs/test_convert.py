"""`masklake convert`: another system's weights become a checkpoint that predicts the same."""

from __future__ import annotations

import errno
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.detection import maskrcnn_resnet50_fpn
from typer.testing import CliRunner

from masklake.jobs.commands import app
from masklake.jobs.convert import read_categories
from masklake.model import create_model, load_checkpoint
from masklake.model.config import Category
from masklake.model.errors import CheckpointError, ConfigError, MaskLakeError
from masklake.model.weights.torchvision import rename
from masklake.pipeline.errors import InputNotFoundError, StorageError
from masklake.pipeline.storage import local_files
from masklake.pipeline.storage.storage import Storage

KINDS = ("weight", "bias")


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
    assert "norm epsilon 0" in said
    assert load_checkpoint(target).config.backbone.norm_eps == 0.0


DETECTRON2_NAMES = (  # of torchvision's names
    (r"^backbone\.body\.(conv1|bn1)", r"backbone.bottom_up.stem.\1"),
    (r"^backbone\.body\.layer(\d)", lambda match: f"backbone.bottom_up.res{int(match[1]) + 1}"),
    (r"downsample\.0", "shortcut"),
    (r"downsample\.1", "shortcut.norm"),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.0", lambda match: f"backbone.fpn_lateral{int(match[1]) + 2}"),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.0", lambda match: f"backbone.fpn_output{int(match[1]) + 2}"),
    (r"^rpn\.head\.conv\.0\.0", "proposal_generator.rpn_head.conv"),
    (r"^rpn\.head\.cls_logits", "proposal_generator.rpn_head.objectness_logits"),
    (r"^rpn\.head\.bbox_pred", "proposal_generator.rpn_head.anchor_deltas"),
    (r"box_head\.fc([67])", lambda match: f"box_head.fc{int(match[1]) - 5}"),
    (r"mask_head\.(\d)\.0", lambda match: f"mask_head.mask_fcn{int(match[1]) + 1}"),
    (r"mask_predictor\.conv5_mask", "mask_head.deconv"),
    (r"mask_predictor\.mask_fcn_logits", "mask_head.predictor"),
)


def detectron2_state(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """torchvision's Mask R-CNN with 81 classes as Detectron2 has it: other names, the background last or nowhere."""
    theirs = {}
    for key, tensor in state.items():
        if "cls_score" in key:
            tensor = torch.cat([tensor[1:], tensor[:1]])
        elif "box_predictor.bbox_pred" in key:
            tensor = tensor[4:]
        elif "mask_fcn_logits" in key:
            tensor = tensor[1:]
        for pattern, name in DETECTRON2_NAMES:
            key = re.sub(pattern, name, key)
        theirs[key] = tensor.numpy()
    return theirs


def test_a_file_of_detectron2s_model_zoo_becomes_a_checkpoint_with_its_conventions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=81).state_dict()
    state = {key: tensor for key, tensor in state.items() if "num_batches_tracked" not in key}
    source, target = tmp_path / "model_final_a54504.pkl", tmp_path / "out.safetensors"
    with source.open("wb") as file:
        pickle.dump({"model": detectron2_state(state), "__author__": "Detectron2 Model Zoo"}, file, protocol=2)
    report = json.loads(convert(str(source), str(target), "--preset", "maskrcnn_resnet50_fpn", "--json"))
    model = load_checkpoint(target)
    assert (report["model_id"], report["categories"]) == (model.model_id, 80)
    assert (model.config.image_channels, model.config.paste, model.config.resize) == ("bgr", "detectron2", "pil")
    expected, own = rename(state), model.network.state_dict()
    assert own.keys() == expected.keys()
    for key in own.keys() - {f"{part}.{kind}" for part in ("box_head.bbox_pred", "mask_head.logits") for kind in KINDS}:
        assert torch.equal(own[key], expected[key])
    for kind in KINDS:
        assert torch.equal(own[f"box_head.bbox_pred.{kind}"][4:], expected[f"box_head.bbox_pred.{kind}"][4:])
        assert torch.equal(own[f"mask_head.logits.{kind}"][1:], expected[f"mask_head.logits.{kind}"][1:])


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "in.pkl"
    source.write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00exit\x85R.")
    with pytest.raises(CheckpointError, match=r"in\.pkl.*it asks for os\.system"):
        convert(str(source), str(tmp_path / "out.safetensors"), "--preset", "maskrcnn_resnet50_fpn")


def test_a_state_dict_of_another_model_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "in.pth"
    torch.save({"weight": torch.zeros(3)}, source)
    with pytest.raises(CheckpointError, match=str(source)):
        convert(str(source), str(tmp_path / "out.safetensors"), "--preset", "maskrcnn_resnet50_fpn")
    assert not (tmp_path / "out.safetensors").exists()


CATEGORIES = {
    "coco.json": '{"categories": [{"id": 7, "name": "b"}, {"id": 3, "name": "a", "keypoints": ["left_x", "right_x"]}]}',
    "names.json": '["a", "b"]',
    "names.txt": "\ufeffa\r\n\nb\n",
}


@pytest.mark.parametrize("name", CATEGORIES)
def test_other_categories_are_named_by_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(CATEGORIES[name])
    first, second = read_categories(Storage(), str(tmp_path / name))
    assert (first.name, second.name) == ("a", "b")
    if name == "coco.json":
        assert (first.id, second.id, first.flip_pairs) == (3, 7, ((0, 1),))
    else:
        assert (first.id, second.id) == (1, 2)


def test_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\ncat\n")
    with pytest.raises(ConfigError, match=r"--categories \S*classes\.txt names 'cat' more than once"):
        read_categories(Storage(), str(tmp_path / "classes.txt"))


def test_weights_with_keypoints_ask_for_categories_that_name_them(tmp_path: Path) -> None:
    model = create_model("tiny", categories=[Category(id=1, name="cat", keypoints=("nose", "tail"))])
    torch.save(model.network.state_dict(), tmp_path / "in.pth")
    (tmp_path / "names.txt").write_text("cat\n")
    with pytest.raises(
        CheckpointError, match=r"has no keypoint_head.*; its categories have keypoints: give .*a COCO JSON file"
    ):
        create_model("tiny", weights=tmp_path / "in.pth", categories=read_categories(Storage(), str(tmp_path / "names.txt")))


@pytest.mark.parametrize("content", [b"", b"[]", b'{"categories": []}'])
def test_a_file_that_names_no_categories_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"--categories \S*classes\.txt names no categories: give a COCO JSON file"):
        read_categories(Storage(), str(tmp_path / "classes.txt"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00", "is neither JSON nor text"),
        (b"{}", "is a JSON object without a list 'categories': give"),
        (b'{"0": "cat", "1": "dog"}', "is a JSON object without a list 'categories': give"),
        (b'["cat", 5]', r"categories\[1\] is 5, neither a name nor an object with one"),
        (b'{"categories": [["cat"]]}', r"categories\[0\] is \['cat'\], neither a name"),
    ],
)
def test_a_file_of_categories_in_another_form_is_told_what_it_is(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"--categories \S*classes\.txt:? {said}"):
        read_categories(Storage(), str(tmp_path / "classes.txt"))


@pytest.mark.parametrize("name", ["5", "true", "NaN"])
def test_one_name_alone_is_a_name_also_where_it_is_json(tmp_path: Path, name: str) -> None:
    (tmp_path / "classes.txt").write_text(f"{name}\n")
    assert [category.name for category in read_categories(Storage(), str(tmp_path / "classes.txt"))] == [name]


def test_wrapped_weights_of_other_categories_become_a_checkpoint(tmp_path: Path) -> None:
    """Our own test of the whole way: a training checkpoint of a wrapped model with two classes, in half precision."""
    state = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3).state_dict()
    wrapped = {f"module.{key}": tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save({"state_dict": wrapped, "epoch": 3}, source)
    arguments = (str(source), str(target), "--preset", "maskrcnn_resnet50_fpn", "--json")
    with pytest.raises(CheckpointError, match=r"trained on 2 categories, .* here has 90; name the 2 .*--categories FILE"):
        convert(*arguments)
    (tmp_path / "names.txt").write_text("nucleus\ncell\n")
    assert json.loads(convert(*arguments, "--categories", str(tmp_path / "names.txt")))["categories"] == 2
    assert load_checkpoint(target).config.category_names == {1: "nucleus", 2: "cell"}


def test_a_target_that_cannot_be_written_is_told_before_the_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.safetensors").mkdir()
    targets: dict[str, tuple[type[MaskLakeError], str]] = {
        "file/new/out.safetensors": (InputNotFoundError, "is a file where a folder is needed"),
        "folder.safetensors": (ConfigError, "it is a folder"),
    }
    for target, (kind, cause) in targets.items():
        for place in (f"{tmp_path}/{target}", f"file://{tmp_path}/{target}"):
            with pytest.raises(kind, match=cause):
                convert(str(tmp_path / "none.pth"), place, "--preset", "tiny")


def test_a_read_only_file_system_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(local_files, "check_writable", refuse)
    with pytest.raises(StorageError, match="the file system is read-only"):
        convert(str(tmp_path / "none.pth"), str(tmp_path / "out.safetensors"), "--preset", "tiny")


def test_the_target_must_be_named_as_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\*\.safetensors"):
        convert(str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), "--preset", "tiny")
