"""Checkpoints come back as they were written, and any other file is refused by name."""

from __future__ import annotations

import errno
import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from masklake.model.config import Category, ModelConfig
from masklake.model.create import create_model
from masklake.model.errors import CheckpointError, UnknownPresetError
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.presets import PRESETS, preset
from masklake.model.weights.checkpoint import dumps, load_checkpoint, load_state, save_checkpoint


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig) -> MaskRCNN:
    torch.manual_seed(0)
    return create_model(tiny_config)


@pytest.fixture
def saved(model: MaskRCNN, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path)
    return path


def test_a_checkpoint_comes_back_as_it_was(model: MaskRCNN, saved: Path) -> None:
    again = load_checkpoint(saved)
    assert again.config == model.config
    assert again.model_id == model.model_id
    assert not again.training
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor)
    assert load_checkpoint(dumps(model)).model_id == model.model_id
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_create_model_takes_a_checkpoint_with_its_own_configuration(model: MaskRCNN, saved: Path) -> None:
    assert create_model("tiny", weights=saved).config == model.config
    assert create_model("tiny", weights=saved.read_bytes()).model_id == model.model_id


def test_the_model_id_names_preset_configuration_and_weights(model: MaskRCNN, tiny_config: ModelConfig) -> None:
    preset, digest = model.model_id.rsplit("-", 1)
    assert (preset, len(digest)) == ("tiny", 12)
    other_threshold = create_model(tiny_config.model_copy(update={"score_threshold": 0.3}))
    other_threshold.load_state_dict(model.state_dict())
    assert other_threshold.model_id != model.model_id
    with torch.no_grad():
        other_weights = create_model(tiny_config, weights=dumps(model))
        other_weights.network.box_head.hidden[0].bias[0] += 1e-6
    assert other_weights.model_id != model.model_id


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere\.safetensors"):
        load_checkpoint(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.999])
def test_a_truncated_file_is_refused(model: MaskRCNN, share: float) -> None:
    data = dumps(model)
    with pytest.raises(CheckpointError, match=r"cut off|not a MaskLake checkpoint"):
        load_checkpoint(data[: int(len(data) * share)])


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        load_checkpoint(tmp_path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    safetensors, text, numbers = tmp_path / "foreign.safetensors", tmp_path / "notes.txt", tmp_path / "bytes.bin"
    save_file({"weight": torch.zeros(3)}, safetensors)
    text.write_text("these are not the weights that you are looking for")
    numbers.write_bytes(bytes(range(256)) * 8)
    for path in (safetensors, text, numbers):
        with pytest.raises(CheckpointError, match="not a MaskLake checkpoint"):
            load_checkpoint(path)
        expected = "another architecture" if path == safetensors else "neither a MaskLake checkpoint nor a state dict"
        with pytest.raises(CheckpointError, match=expected):
            create_model("tiny", weights=path)


@pytest.mark.parametrize("save", [pickle.dump, torch.save])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, save: object, calls: type) -> None:
    trap, path = tmp_path / "sprung", tmp_path / "weights.pth"
    with path.open("wb") as file:
        save({"weight": calls(Path.touch, trap)}, file)
    with pytest.raises(CheckpointError, match="nor a state dict"):
        create_model("tiny", weights=path)
    assert not trap.exists()


def test_a_pth_that_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "epoch.pth"
    torch.save({"epoch": 3, "loss": [0.1]}, path)
    with pytest.raises(CheckpointError, match="no state dict"):
        create_model("tiny", weights=path)


def test_another_architecture_is_refused_with_the_first_keys(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"another architecture.*it lacks (\S+, ){19}\S+ and \d+ more"):
        create_model(
            PRESETS["maskrcnn_resnet50_fpn"].model_copy(update={"categories": PRESETS["tiny"].categories[:3]}), weights=saved
        )


STRANGE = {
    "complex": lambda weight: weight.to(torch.complex64),
    "whole numbers": lambda weight: weight.int(),
    "sparse": lambda weight: weight.to_sparse(),
    "on no device": lambda weight: weight.to("meta"),
    "not a number": lambda weight: weight.where(weight != weight.flatten()[0], torch.nan),
}


@pytest.mark.parametrize("change", STRANGE.values(), ids=STRANGE.keys())
def test_what_is_no_weight_is_refused_by_name(model: MaskRCNN, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    state = dict(model.network.state_dict())
    state["box_head.hidden.0.weight"] = change(state["box_head.hidden.0.weight"])
    with pytest.raises(CheckpointError, match=r"the file holds other things .*: box_head\.hidden\.0\.weight$"):
        load_state(model, state, "the file")


def test_a_configuration_that_is_none_is_refused_in_one_line(model: MaskRCNN, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for config in (
        "{nope",
        '{"preset": 3}',
        model.config.model_dump_json().replace('"box_hidden":', '"box_hidden":1000000000000'),
    ):
        save_file({"weight": torch.zeros(1)}, path, metadata={"format": "masklake/1", "config": config})
        with pytest.raises(CheckpointError, match="no configuration that this version can read: ") as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)
        assert "pydantic" not in str(caught.value)


def test_a_head_that_the_weights_lack_is_named(tiny_config: ModelConfig) -> None:
    boxes_only = create_model(tiny_config.model_copy(update={"mask": False, "keypoint": False}))
    with pytest.raises(CheckpointError, match=r"it lacks keypoint_head\.convs"):
        create_model(tiny_config, weights=dumps(boxes_only))


def test_another_number_of_classes_is_named_with_the_remedy(saved: Path) -> None:
    categories = [Category(id=1, name="nucleus")]
    with pytest.raises(CheckpointError, match=r"trained on 3 categories, .* here has 1; name the 3 .*--reset-predictors"):
        create_model("tiny", weights=saved, categories=categories)


def test_another_preset_than_the_recorded_one_is_the_first_cause_that_is_named(tmp_path: Path) -> None:
    small = preset("tiny").changed(categories=(Category(id=1, name="nucleus"),))
    data = dumps(create_model(small))
    other = preset("tiny").model_copy(update={"preset": "other"})
    with pytest.raises(
        CheckpointError, match=r"of preset 'tiny' \(use --preset tiny\), of another architecture than model 'other'"
    ):
        create_model(other, weights=data)
    with pytest.raises(
        CheckpointError,
        match=r"of preset 'tiny' \(use --preset tiny\), of another architecture than model 'maskrcnn_resnet50_fpn'",
    ):
        create_model("maskrcnn_resnet50_fpn", weights=data)
    same = small.model_copy(update={"preset": "other"})
    assert create_model(same, weights=data).config.preset == "other", "what fits is taken, whatever its name"


def test_another_architecture_is_named_before_another_number_of_classes(model: MaskRCNN) -> None:
    state = {key: tensor for key, tensor in model.network.state_dict().items() if not key.startswith("keypoint_head.")}
    state["box_head.cls_score.bias"] = torch.zeros(9)
    with pytest.raises(CheckpointError, match=r"another architecture .*it lacks keypoint_head"):
        load_state(model, state, "the file")


def test_a_head_without_a_class_is_not_told_to_name_none(model: MaskRCNN) -> None:
    state = dict(model.network.state_dict())
    state["box_head.cls_score.bias"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"no category beside the background .*\(1,\).*; begin new last layers"):
        load_state(model, state, "the file")


def test_a_header_that_no_parser_can_follow_is_refused() -> None:
    header = b'{"a":' + b"[" * 100_000
    with pytest.raises(CheckpointError, match="not a MaskLake checkpoint"):
        load_checkpoint(len(header).to_bytes(8, "little") + header)


def test_predictors_can_be_reset_for_other_categories(model: MaskRCNN, saved: Path) -> None:
    tuned = create_model(
        model.config.model_copy(update={"keypoint": False}).preset,
        weights=saved,
        categories=[Category(id=1, name="nucleus"), Category(id=2, name="cell", keypoints=("centre",))],
        reset_predictors=True,
    )
    assert tuned.config.num_classes == 3
    assert torch.equal(tuned.network.box_head.hidden[0].weight, model.network.box_head.hidden[0].weight)


def test_a_configuration_of_another_version_is_refused(model: MaskRCNN, tmp_path: Path) -> None:
    config = json.loads(model.config.model_dump_json()) | {"invented_option": 1}
    path = tmp_path / "newer.safetensors"
    save_file(dict(model.network.state_dict()), path, metadata={"format": "masklake/1", "config": json.dumps(config)})
    with pytest.raises(CheckpointError, match="invented_option"):
        load_checkpoint(path)


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_a_saved_file_has_the_umasks_permissions_and_is_on_the_disk_before_its_name(
    model: MaskRCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    path, named = tmp_path / "model.safetensors", []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        named.append(path.exists())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    before = os.umask(umask)
    try:
        save_checkpoint(model, path)
    finally:
        os.umask(before)
    assert named == [False]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_that_fails_leaves_the_old_file_and_no_other(
    model: MaskRCNN, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = saved.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: No space left on device"):
        save_checkpoint(model, saved)
    assert saved.read_bytes() == old
    assert list(saved.parent.iterdir()) == [saved]


def test_a_folder_that_does_not_exist_cannot_be_saved_to(model: MaskRCNN, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(model, tmp_path / "no" / "such" / "model.safetensors")


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UnknownPresetError, match=r"'resnet'.*maskrcnn_resnet50_fpn.*tiny"):
        create_model("resnet")


def test_equal_models_give_equal_bytes_that_safetensors_reads(model: MaskRCNN, tmp_path: Path) -> None:
    """Its own order of the metadata is another one each time."""
    data = dumps(model)
    assert {dumps(model) for _ in range(8)} == {data}
    assert int.from_bytes(data[:8], "little") % 8 == 0, "the weights are aligned"
    (tmp_path / "model.safetensors").write_bytes(data)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "masklake/1", "config": model.config.model_dump_json()}
        state = model.network.state_dict()
        assert set(file.keys()) == set(state)
        assert all(torch.equal(file.get_tensor(name), state[name]) for name in state)
