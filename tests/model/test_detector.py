"""The interface of detectors: what counts as one, and which loader reads a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from masklake.model import PRESETS, MaskRCNN, PredictOptions, create_model, save_checkpoint
from masklake.model import detector as detector_module
from masklake.model.detector import Detector, TwoStageDetector, can_propose, has_loader, load_detector
from masklake.model.errors import CheckpointError, ConfigError
from masklake.model.weights.checkpoint import dumps
from tests import second_detector

PREDICT = PredictOptions(score_threshold=0.0)


@pytest.fixture
def tiny() -> MaskRCNN:
    torch.manual_seed(0)
    return create_model("tiny")


def marked(mark: str) -> bytes:
    return save({"weight": torch.zeros(1)}, metadata={"format": mark})


Declare = Callable[..., None]


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Declare:
    """Declare entry points as installed packages would: pairs of a format and a loader, which may be its import name."""

    def declare(*declared: tuple[str, Any]) -> None:
        class Entry(EntryPoint):
            def load(self) -> Any:
                return loaders[self.value] if self.value in loaders else super().load()

        loaders = {f"package{number}:load": loader for number, (_, loader) in enumerate(declared)}
        entries = [
            Entry(mark, loader if isinstance(loader, str) else f"package{number}:load", detector_module.GROUP)
            for number, (mark, loader) in enumerate(declared)
        ]

        def found(group: str, name: str | None = None) -> list[EntryPoint]:
            assert group == "masklake.detectors"
            return [entry for entry in entries if name in (None, entry.name)]

        monkeypatch.setattr(detector_module, "entry_points", found)

    return declare


def test_mask_rcnn_is_a_detector_with_proposals(tiny: MaskRCNN, tmp_path: Path) -> None:
    save_checkpoint(tiny, tmp_path / "tiny.safetensors")
    model: Detector = load_detector(tmp_path / "tiny.safetensors")
    assert isinstance(model, MaskRCNN)
    assert model.model_id == tiny.model_id
    assert model.categories == PRESETS["tiny"].categories
    assert model.tasks == PRESETS["tiny"].tasks
    assert model.batch_key((64, 96)) == model.batch_key((63, 95)) != model.batch_key((96, 64))
    proposing: TwoStageDetector = tiny
    assert can_propose(proposing)


def test_mask_rcnns_settings_are_those_in_effect(tiny: MaskRCNN) -> None:
    config, options = tiny.config, PredictOptions(max_detections=7, precision="bf16", tasks=frozenset({"box"}))
    assert tiny.settings(options) == {
        "precision": "bf16",
        "score_threshold": config.score_threshold,
        "nms_iou": config.nms_iou,
        "max_detections": 7,
        "mask_threshold": config.mask_threshold,
        "tasks": {"box"},
    }


def test_an_installed_detector_is_loaded_by_the_format_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = second_detector.checkpoint()
    assert not has_loader(data)
    monkeypatch.syspath_prepend(str(second_detector.install(tmp_path)))
    assert has_loader(data)
    model = load_detector(data)
    assert type(model).__module__ == "second_detector"
    assert model.model_id.startswith("torchvision-")
    assert not can_propose(model)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 64, 80), dtype=np.uint8))
    (found,) = model.predict([image], PREDICT)
    assert len(found) == 5
    with pytest.raises(ConfigError, match="has no keypoints"):
        model.settings(PredictOptions(tasks=frozenset({"keypoint"})))


def test_a_format_without_a_loader_is_named_with_those_that_are_read(tmp_path: Path, declare: Declare) -> None:
    declare(("a/1", print), ("b/2", print))
    (tmp_path / "c.safetensors").write_bytes(marked("c/3"))
    with pytest.raises(CheckpointError, match=r"c\.safetensors is of format 'c/3'.*reads masklake/1, a/1, b/2\)"):
        load_detector(tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="is not a MaskLake checkpoint"):
        load_detector(b"something else")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_detector(tmp_path / "absent")


def test_two_packages_that_read_one_format_are_both_named(declare: Declare) -> None:
    declare(("a/1", print), ("a/1", repr))
    with pytest.raises(CheckpointError, match="package0:load and package1:load"):
        load_detector(marked("a/1"))


def test_nobody_else_reads_our_own_format(declare: Declare, tiny: MaskRCNN) -> None:
    declare(("masklake/1", print))
    assert isinstance(load_detector(dumps(tiny)), MaskRCNN)


def test_a_loader_that_fails_is_named_with_what_it_says(declare: Declare) -> None:
    def broken(data: bytes, device: torch.device) -> Detector:
        raise RuntimeError("no weights for level 3")

    def strict(data: bytes, device: torch.device) -> Detector:
        raise CheckpointError("this file is from a later version")

    declare(("a/1", broken), ("b/1", strict), ("c/1", "no_such_package:load"), ("d/1", lambda data, device: object()))
    with pytest.raises(CheckpointError, match=r"'a/1', package0:load, failed: RuntimeError: no weights for level 3"):
        load_detector(marked("a/1"))
    with pytest.raises(CheckpointError, match=r"^this file is from a later version$"):
        load_detector(marked("b/1"))
    with pytest.raises(CheckpointError, match=r"no_such_package:load, failed: ModuleNotFoundError"):
        load_detector(marked("c/1"))
    with pytest.raises(CheckpointError, match=r"gave object, which is no Detector: it has no batch_key, categories"):
        load_detector(marked("d/1"))
