"""Runs a checked training run on Ray Train, and reports what it waits for and why it ended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import pyarrow as pa
import ray
import ray.train
from ray.train.torch import TorchTrainer

from masklake.jobs.cluster.connection import Capacity, cores, interruptible, last_line, quiet_data
from masklake.jobs.cluster.waiting import said_while_waiting
from masklake.jobs.training.messages import Listener, reported_failure, start_messages
from masklake.jobs.training.options import TrainOptions
from masklake.jobs.training.restarts import Restarts
from masklake.jobs.training.worker import TrainingJob, train, user_error
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.phases import Phase
from masklake.model.weights.checkpoint import dumps
from masklake.model.wording import agreeing, counted
from masklake.pipeline.coco.dataset import CocoDataset
from masklake.pipeline.errors import ClusterTooSmallError, TrainingError
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.training.augmentation import SampleSpec
from masklake.pipeline.training.loader import Loader
from masklake.pipeline.training.recipe import Recipe
from masklake.pipeline.training.run import Images, TrainingRun
from masklake.pipeline.training.run_folder import read_latest, read_result
from masklake.pipeline.training.stream import SampleStream
from masklake.pipeline.training.validation import Validation

Say = Callable[[str], None]


def workers_get_gpus(options: TrainOptions, capacity: Capacity) -> bool:
    """Returns whether each worker gets a GPU. Raises ClusterTooSmallError if the workers would wait for resources forever.

    A worker takes one CPU. Loading needs one more; an embedded cluster provides it in addition to the machine's cores.
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


def set_up_ray_train(capacity: Capacity) -> None:
    """Keeps Ray Data quiet and sets the environment variables that Ray Train reads at its start; existing values are kept."""
    quiet_data()
    # Interval between checks of the workers; the default of 2 s would lengthen every short run.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if capacity.embedded:  # nobody takes this machine away with a notice: one process less to start
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


@dataclass(frozen=True)
class TrainingPlan:
    """A training run that passed every check. gpu: whether each worker gets a GPU. embedded: whether Ray runs in this process.
    done: number of epochs that earlier starts completed.
    """

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
        """Number of whole steps of all workers; images beyond the last step come first in another epoch."""
        return max(1, self.rows.num_rows // (self.recipe.batch_size * self.options.workers))

    def run(self, storage: Storage) -> TrainingRun:
        """Returns the settings that every worker needs."""
        return TrainingRun(
            uri=self.options.run_uri,
            phases=self.options.phases,
            steps_per_epoch=self.steps_per_epoch,
            recipe=self.recipe,
            spec=self.spec,
            storage=storage,
            evaluate_every=self.options.evaluate_every,
            keep_best=self.options.keep == "best",
            images=Images.of(self.data, self.options.most_unusable),
        )


def fit(plan: TrainingPlan, storage: Storage, say: Say) -> None:
    """Runs Ray Train to the end. Raises the workers' own error, or TrainingError."""
    options = plan.options
    say(_describe_start(plan))
    messages = start_messages()
    job = TrainingJob(
        run=plan.run(storage),
        initial=ray.put(dumps(plan.model)),
        validation=None if plan.validation is None else ray.put(plan.validation),
        messages=messages,
        threads=options.threads or (max(1, cores() // options.workers) if plan.embedded else None),
    )
    trainer = _trainer(plan, job, ray.put(Loader(plan.rows, plan.spec, storage, options.most_unusable > 0)))
    start = time.monotonic()
    error: BaseException | None = None
    with Listener(messages, say) as listener:
        try:
            # The first line says that the workers are up, the second that images came, for which loading needs its CPU.
            with said_while_waiting(_needs(plan), lambda: listener.heard > 1, say), interruptible():
                trainer.fit()
        except ray.train.TrainingFailedError as failure:
            error = failure
    _raise_failure(reported_failure(messages), error, storage, plan)
    say(f"trained in {time.monotonic() - start:.0f} s, start-up and evaluation included")


def _describe_start(plan: TrainingPlan) -> str:
    """Returns a line on the length and the resources of the run."""
    workers, device = plan.options.workers, "GPU" if plan.gpu else "CPU"
    epochs = _describe_epochs(plan.options.phases, plan.recipe)
    return (
        f"training '{plan.options.preset}' for {epochs} of {counted(plan.steps_per_epoch, 'step')}, "
        f"{counted(plan.recipe.batch_size * workers, 'image')} per step on {counted(workers, f'{device} worker')}; "
        f"{agreeing(workers, 'the worker starts', 'the workers start')}"
    )


def _needs(plan: TrainingPlan) -> str:
    """Returns what the run needs from the cluster, as a clause."""
    gpu = " and a GPU" if plan.gpu else ""
    each = " each" if plan.options.workers > 1 else ""
    return f"{counted(plan.options.workers, 'worker needs', 'workers need')} 1 CPU{gpu}{each}, loading 1 CPU more"


def _describe_epochs(phases: tuple[Phase, ...], recipe: Recipe) -> str:
    if len(phases) == 1:
        return counted(recipe.epochs, "epoch")
    described = f"{len(phases)} phases ({', '.join(phase.trains for phase in phases)})"
    return f"{described} of {counted(recipe.epochs, 'epoch')} each, an epoch"


def _trainer(plan: TrainingPlan, job: TrainingJob, loader: ray.ObjectRef[Loader]) -> TorchTrainer:
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
        """Returns the remaining epochs; Ray Train calls it before each start of the workers."""
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
            callbacks=[Restarts(job.messages, options.max_failures)],  # type: ignore[list-item]  # typed as version 1 had it
            failure_config=ray.train.FailureConfig(max_failures=options.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
        datasets={"train": remaining},
        dataset_config=ray.train.DataConfig(execution_options=ray.data.ExecutionOptions(preserve_order=True)),
    )


def _raise_failure(failure: Exception | None, error: BaseException | None, storage: Storage, plan: TrainingPlan) -> None:
    """Raises the error that ended the run early, if any."""
    if failure is not None:
        raise failure
    if error is not None:
        raise user_error(error) or TrainingError(
            f"training stopped: {_failed(plan.options)}: {last_line(error)}. {_saved(storage, plan.options.run_uri)}"
        ) from error
    if read_result(storage, plan.options.run_uri, len(plan.options.phases) * plan.recipe.epochs) is None:
        raise TrainingError(f"training was interrupted. {_saved(storage, plan.options.run_uri)}")


def _failed(options: TrainOptions) -> str:
    """Returns a clause that says how often the workers failed; their last error follows it."""
    who = agreeing(options.workers, "the worker", "the workers")
    return f"{who} failed" + (f" {options.max_failures + 1} times, the last time with" if options.max_failures else "")


def _saved(storage: Storage, run_uri: str) -> str:
    """Returns a sentence that says from where the same command continues."""
    latest = read_latest(storage, run_uri)
    if latest is None:
        return "No epoch was completed; the same command starts again."
    folder = Storage.join(run_uri, latest["checkpoint"])
    return f"Epoch {latest['epoch']} is saved in {folder}; the same command continues from there."
