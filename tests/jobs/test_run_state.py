"""A run stays one result over starts, kills, extensions and changes: its model, numbers and curves agree."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from pydantic import ValidationError

from masklake.jobs.train import run
from masklake.jobs.training.options import TrainOptions
from masklake.jobs.training.record import CHANGEABLE, data_facts
from masklake.model.create import create_model
from masklake.model.errors import ConfigError, MaskLakeError
from masklake.model.weights.checkpoint import dumps
from masklake.pipeline.coco.reading import parse_coco
from masklake.pipeline.errors import InputNotFoundError
from masklake.pipeline.storage.objects import OBJECT_SCHEMA
from masklake.pipeline.storage.storage import Storage
from tests.jobs.fake_trainer import KILLS, FakeTrainer, Killed, begin_at_zero, check_result, counting_run, draw_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_data(tmp_path_factory.mktemp("shapes"))


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> FakeTrainer:
    begin_at_zero(monkeypatch)
    return FakeTrainer(monkeypatch)


def quiet(line: str) -> None:
    """Nobody listens."""


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("kill", KILLS)
def test_a_start_that_ends_anywhere_loses_at_most_its_epoch(
    data: Path, tmp_path: Path, trainer: FakeTrainer, kill: str, keep: str
) -> None:
    options = counting_run(data, tmp_path, keep=keep)
    trainer.kill = kill
    if kill == "best" and keep == "last":
        trainer.kill = None  # there is none
    else:
        with pytest.raises(Killed):
            run(options, quiet)
    assert not (tmp_path / "r" / "metrics.json").exists()
    report = run(options, quiet)
    check_result(tmp_path / "r", 2, keep)
    assert report.epochs == 2
    assert trainer.trained == ([1, 1, 2] if kill == "report" else [1, 2]), "what was saved is not trained again"
    assert run(options, quiet) == report.model_copy(update={"resumed_from": 2})
    assert len(trainer.trained) == (3 if kill == "report" else 2)


def test_latest_json_names_what_a_power_cut_leaves(
    data: Path, tmp_path: Path, trainer: FakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of a checkpoint is on the disk before the pointer to it is written; so is the result, file by file."""
    happened: list[str] = []
    fsync, write = os.fsync, Storage.write_bytes

    def synced(descriptor: int) -> None:
        happened.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path / "r"))
        fsync(descriptor)

    def written(storage: Storage, uri: str, content: bytes) -> None:
        write(storage, uri, content)
        happened.append(f"wrote {uri.rpartition('/')[2]}")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Storage, "write_bytes", written)
    run(counting_run(data, tmp_path, epochs=1), quiet)
    before = happened[: happened.index("wrote latest.json")]
    folder = tmp_path / "r" / "checkpoint_0001"
    assert {f"checkpoint_0001/{path.name}" for path in folder.iterdir()} <= set(before)
    assert "checkpoint_0001" in before, "the files' names"
    assert before[-1] == ".", "the name of the folder itself"


def test_an_error_of_the_evaluator_loses_no_training(
    data: Path, tmp_path: Path, trainer: FakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("keypoints")

    options = counting_run(data, tmp_path, evaluate_every=0)
    with monkeypatch.context() as patch:
        patch.setattr("masklake.pipeline.training.validation.evaluate", broken)
        for _ in range(2):
            with pytest.raises(KeyError):
                run(options, quiet)
    assert trainer.trained == [1, 2]
    run(options, quiet)
    assert (trainer.trained, trainer.scored) == ([1, 2], [2])


def test_an_extension_that_is_unfinished_is_not_complete(data: Path, tmp_path: Path, trainer: FakeTrainer) -> None:
    run(counting_run(data, tmp_path, epochs=1), quiet)
    trainer.kill = "metrics.json"
    with pytest.raises(Killed):
        run(counting_run(data, tmp_path, epochs=3), quiet)
    assert not (tmp_path / "r" / "metrics.json").exists(), "the first epoch's numbers beside the third one's model"
    run(counting_run(data, tmp_path, epochs=3), quiet)
    check_result(tmp_path / "r", 3, "last")
    assert trainer.trained == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"has done 3 epochs, more than the 2 .*--epochs"):
        run(counting_run(data, tmp_path, epochs=2), quiet)


def test_a_stale_result_is_not_taken_for_the_runs(data: Path, tmp_path: Path, trainer: FakeTrainer) -> None:
    """What an older version left: numbers of one epoch beside a run of two."""
    run(counting_run(data, tmp_path, epochs=1), quiet)
    stale = (tmp_path / "r" / "metrics.json").read_bytes()
    trainer.kill = "metrics.json"
    with pytest.raises(Killed):
        run(counting_run(data, tmp_path), quiet)
    for left in (stale, b"", b"{", b"[]"):
        (tmp_path / "r" / "metrics.json").write_bytes(left)
        run(counting_run(data, tmp_path), quiet)
        check_result(tmp_path / "r", 2, "last")


# -- what may change ---------------------------------------------------------------------------------------------------


def other_json(data: Path) -> None:
    document = json.loads((data / "train" / "instances.json").read_text())
    document["annotations"][0]["bbox"][0] += 1
    (data / "train" / "instances.json").write_text(json.dumps(document))


def other_image(data: Path) -> None:
    path = sorted((data / "train" / "images").iterdir())[0]
    path.write_bytes(path.read_bytes() + b"\0")


def other_truth(data: Path) -> None:
    (data / "val" / "instances.json").write_text((data / "val" / "instances.json").read_text() + "\n")


CONTENTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "annotations": (other_json, r"TRAIN: the content of \S+instances\.json has changed \(SHA-256 \w{12} then, \w{12} now\)"),
    "an image": (other_image, r"--images: \S+images had 3 images of [\d,]+ bytes for this file and has 3 of [\d,]+"),
    "the truth": (other_truth, r"--val: the content of \S+instances\.json has changed"),
}


@pytest.mark.parametrize(("change", "message"), CONTENTS.values(), ids=CONTENTS.keys())
def test_data_that_changed_is_refused_by_a_finished_run(
    tmp_path: Path, trainer: FakeTrainer, change: Callable[[Path], None], message: str
) -> None:
    draw_data(tmp_path)
    run(counting_run(tmp_path, tmp_path, epochs=1), quiet)
    change(tmp_path)
    with pytest.raises(ConfigError, match=rf"the run 'r' was started with other options: {message}.*another --name$"):
        run(counting_run(tmp_path, tmp_path, epochs=1), quiet)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 5}, r"--seed was 0, is 5\."),
    "keep": ({"keep": "best"}, r"--keep was last, is best \(--evaluate-every 1\)\."),
    "rate": ({"recipe": {"epochs": 1, "learning_rate": 0.5}}, r"--learning-rate was 0\.001, is 0\.5\."),
    "recipe": ({"recipe": {"epochs": 1, "gamma": 0.5}}, r"\[recipe\] gamma was 0\.1, is 0\.5\."),
    "model": ({"model": {"max_size": 300}}, r"\[model\] max_size was 512, is 300\."),
    "tasks": ({"tasks": ["box"]}, r"\[model\] keypoint was true, is the default; .*--tasks was \[.*mask.*\], is \[.*box.*\]\."),
    "crop": ({"augmentation": {"crop": 48}}, r"--crop was the default, is 48\."),
    "no val": ({"val": None}, r"--val was \S+instances\.json, is none; --val-images was \S+, is none\."),
    "max_dets": ({"max_dets": [1, 10]}, r"max_dets was \[1, 10, 100\], is \[1, 10\]\."),
    "keep_empty": ({"keep_empty": True}, r"keep_empty was false, is true\."),
    "learn": ({"learn": "rpn"}, r"--learn was joint, is rpn\."),
}


def test_options_that_change_the_result_are_refused_with_both_values(data: Path, tmp_path: Path, trainer: FakeTrainer) -> None:
    run(counting_run(data, tmp_path, epochs=1), quiet)
    for changes, message in CHANGES.values():
        with pytest.raises(ConfigError, match=rf"the run 'r' was started with other options: {message}"):
            run(counting_run(data, tmp_path, **{"epochs": 1, **changes}), quiet)
    for changes in ({"val": "none.json"}, {"train": "none.json"}, {"weights": str(tmp_path / "none.pth")}):
        with pytest.raises(InputNotFoundError, match="none"):
            run(counting_run(data, tmp_path, **{"epochs": 1, **changes}), quiet)
    check_result(tmp_path / "r", 1, "last")


def test_allow_missing_may_be_added_and_not_taken_away(data: Path, tmp_path: Path, trainer: FakeTrainer) -> None:
    run(counting_run(data, tmp_path, epochs=1), quiet)
    assert run(counting_run(data, tmp_path, epochs=2, allow_missing=True), quiet).epochs == 2
    run(counting_run(data, tmp_path, epochs=1, name="allowing", allow_missing=True), quiet)
    with pytest.raises(ConfigError, match=r"--allow-missing was true, is false\."):
        run(counting_run(data, tmp_path, epochs=1, name="allowing"), quiet)


def test_weights_are_known_by_their_content(data: Path, tmp_path: Path, trainer: FakeTrainer) -> None:
    torch.manual_seed(0)
    path = tmp_path / "start.safetensors"
    path.write_bytes(dumps(create_model("tiny")))
    options = {"weights": str(path), "reset_predictors": True, "model": {}}
    values = {**counting_run(data, tmp_path, epochs=1).model_dump(), **options}
    run(TrainOptions.model_validate(values), quiet)
    (tmp_path / "moved.safetensors").write_bytes(path.read_bytes())
    moved = TrainOptions.model_validate({**values, "weights": str(tmp_path / "moved.safetensors")})
    assert run(moved, quiet).epochs == 1, "the same weights elsewhere"
    path.write_bytes(dumps(create_model("tiny")))
    with pytest.raises(ConfigError, match=r"--weights: the content of \S+start\.safetensors has changed"):
        run(TrainOptions.model_validate(values), quiet)


def test_what_may_change_does(tmp_path: Path, trainer: FakeTrainer) -> None:
    first = draw_data(tmp_path / "a")
    run(counting_run(first, tmp_path, epochs=1), quiet)
    first.rename(tmp_path / "b")
    moved = counting_run(tmp_path / "b", tmp_path, workers=2, device="cpu", threads=1, max_failures=0, address="auto", epochs=2)
    run(moved, quiet)
    check_result(tmp_path / "r", 2, "last")
    assert trainer.trained == [1, 2]


def test_every_option_is_recorded_or_may_change(data: Path, tmp_path: Path, trainer: FakeTrainer) -> None:
    """A new option has to choose: into the record, or into the table of those that change no result."""
    run(counting_run(data, tmp_path, epochs=1), quiet)
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert set(TrainOptions.model_fields) == {key for key in record if key in TrainOptions.model_fields} | set(CHANGEABLE)
    assert not set(CHANGEABLE) & {key for key in record if key != "val_images"} - {"val_images"}


def test_records_of_other_versions_and_damaged_ones_are_told(data: Path, tmp_path: Path, trainer: FakeTrainer) -> None:
    run(counting_run(data, tmp_path, epochs=1), quiet)
    record = tmp_path / "r" / "run.json"
    for left, message in (
        ('{"train": "a.json", "seed": 0}', r"written by another version of MaskLake .* another --name"),
        ("[]", "written by another version"),
        ("{", r"run\.json is damaged .* another --name"),
    ):
        record.write_text(left)
        with pytest.raises(ConfigError, match=message):
            run(counting_run(data, tmp_path, epochs=1), quiet)


def test_the_epochs_that_are_scored_count_where_the_best_is_kept(data: Path, tmp_path: Path, trainer: FakeTrainer) -> None:
    run(counting_run(data, tmp_path, epochs=1), quiet)
    run(counting_run(data, tmp_path, epochs=1, evaluate_every=3), quiet)
    run(counting_run(data, tmp_path, epochs=1, name="b", keep="best"), quiet)
    with pytest.raises(ConfigError, match=r": --keep was best \(--evaluate-every 1\), is best \(--evaluate-every 3\)\."):
        run(counting_run(data, tmp_path, epochs=1, name="b", keep="best", evaluate_every=3), quiet)


def test_images_outside_of_a_stores_folder_are_known_by_their_size(data: Path, tmp_path: Path) -> None:
    class Elsewhere(Storage):
        def list_objects(self, uri: str, *_: Any) -> Iterator[pa.RecordBatch]:
            yield pa.record_batch([[f"{uri}/in.jpg"], ["e"], [7]], schema=OBJECT_SCHEMA)

    outside = tmp_path / "out.jpg"
    images = [{"id": n, "file_name": name, "width": 9, "height": 9} for n, name in enumerate(("in.jpg", str(outside)))]
    truth = parse_coco({"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}, "x.json")
    file, facts = str(data / "val" / "instances.json"), []
    for size in (3, 4):
        outside.write_bytes(b"0" * size)
        facts.append(data_facts(Elsewhere(), file, truth, "s3://b/images")["images"])
    assert [fact["bytes"] for fact in facts] == [10, 11]
    assert facts[0]["sha256"] != facts[1]["sha256"]


def test_epochs_without_a_record_are_of_nobody_knows_what(data: Path, tmp_path: Path, trainer: FakeTrainer) -> None:
    run(counting_run(data, tmp_path, epochs=1), quiet)
    (tmp_path / "r" / "run.json").unlink()
    for epochs in (1, 2):
        with pytest.raises(ConfigError, match=r"has done 1 epoch and has no run\.json"):
            run(counting_run(data, tmp_path, epochs=epochs), quiet)
    assert trainer.trained == [1]


def test_the_best_epoch_needs_scores(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"known by its scores: give --val"):
        counting_run(data, tmp_path, keep="best", val=None)


# -- any order ---------------------------------------------------------------------------------------------------------


class Runs(RuleBasedStateMachine):
    """Starts with and without kills, longer and shorter, with options that may and may not change, in any order."""

    data: Path

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        begin_at_zero(self.patch)
        self.trainer = FakeTrainer(self.patch)
        self.folder = tempfile.TemporaryDirectory()
        self.output = Path(self.folder.name)
        self.keep: str | None = None

    def teardown(self) -> None:
        self.patch.undo()
        self.folder.cleanup()

    @property
    def done(self) -> int:
        path = self.output / "r" / "latest.json"
        return int(json.loads(path.read_text())["epoch"]) if path.exists() else 0

    @rule(epochs=st.integers(1, 4), keep=st.sampled_from(["last", "best"]), kill=st.sampled_from([None, None, *KILLS]))
    def start(self, epochs: int, keep: str, kill: str | None) -> None:
        options = counting_run(self.data, self.output, epochs=epochs, keep=keep)
        refused = epochs < self.done or (self.keep is not None and keep != self.keep)
        self.trainer.kill = None if refused else kill
        try:
            report = run(options, quiet)
        except ConfigError:
            assert refused
        except Killed:
            assert not (self.output / "r" / "metrics.json").exists()
        else:
            assert not refused
            assert report.epochs == epochs
            check_result(self.output / "r", epochs, keep)
        if not refused:
            self.keep = keep
        self.trainer.kill = None

    @precondition(lambda self: self.keep is not None)
    @rule(change=st.sampled_from([{"seed": 1}, {"max_dets": [7]}, {"keep_empty": True}]))
    def change(self, change: dict[str, Any]) -> None:
        before = sorted(path.name for path in (self.output / "r").iterdir())
        with pytest.raises(MaskLakeError, match="was started with other options"):
            run(counting_run(self.data, self.output, **{"epochs": 4, "keep": self.keep, **change}), quiet)
        assert sorted(path.name for path in (self.output / "r").iterdir()) == before


@pytest.mark.parametrize("examples", [5, pytest.param(60, marks=pytest.mark.faults)])
def test_in_any_order(data: Path, examples: int) -> None:
    Runs.data = data
    some = settings(max_examples=examples, stateful_step_count=6, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Runs, settings=some)  # type: ignore[no-untyped-call]
