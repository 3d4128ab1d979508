"""Weights in whatever file people have them: read as they are, or refused by what the file is."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torchvision.models import resnet18

from masklake.model.create import create_model
from masklake.model.errors import CheckpointError
from masklake.model.presets import PRESETS
from masklake.model.weights.checkpoint import dumps
from masklake.model.weights.files import read_state, unwrapped

STATE = {
    "backbone.body.conv1.weight": torch.arange(6.0).reshape(2, 3),
    "backbone.body.layer1.0.conv1.weight": torch.ones(2),
    "rpn.head.conv.0.0.bias": torch.zeros(1),
    "roi_heads.box_predictor.cls_score.bias": torch.ones(3),
}


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def assert_state(state: dict[str, Tensor]) -> None:
    assert state.keys() == STATE.keys()
    for key, tensor in STATE.items():
        assert torch.equal(state[key].float(), tensor), key


def prefixed(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


class Options:
    """An object of a class that torch's reader does not know."""

    def __init__(self) -> None:
        self.rate = 0.1


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        OrderedDict(STATE),
        {"state_dict": STATE, "epoch": 3},
        {"model_state_dict": STATE, "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        {"weights": STATE},
        {"model": {"state_dict": STATE}},
        {"model": STATE, "model_ema": {key: tensor + 1 for key, tensor in STATE.items()}, "args": argparse.Namespace(lr=1)},
        {"model_ema": STATE, "epoch": 1},
        {"teacher": STATE, "epoch": 1},
        {"checkpoint": {"detector": prefixed("module.")}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        {"model": STATE, "best": np.float64(0.5), "path": Path("x"), "options": Options(), "log": defaultdict(list, a=[1])},
        {"state_dict": prefixed("module."), "callbacks": {"best": torch.tensor(0.3)}},
        {**STATE, "roi_heads._extra_state": None},
    ],
)
def test_a_state_dict_is_found_wherever_it_is(content: Any) -> None:
    assert_state(read_state(saved(content), "file"))
    if "options" not in content:  # torch's older form takes fewer things
        assert_state(read_state(saved(content, _use_new_zipfile_serialization=False), "file"))


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "_orig_mod.module.", "module._orig_mod.", "ema.", "model_ema.module.", "net.detector."],
)
def test_wrappers_names_are_taken_off(prefix: str) -> None:
    assert_state(unwrapped(prefixed(prefix), "file"))
    assert_state(unwrapped({**prefixed(prefix), "n_averaged": torch.tensor(3), "loss.weight": torch.ones(1)}, "file"))
    assert_state(read_state(save_safetensors(prefixed(prefix), metadata={"format": "pt"}), "file"))


def test_parts_that_were_compiled_alone_are_taken_out_of_the_middle() -> None:
    state = {key.replace("backbone.body", "backbone._orig_mod.body"): tensor for key, tensor in STATE.items()}
    assert_state(unwrapped(prefixed("model.", state), "file"))


def test_the_network_goes_before_its_average_and_two_networks_are_refused() -> None:
    average = {key: tensor + 1 for key, tensor in STATE.items()}
    assert_state(unwrapped({**prefixed("model_ema.module.", average), **prefixed("model.")}, "file"))
    assert_state(unwrapped({**prefixed("ema.", average), **STATE}, "file"))
    with pytest.raises(CheckpointError, match=r"^file is no state dict: .*found student .OrderedDict., teacher"):
        read_state(saved({"student": OrderedDict(STATE), "teacher": OrderedDict(average)}), "file")
    with pytest.raises(CheckpointError, match=r"^file holds several networks, student\., teacher\.: "):
        unwrapped({**prefixed("student."), **prefixed("teacher.")}, "file")


def test_foreign_safetensors_and_half_precision_are_read() -> None:
    half = {key: tensor.half() for key, tensor in STATE.items()}
    assert_state(read_state(save_safetensors(half), "file"))
    assert_state(read_state(saved({"model": {key: tensor.bfloat16() for key, tensor in STATE.items()}}), "file"))


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "it is empty"),
    "LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n", "a Git LFS pointer"),
    "web page": (lambda: b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "a web page"),
    "storage's error": (lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
    "text": (lambda: "des poids, ça\n".encode(), "it is text"),
    "Keras": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(40), "an HDF5 file, as Keras"),
    "Keras 3": (lambda: zipped("config.json", "model.weights.h5"), "a Keras model"),
    "ONNX": (lambda: b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:" + bytes(40), "an ONNX model"),
    "TorchScript": (scripted, "a TorchScript archive"),
    "cut zip": (lambda: saved(STATE)[:-200], "cut off or damaged"),
    "other zip": (lambda: zipped("weights/model.pth"), r"a zip archive without a state dict \(model\.pth\)"),
    "arrays": (lambda: zipped("a.npy"), "NumPy arrays"),
    "gzip": (lambda: b"\x1f\x8b\x08\x00" + bytes(40), "compressed by gzip"),
    "tar": (lambda: bytes(257) + b"ustar\x0000" + bytes(300), "a tar archive"),
    "picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(40), "a picture"),
    "noise": (lambda: bytes(range(128, 256)) * 8, r"neither a MaskLake checkpoint nor a state dict"),
    "cut safetensors": (lambda: save_safetensors(STATE)[:-8], "safetensors that are cut off"),
    "cut header": (lambda: save_safetensors(STATE)[:30], "safetensors that are cut off"),
    "a model's object": (lambda: saved(nn.Linear(2, 2)), r"a pickled torch\.nn\.modules\.linear\.Linear"),
    "an object as model": (lambda: saved({"model": Options(), "ema": None}), r"a pickled \S*Options.*state_dict\(\)"),
    "an optimiser": (lambda: saved({"state": {}, "param_groups": []}), r"found state \(dict\), param_groups \(list\)"),
    "a tensor": (lambda: saved(torch.zeros(2)), "found one Tensor"),
    "our weights without configuration": (
        lambda: save_safetensors({"backbone.body.stem.0.weight": torch.zeros(1)}),
        "MaskLake's weights without their configuration",
    ),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize(("make", "cause"), FILES.values(), ids=FILES.keys())
def test_what_is_no_weights_is_refused_by_what_it_is(make: Callable[[], bytes], cause: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(make())
    with pytest.raises(CheckpointError, match=cause) as caught:
        create_model("tiny", weights=path)
    assert str(caught.value).startswith(f"weights {path} ")
    assert "\n" not in str(caught.value)


def test_a_folder_is_refused_as_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{re.escape(str(tmp_path))}: it is a folder; name a file in it"):
        create_model("tiny", weights=tmp_path)


OTHERS = {
    "model.transformer.encoder.layers.0.linear1.weight": "a DETR",
    "model.0.conv.weight": "a YOLO model",
    "model.model.22.cv2.0.0.conv.weight": "a YOLO model",
    "roi_heads.box_predictor.0.cls_score.weight": "a cascade of Detectron2",
    "roi_head.bbox_head.fc_cls.weight": "a model of MMDetection",
    "head.classification_head.cls_logits.weight": "a one-stage detector",
    "res2.0.conv1.weight": "a backbone alone",
    "image_encoder.pos_embed": "a Segment Anything model",
}


@pytest.mark.parametrize(("key", "what"), OTHERS.items())
def test_another_network_is_refused_by_its_name(key: str, what: str) -> None:
    with pytest.raises(CheckpointError, match=f"^weights their.pth holds {what}"):
        create_model("tiny", weights=saved({"model": {key: torch.zeros(1)}}), weights_name="their.pth")


def test_a_smaller_classifier_is_refused_by_its_name() -> None:
    state = dict(resnet18(weights=None).state_dict())
    with pytest.raises(CheckpointError, match=r"it is ResNet-18, a classifier, and the model's backbone is ResNet-50$"):
        create_model("maskrcnn_resnet50_fpn", weights=saved(state), reset_predictors=True)


def test_a_single_number_for_the_classes_is_a_wrong_shape() -> None:
    model = create_model("tiny")
    state = {**model.network.state_dict(), "box_head.cls_score.bias": torch.tensor(1.0)}
    data = save_safetensors(state, metadata={"format": "masklake/1", "config": model.config.model_dump_json()})
    with pytest.raises(CheckpointError, match=r"of another shape are box_head\.cls_score\.bias \(\)"):
        create_model("tiny", weights=data)


def test_nothing_of_a_file_is_run(calls: type, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    state = create_model(PRESETS["tiny"]).network.state_dict()
    for content in ({"model": state, "args": calls(Path.touch, trap)}, {"model": calls(print, trap), "args": state}):
        for data in (saved(content), saved(content, _use_new_zipfile_serialization=False), pickle.dumps(content)):
            try:
                read_state(data, "file")
            except CheckpointError as error:
                assert "refused" in str(error)  # noqa: PT017 - the zip with a harmless place for it is read
            assert not trap.exists()


def test_a_checkpoint_of_ours_keeps_its_configuration() -> None:
    data = dumps(create_model("tiny"))
    assert json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["format"] == "masklake/1"
    with pytest.raises(CheckpointError, match="without their configuration"):
        read_state(save_safetensors(create_model("tiny").network.state_dict()), "file")
