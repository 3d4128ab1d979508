"""`masklake train`: check the data and the plan, hand the run to Ray Train, and draw what came of it.

What a worker does is in `jobs.training.worker`. A run is known by its name: the same command goes on after the last complete
epoch, and says so when nothing is left to do.
"""

from __future__ import annotations

import json
import os
import re
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray.train
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from ray.train.torch import TorchTrainer

from masklake.jobs.cluster.connection import Capacity, connect, cores, interruptible, last_line
from masklake.jobs.cluster.waiting import said_while_waiting
from masklake.jobs.fields import TrainFields
from masklake.jobs.training.messages import Listener, failure_on, start_board, to_stderr
from masklake.jobs.training.record import RUN_RECORD, check_record, data_facts, file_facts, read_record, record_of
from masklake.jobs.training.worker import TrainingJob, train, user_error
from masklake.model.build import create_model, holds_classifier
from masklake.model.config import ModelConfig
from masklake.model.errors import ConfigError, faults
from masklake.model.fields import Task
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.phases import COURSES, Phase, with_rpn_backbone
from masklake.model.presets import preset as preset_config
from masklake.model.weights.checkpoint import dumps
from masklake.model.wording import agreeing, counted
from masklake.pipeline.coco.dataset import CocoDataset, check_dropped, counted_reason, image_folder
from masklake.pipeline.coco.image_check import unusable_share, usable_images
from masklake.pipeline.coco.reading import read_coco
from masklake.pipeline.errors import ClusterTooSmallError, EmptyInputError, InputNotFoundError, TrainingError
from masklake.pipeline.results.evaluation import KIND_NAMES, IouType
from masklake.pipeline.storage.literal_keys import is_plain
from masklake.pipeline.storage.options import StorageOptions
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import canonical, parse
from masklake.pipeline.training.augmentation import Augmentation, SampleSpec
from masklake.pipeline.training.loader import Loader, training_rows
from masklake.pipeline.training.proposals import read_proposals
from masklake.pipeline.training.recipe import Recipe, recipe_of
from masklake.pipeline.training.run import Images, TrainingRun
from masklake.pipeline.training.run_folder import CURVES, METRICS, MODEL, read_latest, read_result
from masklake.pipeline.training.stream import SampleStream
from masklake.pipeline.training.validation import Validation

TABLES: Mapping[str, type[BaseModel]] = {
    "recipe": Recipe,
    "model": ModelConfig,
    "augmentation": Augmentation,
    "storage": StorageOptions,
}
"""Of a training configuration's file, and what they hold."""

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

REQUIRED: Mapping[str, str] = {
    "train": "TRAIN (the COCO JSON to learn from)",
    "output": "--output (the folder or prefix that holds runs)",
    "name": "--name (the run's name)",
}
"""Options without a default, as the command line names them."""

Say = Callable[[str], None]
T = TypeVar("T", bound=BaseModel)


class TrainOptions(BaseModel, TrainFields, frozen=True):
    """One training run, complete. `recipe` and `model` change single fields of the preset's own."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    recipe: dict[str, Any] = {}
    model: dict[str, Any] = {}
    augmentation: Augmentation = Augmentation()
    storage: StorageOptions = StorageOptions()

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not RUN_NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is not a run's name: use letters from a to z, digits, '.', '-' and '_', and begin with a letter or "
                "a digit (it names a folder)"
            )
        return name

    @field_validator("proposals")
    @classmethod
    def _check_proposals(cls, proposals: str | None, info: ValidationInfo) -> str | None:
        if proposals is not None and info.data.get("learn") != "detector":
            raise ValueError('stored proposals are for learn = "detector"; elsewhere the model makes its own')
        return proposals

    @field_validator("keep")
    @classmethod
    def _check_keep(cls, keep: str, info: ValidationInfo) -> str:
        if keep == "best" and info.data.get("val") is None:
            raise ValueError("the best epoch is known by its scores: give --val, or keep the last")
        return keep

    @property
    def course(self) -> tuple[Phase, ...]:
        """What learns, phase by phase."""
        return COURSES[self.learn]

    @property
    def most_unusable(self) -> float:
        """Share of images that may be left out."""
        return unusable_share(self.allow_missing, self.max_unusable)

    @property
    def run_uri(self) -> str:
        """The run's folder."""
        return Storage.join(canonical(self.output), self.name)


class TrainReport(BaseModel):
    """What a run left behind. scores: COCO's numbers by kind (bbox, segm, keypoints), 0 to 1; recall: of proposals, 0 to 1,
    where the RPN learnt alone. Epochs are those of all phases together.
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


def read_options(config: str | None, changes: Mapping[str, Any]) -> TrainOptions:
    """Options from a TOML file and from `changes` (None: not given), which win. Raises ConfigError, naming the field."""
    values: dict[str, Any] = {}
    if config is not None:
        try:
            values = tomllib.loads(Path(config).read_text())
        except FileNotFoundError as error:
            raise InputNotFoundError(f"{config}: not found; check the path of --config") from error
        except OSError as error:
            raise ConfigError(f"{config}: {error.strerror}; give --config a TOML file") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{config} is not TOML: {error}") from error
    for key, value in changes.items():
        if isinstance(value, dict):
            if not isinstance(values.get(key, {}), dict):
                raise ConfigError(f"{config}: {key} must be a table, written [{key}] with one option a line")
            values[key] = {**values.get(key, {}), **{k: v for k, v in value.items() if v is not None}}
        elif value is not None:
            values[key] = value
    for key in values.keys() - TrainOptions.model_fields.keys():
        for table, kind in TABLES.items():
            if key in kind.model_fields:
                raise ConfigError(f"{config}: {key} is an option of the table [{table}]; write it below that line")
    if missing := [name for name in REQUIRED if values.get(name) is None]:
        raise ConfigError(
            f"a training run needs {listed([REQUIRED[name] for name in missing])}: give them on the command line, or as "
            f"{listed(missing)} in the file of --config"
        )
    given = {key: f"--{key.replace('_', '-')}" for key, value in changes.items() if value is not None}
    return _validated(TrainOptions, values, config or "the training options", given)


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _validated(kind: type[T], values: Mapping[str, Any], source: str, given: Mapping[str, str] | None = None) -> T:
    """The values as `kind`. source: of the values, as a ConfigError names it; given: the command line's options by field."""
    given = given or {}
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        elsewhere = any(".".join(map(str, fault["loc"])) not in given for fault in error.errors())
        raise ConfigError(f"{f'{source}: ' if elsewhere else ''}{faults(error, kind.model_fields, given)}") from error


def run(options: TrainOptions, say: Say = to_stderr) -> TrainReport:
    """Trains, or finishes, the run of that name. See the module's errors in `docs/training.md`."""
    storage = Storage(options.storage)
    _check_places(options)
    recipe = _validated(Recipe, {**recipe_of(options.preset).model_dump(), **options.recipe}, "recipe")
    latest = read_latest(storage, options.run_uri)
    done = latest["epoch"] if latest else 0
    epochs = len(options.course) * recipe.epochs
    known = read_record(storage, options.run_uri)
    _check_recorded(options, known, done)
    _check_epochs(options, done, epochs)
    finished = read_result(storage, options.run_uri, epochs) is not None
    data, validation = _read_data(storage, options, _silent if finished else say)
    model = build_model(options, data, storage)
    _check_detector(options, model.config)
    record = _record(storage, options, recipe, model.config, data, validation)
    if known is not None:
        check_record(known, record, options.name)
    if finished:
        say(f"run '{options.name}' is complete: {counted(epochs, 'epoch')}. Its results are in {options.run_uri}.")
        return _report(storage, options, done)
    spec = _sample_spec(model.config, options)
    proposals = None if options.proposals is None else read_proposals(storage, options.proposals)
    rows = training_rows(data, image_folder(options.images, options.train), spec, options.keep_empty, proposals)
    capacity = connect(options.address)
    gpu = plan_workers(options, capacity)
    # Only now does the run's name belong to this data, model and options: what was refused leaves nothing behind.
    storage.write_bytes(Storage.join(options.run_uri, RUN_RECORD), json.dumps(record, indent=1).encode())
    # A result is its model and its numbers: while there is to be another model, no numbers say that there is a result.
    storage.delete(Storage.join(options.run_uri, METRICS))
    _set_up_ray_train(capacity)
    if done:
        say(f"run '{options.name}' goes on after epoch {done} of {epochs}")
    plan = _Plan(options, recipe, spec, rows, model, validation, gpu, capacity.embedded, done, data)
    _fit(plan, storage, say)
    return _report(storage, options, done)


def _check_places(options: TrainOptions) -> None:
    """Raises ConfigError for a folder that storage clients name differently, or an input in it, whose files a run replaces."""
    at = parse(options.run_uri)
    if not at.is_local and not is_plain(at.key):
        raise ConfigError(
            f"--output {options.output!r}: no run can be at a key with `//`, `/./`, `/../` or a control character; give another"
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
    """Says nothing of a run that is complete."""


# -- what is trained ---------------------------------------------------------------------------------------------------


def _read_data(storage: Storage, options: TrainOptions, say: Say) -> tuple[CocoDataset, Validation | None]:
    """Checked training and validation data, each announced in a line."""
    data = _read_images(storage, options, options.train, image_folder(options.images, options.train), say, "training")
    if options.val is None:
        return data, None
    folder = image_folder(options.val_images, options.val)
    truth = _read_images(storage, options, options.val, folder, say, "scoring")
    if unknown := {c.id: c.name for c in truth.categories}.items() - {c.id: c.name for c in data.categories}.items():
        raise ConfigError(f"{options.val} has categories that {options.train} has not: {sorted(unknown)}.")
    return data, Validation(truth, folder, options.max_dets, options.most_unusable)


def _read_images(storage: Storage, options: TrainOptions, uri: str, folder: str, say: Say, purpose: str) -> CocoDataset:
    """A checked COCO file without the images that cannot be used, announced in a line."""
    whole = read_coco(storage, uri)
    check_dropped(whole, options.max_unusable)
    if not whole.images:
        raise EmptyInputError(f"{uri} lists no image.")
    data = usable_images(storage, whole, folder, options.most_unusable)
    say(f"{purpose} on {describe_data(data)}")
    return data


def describe_data(data: CocoDataset) -> str:
    """One line: how much there is, which instances lack a task's truth, and what was left out."""
    lacking = "".join(
        "; " + counted(count, f"instance {what}: it counts in all else", f"instances {what}: they count in all else")
        for what, count in data.incomplete().items()
    )
    left_out = lacking + "".join(f"; left out: {counted_reason(count, reason)}" for reason, count in data.dropped.items())
    return (
        f"{counted(len(data.images), 'image')} with {counted(data.instance_count(), 'instance')} of "
        f"{counted(len(data.categories), 'category')} ({data.source}){left_out}"
    )


def build_model(options: TrainOptions, data: CocoDataset, storage: Storage) -> MaskRCNN:
    """The model before its first step, with the data's categories. Raises ConfigError where preset and data do not fit."""
    torch.manual_seed(options.seed)
    tasks = _tasks(options, data)
    changes = {**options.model, "mask": "mask" in tasks, "keypoint": "keypoint" in tasks}
    rpn_backbone = changes.pop("rpn_backbone", None)
    model = _model_with(options, data, storage, changes)
    if rpn_backbone is None:
        return model
    return with_rpn_backbone(model, _changed(model.config, {"rpn_backbone": rpn_backbone}).rpn_backbone)


def _model_with(options: TrainOptions, data: CocoDataset, storage: Storage, changes: Mapping[str, Any]) -> MaskRCNN:
    """The preset's model, or the weights', with fields of its configuration changed."""

    def as_preset() -> ModelConfig:
        return _changed(preset_config(options.preset), {**changes, "categories": data.categories})

    if options.weights is None:
        config = as_preset()
        if config.backbone.norm == "frozen":
            raise ConfigError(
                f"'{options.preset}' has frozen norm layers and cannot be trained from random weights: give --weights of a "
                "detector, or of a classifier for its backbone (such as ResNet50_Weights.IMAGENET1K_V1, with "
                '--reset-predictors), or set backbone = {norm = "group"} under [model] and start from random ones.'
            )
        return create_model(config)
    weights: str | bytes = options.weights
    if storage.exists(options.weights) or "/" in options.weights:
        weights = storage.read_bytes(options.weights)
    if holds_classifier(weights, options.weights):
        config = as_preset()
        _check_detector(options.model_copy(update={"weights": None}), config)  # the RPN is as untrained as without weights
        return create_model(config, weights, reset_predictors=options.reset_predictors, weights_name=options.weights)
    base = create_model(
        options.preset,
        weights=weights,
        categories=data.categories,
        reset_predictors=options.reset_predictors,
        weights_name=options.weights,
    )
    config = _changed(base.config, changes)
    return base if config == base.config else create_model(config, weights=dumps(base), reset_predictors=True)


def _tasks(options: TrainOptions, data: CocoDataset) -> frozenset[Task]:
    """What is learnt: what was asked for, else what the preset has branches for and the data answers."""
    preset = preset_config(options.preset)
    present: dict[Task, bool] = {"box": True, "mask": data.has_masks, "keypoint": data.has_keypoints}
    if options.tasks is None:
        wanted: dict[Task, bool] = {"box": True, "mask": preset.mask, "keypoint": preset.keypoint}
        return frozenset(task for task in present if present[task] and wanted[task])
    if lacking := sorted(task for task in options.tasks if not present[task]):
        raise ConfigError(f"{data.source} has nothing to learn {', '.join(lacking)} from; leave it out of --tasks.")
    return options.tasks


def _changed(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """The configuration with fields replaced; a table, such as the backbone's, changes single fields of its own."""
    values = config.model_dump()
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, Mapping) and isinstance(values.get(key), dict) else value
    return _validated(ModelConfig, values, "model")


def _check_detector(options: TrainOptions, config: ModelConfig) -> None:
    """Raises ConfigError where a detector would learn alone, but on proposals of an RPN that is untrained or out of step."""
    if options.learn != "detector" or options.proposals is not None:
        return
    if options.weights is None or config.rpn_backbone == "shared":
        raise ConfigError(
            'learn = "detector" needs proposals: give --proposals (a file of `masklake propose`), or --weights of a model '
            "whose trained RPN has a backbone of its own; --learn separate trains both, one after the other."
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
    """Raises ConfigError where a run has epochs and no record: nobody knows of what."""
    if done and known is None:
        raise ConfigError(
            f"the run '{options.name}' in {options.output} has done {counted(done, 'epoch')} and has no {RUN_RECORD}, which "
            "says what it was started with; restore that file, remove the run's folder, or give another --name"
        )


def _check_epochs(options: TrainOptions, done: int, epochs: int) -> None:
    """Raises ConfigError where a run is to end before where it is."""
    if done > epochs:
        raise ConfigError(
            f"the run '{options.name}' in {options.output} has done {counted(done, 'epoch')}, more than the {epochs} that it "
            "is to have now: give as many --epochs as before, or more, or another --name"
        )


def _record(
    storage: Storage,
    options: TrainOptions,
    recipe: Recipe,
    config: ModelConfig,
    data: CocoDataset,
    validation: Validation | None,
) -> dict[str, Any]:
    """What this start would have the run be."""
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


# -- on what it is trained ---------------------------------------------------------------------------------------------


def plan_workers(options: TrainOptions, capacity: Capacity) -> bool:
    """Whether the workers get a GPU each. Raises ClusterTooSmallError when they would wait for resources for ever.

    A worker takes one CPU. Loading needs one more; an embedded cluster has it beside the machine's cores.
    """
    gpu = options.device == "cuda" or (options.device == "auto" and capacity.gpus >= options.workers)
    need = counted(options.workers, "worker needs", "workers need")
    if gpu and capacity.gpus < options.workers:
        raise ClusterTooSmallError(
            f"{need} {counted(options.workers, 'GPU')}, the cluster has {capacity.gpus:g}. "
            f"Give {'fewer --workers, or ' if options.workers > 1 else ''}--device cpu."
        )
    free = capacity.spare_cpus if capacity.embedded else int(capacity.cpus) - 1
    if free < options.workers:
        raise ClusterTooSmallError(
            f"{need} a CPU{' each' if options.workers > 1 else ''} and loading needs one: the cluster has {capacity.cpus:g} "
            f"{agreeing(int(capacity.cpus), 'CPU')} in all, {max(free, 0)} of them for workers. "
            f"{f'Give --workers {free}, or' if free > 0 else 'Give'} a larger cluster (--address)."
        )
    return gpu


def _set_up_ray_train(capacity: Capacity) -> None:
    """Ray Train reads these when it starts; what the environment says already stays."""
    # How often it looks at its workers; its own 2 s would be felt at the end of every short run.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if capacity.embedded:  # nobody takes this machine away with a notice: one process less to start
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


@dataclass(frozen=True)
class _Plan:
    """A run that passed every check."""

    options: TrainOptions
    recipe: Recipe
    spec: SampleSpec
    rows: pa.Table
    model: MaskRCNN
    validation: Validation | None
    gpu: bool
    embedded: bool
    done: int
    data: CocoDataset

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps of all workers; the images beyond the last one come first in some other epoch."""
        return max(1, self.rows.num_rows // (self.recipe.batch_size * self.options.workers))

    def run(self, storage: Storage) -> TrainingRun:
        """Returns what every worker has to know of it."""
        return TrainingRun(
            uri=self.options.run_uri,
            phases=self.options.course,
            steps_per_epoch=self.steps_per_epoch,
            recipe=self.recipe,
            spec=self.spec,
            storage=storage,
            evaluate_every=self.options.evaluate_every,
            keep_best=self.options.keep == "best",
            images=Images.of(self.data, self.options.most_unusable),
        )


def _fit(plan: _Plan, storage: Storage, say: Say) -> None:
    """Runs Ray Train to the end. Raises the workers' own error, or TrainingError."""
    options = plan.options
    say(_describe_start(plan))
    board = start_board()
    job = TrainingJob(
        run=plan.run(storage),
        initial=ray.put(dumps(plan.model)),
        validation=None if plan.validation is None else ray.put(plan.validation),
        board=board,
        threads=options.threads or (max(1, cores() // options.workers) if plan.embedded else None),
    )
    trainer = _trainer(plan, job, ray.put(Loader(plan.rows, plan.spec, storage, options.most_unusable > 0)))
    start = time.monotonic()
    error: BaseException | None = None
    with Listener(board, say) as listener:
        try:
            # The first line says that the workers are up, the second that images came, for which loading needs its CPU.
            with said_while_waiting(_needs(plan), lambda: listener.heard > 1, say), interruptible():
                trainer.fit()
        except ray.train.TrainingFailedError as failure:
            error = failure
    _judge(failure_on(board), error, storage, plan)
    say(f"trained in {time.monotonic() - start:.0f} s")


def _describe_start(plan: _Plan) -> str:
    """How long and on what the run trains, in a line."""
    workers, device = plan.options.workers, "GPU" if plan.gpu else "CPU"
    epochs = _describe_epochs(plan.options.course, plan.recipe)
    return (
        f"training '{plan.options.preset}' for {epochs} of {counted(plan.steps_per_epoch, 'step')}, "
        f"{counted(plan.recipe.batch_size * workers, 'image')} a step on {counted(workers, f'{device} worker')}; "
        f"{agreeing(workers, 'the worker starts', 'the workers start')}"
    )


def _needs(plan: _Plan) -> str:
    """What the run asks of the cluster, as a clause for people."""
    gpu = " and a GPU" if plan.gpu else ""
    each = " each" if plan.options.workers > 1 else ""
    return f"{counted(plan.options.workers, 'worker needs', 'workers need')} 1 CPU{gpu}{each}, loading 1 CPU more"


def _describe_epochs(course: tuple[Phase, ...], recipe: Recipe) -> str:
    if len(course) == 1:
        return counted(recipe.epochs, "epoch")
    phases = f"{len(course)} phases ({', '.join(phase.learn for phase in course)})"
    return f"{phases} of {counted(recipe.epochs, 'epoch')} each, an epoch"


def _trainer(plan: _Plan, job: TrainingJob, loader: ray.ObjectRef[Loader]) -> TorchTrainer:
    options = plan.options
    run = job.run
    filesystem, path = run.storage.arrow(options.output)
    # The controller unpickles all of this: what would make it import the model waits in the object store.
    storage, run_uri = run.storage, run.uri
    stream = SampleStream(
        loader=loader,
        rows=plan.rows.num_rows,
        epoch_samples=run.steps_per_epoch * run.recipe.batch_size * options.workers,
        first_epoch=0,
        epochs=run.epochs,
        seed=options.seed,
        loader_cpus=1.0,
    )

    def remaining() -> ray.data.Dataset:
        """Called before each start of the workers: the epochs that are left then."""
        latest = read_latest(storage, run_uri)
        return replace(stream, first_epoch=latest["epoch"] if latest else 0).dataset()

    return TorchTrainer(
        train,
        train_loop_config={"job": ray.put(job)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=options.workers, use_gpu=plan.gpu, resources_per_worker={"CPU": 1} | ({"GPU": 1} if plan.gpu else {})
        ),
        run_config=ray.train.RunConfig(
            name=options.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=options.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
        datasets={"train": remaining},
        dataset_config=ray.train.DataConfig(execution_options=ray.data.ExecutionOptions(preserve_order=True)),
    )


def _judge(failure: Exception | None, error: BaseException | None, storage: Storage, plan: _Plan) -> None:
    """Raises what ended the run early, if anything did."""
    if failure is not None:
        raise failure
    if error is not None:
        raise user_error(error) or TrainingError(
            f"training stopped: {_failed(plan.options)}: {last_line(error)}. {_saved(storage, plan.options.run_uri)}"
        ) from error
    if read_result(storage, plan.options.run_uri, len(plan.options.course) * plan.recipe.epochs) is None:
        raise TrainingError(f"training was interrupted. {_saved(storage, plan.options.run_uri)}")


def _failed(options: TrainOptions) -> str:
    """How often the workers ended before the run gave up, as a clause that their last error follows."""
    who = agreeing(options.workers, "the worker", "the workers")
    return f"{who} failed" + (f" {options.max_failures + 1} times, the last time with" if options.max_failures else "")


def _saved(storage: Storage, run_uri: str) -> str:
    """What an interrupted run has to go on from."""
    latest = read_latest(storage, run_uri)
    if latest is None:
        return "No epoch was complete; the same command starts again."
    folder = Storage.join(run_uri, latest["checkpoint"])
    return f"Epoch {latest['epoch']} is saved in {folder}; the same command goes on from there."


# -- what came of it ---------------------------------------------------------------------------------------------------


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
    """The report for people: what the run reached, and where everything lies."""
    lines = [
        f"run '{report.name}': {report.model_id} after {counted(report.epochs, 'epoch')} "
        f"({report.device}, {report.seconds:.0f} s of training)"
    ]
    for kind, score in report.scores.items():
        ap, ap50 = ("-" if value is None else f"{100 * value:.1f}" for value in (score["ap"], score["ap50"]))
        lines.append(f"  {KIND_NAMES[kind]:9} AP {ap}, AP50 {ap50}")
    lines += [f"  {name} {'-' if value is None else f'{100 * value:.1f}'}" for name, value in report.recall.items()]
    lines += [f"  checkpoint  {report.checkpoint}", f"  metrics     {report.metrics}", f"  curves      {report.curves}"]
    return "\n".join(lines)
