"""RPN and detector trained separately, in four steps, and on stored proposals: through Ray Train, to one checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from masklake.jobs.propose import ProposeOptions
from masklake.jobs.propose import run as propose
from masklake.jobs.shapes import generate
from masklake.jobs.train import TrainReport, run
from masklake.jobs.training.initial_model import build_model
from masklake.jobs.training.options import TrainOptions
from masklake.model import PredictOptions
from masklake.model.errors import CheckpointError, ConfigError, MaskLakeError
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.phases import PHASES
from masklake.model.weights.checkpoint import dumps, load_checkpoint
from masklake.pipeline.coco.reading import read_coco
from masklake.pipeline.errors import AnnotationError
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.training.recipe import Recipe
from masklake.pipeline.training.run import TrainingRun

HEADS = {"box_head", "mask_head", "keypoint_head"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    generate(folder / "train", 4, 64, seed=1)
    generate(folder / "val", 2, 64, seed=2)
    return folder


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    """`run` starts a cluster in this process; the tests here share it, others must not find it."""
    import ray

    yield
    ray.shutdown()


def small_run(data: Path, output: Path, learn: str, **changes: Any) -> TrainOptions:
    values: dict[str, Any] = {
        "train": str(data / "train" / "instances.json"),
        "output": str(output),
        "name": learn,
        "learn": learn,
        "threads": 1,
        "recipe": {"epochs": 1, "batch_size": 2},
    }
    return TrainOptions.model_validate({**values, **changes})


def checkpoint(report: TrainReport, epoch: int) -> MaskRCNN:
    return load_checkpoint(Path(report.checkpoint).parent / f"checkpoint_{epoch:04d}" / "model.safetensors")


def weights(model: MaskRCNN) -> Mapping[str, Tensor]:
    return model.network.state_dict()


def changed_parts(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {name.partition(".")[0] for name in before if name not in after or not torch.equal(before[name], after[name])}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("own_ray")
def test_four_steps_are_one_run_and_end_in_one_network(data: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    options = small_run(data, tmp_path, "four_step", val=str(data / "val" / "instances.json"), workers=2)
    report = run(options, lines.append)
    assert any("4 phases (rpn, detector, rpn, detector) of 1 epoch each" in line for line in lines), lines
    assert (report.epochs, set(report.scores)) == (4, {"bbox", "segm", "keypoints"})
    assert Image.open(report.curves).size == (1200, 480)

    history = json.loads(Path(report.metrics).read_text())["history"]
    assert [row["learn"] for row in history] == ["rpn", "detector", "rpn", "detector"]
    assert [set(row["losses"]) for row in history[:2]] == [
        {"loss", "rpn_objectness", "rpn_box"},
        {"loss", "classifier", "box", "mask", "keypoint"},
    ]
    assert [set(row.get("recall", ())) for row in history[::2]] == [{"proposal AR100", "proposal AR1000"}] * 2

    # The newest two checkpoints are kept: the ends of steps 3 and 4.
    third, fourth, final = checkpoint(report, 3), checkpoint(report, 4), load_checkpoint(report.checkpoint)
    assert changed_parts(weights(third), weights(fourth)) == HEADS
    assert final.model_id == fourth.model_id == report.model_id
    assert final.config.rpn_backbone == "shared"

    with pytest.raises(ConfigError, match="--epochs was 1, is 2"):
        run(options.model_copy(update={"recipe": {"epochs": 2, "batch_size": 2}}), lines.append)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("own_ray")
def test_a_separate_training_ends_in_one_checkpoint_of_both_networks_also_after_a_kill(data: Path, tmp_path: Path) -> None:
    options = small_run(data, tmp_path, "separate")
    report = run(options)
    start = build_model(options, read_coco(Storage(), options.train), Storage())
    first, second = checkpoint(report, 1), checkpoint(report, 2)
    assert changed_parts(weights(start), weights(first)) == {"rpn"}, "and a backbone that is new"
    assert changed_parts(weights(first), weights(second)) == {"backbone", *HEADS}
    final = load_checkpoint(report.checkpoint)
    assert final.config.rpn_backbone == "own"
    picture = torch.zeros(3, 64, 64, dtype=torch.uint8)
    assert len(final.predict([picture], PredictOptions(score_threshold=0.0))) == 1

    # What a kill in the second phase leaves: the first one's end is the newest epoch that is known to be complete.
    folder, lines = Path(report.metrics).parent, []
    (folder / "latest.json").write_text(json.dumps({"epoch": 1, "checkpoint": "checkpoint_0001"}))
    (folder / "metrics.json").unlink()
    again = run(options, lines.append)
    assert any("continues after epoch 1 of 2" in line for line in lines), lines
    assert any(line.startswith("epoch 2/2 (detector), step 2/2") for line in lines), lines
    assert again.model_id == report.model_id, "as if nothing had happened"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("own_ray")
def test_a_detector_learns_on_stored_proposals(data: Path, tmp_path: Path) -> None:
    (tmp_path / "rpn.safetensors").write_bytes(dumps(build_model(*untrained(data, tmp_path))))
    stored = {"weights": str(tmp_path / "rpn.safetensors"), "output": str(tmp_path / "proposals.parquet")}
    proposed = propose(ProposeOptions(coco=str(data / "train" / "instances.json"), workers=1, **stored))
    table = pq.read_table(proposed.output)
    assert (proposed.images, table.num_rows) == (4, 4)
    assert proposed.proposals == sum(len(boxes) // 4 for boxes in table["boxes"].to_pylist()) > 4 * 100

    report = run(small_run(data, tmp_path, "detector", weights=stored["weights"], proposals=proposed.output))
    before, after = load_checkpoint(stored["weights"]), load_checkpoint(report.checkpoint)
    assert changed_parts(weights(before), weights(after)) == {"backbone", *HEADS}
    others = {"train": str(data / "val" / "instances.json"), "name": "other", "proposals": proposed.output}
    with pytest.raises(AnnotationError, match="2 of the 2 images have no proposals"):
        run(small_run(data, tmp_path, "detector", weights=stored["weights"], **others))


def untrained(data: Path, output: Path) -> tuple[Any, Any, Storage]:
    options = small_run(data, output, "rpn", model={"rpn_backbone": "own"})
    return options, read_coco(Storage(), options.train), Storage()


def test_where_proposals_cannot_be_written_is_said_at_once(data: Path, tmp_path: Path) -> None:
    given = {"coco": str(data / "train" / "instances.json"), "weights": str(tmp_path / "none.safetensors")}
    with pytest.raises(ConfigError, match=r"a file of proposals is named \*\.parquet"):
        propose(ProposeOptions(**given, output=str(tmp_path / "p.txt")))
    with pytest.raises(MaskLakeError, match=r"^/proc/nowhere: "):
        propose(ProposeOptions(**given, output="/proc/nowhere/p.parquet"))
    with pytest.raises(CheckpointError):
        propose(ProposeOptions(**given, output=str(tmp_path / "p.parquet")))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_learnt_alone_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stored proposals are for learn"):
        small_run(data, tmp_path, "separate", proposals="p.parquet")
    with pytest.raises(ConfigError, match="needs proposals: give --proposals"):
        run(small_run(data, tmp_path, "detector"))
    with pytest.raises(ConfigError, match="model: rpn_backbone: input should be"):
        build_model(small_run(data, tmp_path, "rpn", model={"rpn_backbone": "ours"}), *untrained(data, tmp_path)[1:])


def test_an_epochs_number_says_its_phase_and_the_last_phases_models_are_exported() -> None:
    values: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(TrainingRun))
    run = TrainingRun(**{**values, "phases": PHASES["four_step"], "recipe": Recipe(epochs=3), "evaluate_every": 2})
    assert run.epochs == 12
    assert [PHASES["four_step"].index(run.phase(epoch)) for epoch in range(13)] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 4
    assert [epoch for epoch in range(1, 13) if run.is_scored(epoch)] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert [row["epoch"] for row in run.candidates([{"epoch": epoch} for epoch in range(1, 12)])] == [10, 11]


def test_weights_of_one_network_begin_both(data: Path, tmp_path: Path) -> None:
    options, dataset, storage = untrained(data, tmp_path)
    shared = build_model(options.model_copy(update={"model": {}}), dataset, storage)
    (tmp_path / "w.safetensors").write_bytes(dumps(shared))
    own = build_model(options.model_copy(update={"weights": str(tmp_path / "w.safetensors")}), dataset, storage)
    for name, weight in weights(shared).items():
        assert torch.equal(weights(own)[name], weight)
        if name.startswith("backbone."):
            assert torch.equal(weights(own)[f"rpn_{name}"], weight)
