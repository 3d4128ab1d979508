"""`masklake train`: checks the data and the options, runs the training on Ray Train, and reports the results.

A run is identified by its name: the same command continues after the last complete epoch, and says so if the run is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from masklake.jobs.cluster.connection import connect_ray
from masklake.jobs.training.fit import Say, TrainingPlan, fit, set_up_ray_train, workers_get_gpus
from masklake.jobs.training.initial_model import build_model, check_proposals
from masklake.jobs.training.messages import to_stderr
from masklake.jobs.training.options import TrainOptions
from masklake.jobs.training.record import RUN_RECORD, check_record, data_facts, file_facts, read_record, record_of
from masklake.model.config import ModelConfig
from masklake.model.errors import ConfigError, validated
from masklake.model.wording import counted, percent
from masklake.pipeline.coco.dataset import CocoDataset, check_dropped, counted_reason, image_folder
from masklake.pipeline.coco.image_check import usable_images
from masklake.pipeline.coco.reading import read_coco
from masklake.pipeline.errors import EmptyInputError
from masklake.pipeline.results.evaluation import KIND_NAMES, IouType
from masklake.pipeline.storage.literal_keys import is_plain
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import canonical, parse_uri
from masklake.pipeline.training.augmentation import SampleSpec
from masklake.pipeline.training.loader import training_rows
from masklake.pipeline.training.proposals import read_proposals
from masklake.pipeline.training.recipe import Recipe, recipe_of
from masklake.pipeline.training.run_folder import CURVES, METRICS, MODEL, read_latest, read_result
from masklake.pipeline.training.validation import Validation


class TrainReport(BaseModel):
    """The results of a run.

    scores: COCO metrics by kind (bbox, segm, keypoints), 0 to 1. recall: of the proposals, 0 to 1, if the RPN was trained
    alone. epochs: those of all phases together.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    checkpoint: str
    metrics: str
    curves: str
    model_id: str
    epochs: int
    resumed_from: int = Field(description="Epochs that were done before this start.")
    device: str
    seconds: float = Field(description="Of training steps, over all starts.")
    scores: dict[IouType, dict[str, Any]]
    recall: dict[str, float | None]


def run(options: TrainOptions, say: Say = to_stderr) -> TrainReport:
    """Starts or continues the training run `options.name`, and returns its results. docs/training.md lists the errors."""
    storage = Storage(options.storage)
    _check_places(options)
    recipe = validated(Recipe, {**recipe_of(options.preset).model_dump(), **options.recipe}, "recipe")
    latest = read_latest(storage, options.run_uri)
    done = latest["epoch"] if latest else 0
    epochs = len(options.phases) * recipe.epochs
    known = read_record(storage, options.run_uri)
    _check_recorded(options, known, done)
    _check_epochs(options, done, epochs)
    finished = read_result(storage, options.run_uri, epochs) is not None
    if not finished:
        storage.check_writable(options.run_uri)
    data, validation = _read_data(storage, options, _silent if finished else say)
    model = build_model(options, data, storage)
    check_proposals(options, model.config)
    record = _record(storage, options, recipe, model.config, data, validation)
    if known is not None:
        check_record(known, record, options.name)
    if finished:
        say(f"run '{options.name}' is complete: {counted(epochs, 'epoch')}. Its results are in {options.run_uri}.")
        return _report(storage, options, done)
    spec = _sample_spec(model.config, options)
    proposals = None if options.proposals is None else read_proposals(storage, options.proposals)
    rows = training_rows(data, image_folder(options.images, options.train), spec, options.keep_empty, proposals)
    capacity = connect_ray(options.address)
    gpu = workers_get_gpus(options, capacity)
    # Only now, so that options which were refused above leave no record behind.
    storage.write_bytes(Storage.join(options.run_uri, RUN_RECORD), json.dumps(record, indent=1).encode())
    # The metrics mark a run as complete; they would not belong to the model that is trained now.
    storage.delete(Storage.join(options.run_uri, METRICS))
    set_up_ray_train(capacity)
    if done:
        say(f"run '{options.name}' continues after epoch {done} of {epochs}")
    plan = TrainingPlan(options, recipe, spec, rows, model, validation, gpu, capacity.embedded, done, data)
    fit(plan, storage, say)
    return _report(storage, options, done)


def _check_places(options: TrainOptions) -> None:
    """Raises ConfigError for an output with a key that clients name differently, or an input inside the run's folder."""
    at = parse_uri(options.run_uri)
    if not at.is_local and not is_plain(at.key):
        raise ConfigError(
            f"--output {options.output!r}: a run cannot be stored under a key with `//`, `/./`, `/../` or a control character; "
            "give another"
        )
    sources = {
        "the file TRAIN": options.train,
        "the file of --val": options.val,
        "the file of --weights": options.weights,
        "the file of --proposals": options.proposals,
    }
    for what, source in sources.items():
        if source is not None and f"{canonical(source)}/".startswith(f"{options.run_uri}/"):
            raise ConfigError(
                f"{source}: {what} lies in the folder of the run '{options.name}', which the run writes; "
                "choose another --name or --output, or move the file"
            )


def _silent(line: str) -> None:
    """Shows nothing."""


# -- data, model and record --------------------------------------------------------------------------------------------


def _read_data(storage: Storage, options: TrainOptions, say: Say) -> tuple[CocoDataset, Validation | None]:
    """Returns checked training and validation data; shows a line on each."""
    data = _read_images(storage, options, options.train, image_folder(options.images, options.train), say, "training")
    if options.val is None:
        return data, None
    folder = image_folder(options.val_images, options.val)
    truth = _read_images(storage, options, options.val, folder, say, "scoring")
    if unknown := {c.id: c.name for c in truth.categories}.items() - {c.id: c.name for c in data.categories}.items():
        raise ConfigError(f"{options.val} has categories that {options.train} does not have: {sorted(unknown)}.")
    return data, Validation(truth, folder, options.max_dets, options.most_unusable)


def _read_images(storage: Storage, options: TrainOptions, uri: str, folder: str, say: Say, purpose: str) -> CocoDataset:
    """Returns a checked COCO file without its unusable images; shows a line on it."""
    whole = read_coco(storage, uri)
    check_dropped(whole, options.max_unusable)
    if not whole.images:
        raise EmptyInputError(f"{uri} lists no image.")
    data = usable_images(storage, whole, folder, options.most_unusable)
    say(f"{purpose} on {describe_data(data)}")
    return data


def describe_data(data: CocoDataset) -> str:
    """Returns one line: how much data there is, which instances lack the ground truth of a task, and what was left out."""
    lacking = "".join(
        "; " + counted(count, f"instance {what}: it counts in all else", f"instances {what}: they count in all else")
        for what, count in data.incomplete().items()
    )
    left_out = lacking + "".join(f"; left out: {counted_reason(count, reason)}" for reason, count in data.dropped.items())
    return (
        f"{counted(len(data.images), 'image')} with {counted(data.instance_count(), 'instance')} of "
        f"{counted(len(data.categories), 'category')} ({data.source}){left_out}"
    )


def _sample_spec(config: ModelConfig, options: TrainOptions) -> SampleSpec:
    return SampleSpec(
        categories=config.categories,
        masks="mask" in config.tasks,
        keypoints=config.num_keypoints,
        augmentation=options.augmentation,
        seed=options.seed,
        keypoint_offset=config.keypoint_offset,
    )


def _check_recorded(options: TrainOptions, known: Mapping[str, Any] | None, done: int) -> None:
    """Raises ConfigError if a run has epochs but no record, so that its options are unknown."""
    if done and known is None:
        raise ConfigError(
            f"the run '{options.name}' in {options.output} has done {counted(done, 'epoch')} and has no {RUN_RECORD}, which "
            "records its options; restore that file, remove the run's folder, or give another --name"
        )


def _check_epochs(options: TrainOptions, done: int, epochs: int) -> None:
    """Raises ConfigError if a run is to have fewer epochs than it has completed."""
    if done > epochs:
        raise ConfigError(
            f"the run '{options.name}' in {options.output} has done {counted(done, 'epoch')}, more than the {epochs} that "
            "are requested now: give at least as many --epochs as before, or another --name"
        )


def _record(
    storage: Storage,
    options: TrainOptions,
    recipe: Recipe,
    config: ModelConfig,
    data: CocoDataset,
    validation: Validation | None,
) -> dict[str, Any]:
    """Returns the record for this start."""
    val = None
    if options.val is not None and validation is not None:
        val = data_facts(storage, options.val, validation.truth, validation.folder)
    return record_of(
        options,
        recipe,
        config,
        data_facts(storage, options.train, data, image_folder(options.images, options.train)),
        val,
        {name: file_facts(storage, getattr(options, name)) for name in ("weights", "proposals")},
    )


# -- results -----------------------------------------------------------------------------------------------------------


def _report(storage: Storage, options: TrainOptions, done: int) -> TrainReport:
    uri = Storage.join(options.run_uri, METRICS)
    metrics = json.loads(storage.read_bytes(uri))
    return TrainReport(
        name=options.name,
        checkpoint=Storage.join(options.run_uri, MODEL),
        metrics=uri,
        curves=Storage.join(options.run_uri, CURVES),
        model_id=metrics["model_id"],
        epochs=metrics["epochs"],
        resumed_from=done,
        device=metrics["device"],
        seconds=metrics["seconds"],
        scores=metrics["scores"],
        recall=metrics.get("recall", {}),
    )


def describe(report: TrainReport) -> str:
    """Returns the report as text: the results, and where the files are."""
    lines = [
        f"run '{report.name}': {report.model_id} after {counted(report.epochs, 'epoch')} "
        f"({report.device}, {report.seconds:.0f} s of training)"
    ]
    for kind, score in report.scores.items():
        lines.append(f"  {KIND_NAMES[kind]:9} AP {percent(score['ap'])}, AP50 {percent(score['ap50'])}")
    lines += [f"  {name} {percent(value)}" for name, value in report.recall.items()]
    lines += [f"  checkpoint  {report.checkpoint}", f"  metrics     {report.metrics}", f"  curves      {report.curves}"]
    return "\n".join(lines)
