"""The training loop's parts without Ray: an epoch's steps and losses, the images that it replaces, its scores."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from masklake.jobs.shapes import generate
from masklake.model.create import create_model
from masklake.model.phases import PHASES
from masklake.pipeline.coco.image_check import usable_images
from masklake.pipeline.coco.reading import read_coco
from masklake.pipeline.errors import AnnotationError, TrainingError
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.training.augmentation import Augmentation, SampleSpec
from masklake.pipeline.training.epoch import Losses, _agreed, _check_finite, run_epoch
from masklake.pipeline.training.loader import Loader, training_rows
from masklake.pipeline.training.recipe import build_optimizer, recipe_of
from masklake.pipeline.training.run import Images, State, Worker
from masklake.pipeline.training.validation import Validation, _is_best, _scored, evaluate, predict_share

JOINT = PHASES["joint"][0]


def alone(lines: list[str]) -> Worker:
    """The only worker of a run; `lines` gets what it says."""
    return Worker(0, 1, torch.device("cpu"), lambda model: model, lambda *_: None, lines.append)


def test_images_that_training_met_count_with_those_left_out_before() -> None:
    images = Images("x.json", listed=100, left_out=2, dropped={}, most_unusable=0.05)
    images.check([])
    images.check({"a.jpg: cut off", "b.jpg: cut off", "c.jpg: cut off"})
    with pytest.raises(AnnotationError, match=r"6 of the 100 images of x.json cannot be used: a: cut; b: .*--max-unusable"):
        images.check({f"{name}: cut" for name in "abcd"})


def test_an_evaluation_leaves_out_what_it_could_not_read_up_to_the_limit(tmp_path: Path) -> None:
    """A file that is cut short and one of another size have no part in the score; neither counts as empty."""
    generate(tmp_path, 4, 96, seed=2)
    truth = read_coco(Storage(), str(tmp_path / "instances.json"))
    first, second = (tmp_path / "images" / image.file_name for image in truth.images[:2])
    first.write_bytes(first.read_bytes()[:300])
    Image.new("RGB", (50, 40)).save(second)
    validation = Validation(truth, str(tmp_path / "images"), (100,), most_unusable=0.5)
    torch.manual_seed(0)
    unusable: dict[int, str] = {}
    predict_share(create_model("tiny", categories=truth.categories), validation, Storage(), unusable=unusable)
    assert list(unusable) == [image.id for image in truth.images[:2]]
    assert "the upright image is 50 x 40 pixels, its annotations are for 96 x" in unusable[truth.images[1].id]
    scored, reasons = _scored(validation, unusable)
    assert [image.id for image in scored.truth.images] == [image.id for image in truth.images[2:]]
    assert len(reasons) == 2
    with pytest.raises(AnnotationError, match=r"2 of the 4 images of .*instances\.json cannot be used"):
        _scored(dataclasses.replace(validation, most_unusable=0.3), unusable)


def test_an_epoch_has_all_its_steps_though_half_its_images_are_broken(tmp_path: Path) -> None:
    generate(tmp_path, 4, 96, seed=2)
    truth = read_coco(Storage(), str(tmp_path / "instances.json"))
    for image in truth.images[:2]:
        path = tmp_path / "images" / image.file_name
        path.write_bytes(path.read_bytes()[:-200])
    whole = usable_images(Storage(), truth, str(tmp_path / "images"), most=0.5)
    assert len(whole.images) == 4  # their headers are fine
    model = create_model("tiny", categories=truth.categories)
    spec = SampleSpec(truth.categories, True, model.config.num_keypoints, Augmentation(), seed=0)
    loader = Loader(training_rows(whole, str(tmp_path / "images"), spec), spec, Storage(), skip_bad=True)
    recipe, lines = recipe_of("tiny"), list[str]()
    worker = alone(lines)
    run: Any = types.SimpleNamespace(recipe=recipe, steps_per_epoch=2, spec=spec, phases=("joint",), epochs=1)
    run.images = Images.of(whole, 0.5)
    state = State(0, model, build_optimizer(model, recipe, 0.0))
    batches = [loader.load([2 * n, 2 * n + 1], [0, 0]) for n in range(2)]
    row = run_epoch(run, worker, state, model, iter(batches))
    assert len(row["replaced"]) == 2
    assert row["losses"]["loss"] > 0
    told = [line for line in lines if line.startswith("2 images could not be used and were replaced: ")]
    assert len(told) == 1
    later = State(1, model, state.optimizer, history=[row], told=state.told)
    run.epochs = 3
    assert "replaced" not in run_epoch(run, worker, later, model, iter(batches)), "they are in the history"
    assert [line for line in lines if "were replaced" in line] == told, "and were shown"
    resumed = State(1, model, state.optimizer, history=[row])
    run_epoch(run, worker, resumed, model, iter(batches))
    assert [line for line in lines if "were replaced" in line] == told * 2, "each start shows them"
    validation = Validation(whole, str(tmp_path / "images"), (100,), 0.5)
    assert len(evaluate(validation, Storage(), JOINT, model, worker)["not_scored"]) == 2
    assert any(line.startswith("2 images could not be used and are not scored: ") for line in lines)
    run.images = Images.of(whole, 0.3)
    model.train()
    with pytest.raises(AnnotationError, match=r"of the 4 images of .* cannot be used"):
        run_epoch(run, worker, state, model, iter(batches))
    run.images = Images.of(whole, 0.5)
    with pytest.raises(TrainingError, match="epoch 1 ended after 1 of 2 steps"):
        run_epoch(run, worker, state, model, iter(batches[:1]))


def test_losses_average_over_the_steps_since_the_last_look() -> None:
    losses = Losses()
    for value in (1.0, 3.0):
        losses.add({"loss": torch.tensor(value), "mask": torch.tensor(2 * value)})
    assert losses.recent() == {"loss": 2.0, "mask": 4.0}
    losses.add({"loss": torch.tensor(8.0), "mask": torch.tensor(0.0)})
    assert losses.recent() == {"loss": 8.0, "mask": 0.0}
    losses.add({"loss": torch.tensor(0.0), "mask": torch.tensor(0.0)})  # nobody has looked at this one
    assert losses.means() == pytest.approx({"loss": 3.0, "mask": 2.0})


def test_one_worker_agrees_with_itself_and_looks_again() -> None:
    assert [_agreed(steps, alone([])) for steps in (0, 1, 40)] == [1, 1, 40]


def test_a_loss_that_is_no_number_ends_training() -> None:
    _check_finite({"loss": 1e9}, 1, 5, 0.1)
    with pytest.raises(TrainingError, match=r"diverged in epoch 1 by step 5: loss is not finite at learning rate 0\.1"):
        _check_finite({"loss": float("nan"), "mask": 1.0}, 1, 5, 0.1)


def test_the_best_epoch_goes_by_masks_then_boxes() -> None:
    assert _is_best([{"ap": {"mask AP": 0.3, "box AP": 0.9}}, {"ap": {"mask AP": 0.4, "box AP": 0.1}}])
    assert not _is_best([{"ap": {"box AP": 0.3}}, {"ap": {"box AP": 0.2}}])
    assert not _is_best([{"ap": {"box AP": 0.3}}, {}])
    assert _is_best([{"recall": {"proposal AR1000": 0.3}}, {"recall": {"proposal AR1000": 0.4}}])
    assert not _is_best([{"recall": {"proposal AR1000": 0.3}}, {"recall": {"proposal AR1000": 0.2}}])
