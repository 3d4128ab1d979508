"""The Ray Train side of a worker: sets up the training loop (`pipeline.training.loop`) and passes errors to the driver."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from masklake.jobs.training.messages import report_failure, reported_failure
from masklake.model.errors import MaskLakeError
from masklake.model.mask_rcnn import MaskRCNN
from masklake.pipeline.errors import TrainingError
from masklake.pipeline.training.loop import train_run
from masklake.pipeline.training.run import TrainingRun, Worker
from masklake.pipeline.training.validation import Validation


@dataclass(frozen=True)
class TrainingJob:
    """A run as Ray sends it to its workers.

    initial: checkpoint bytes of the model before its first step, in the object store. messages: handle of the `Messages` actor.
    threads: torch's threads on the CPU; None keeps Ray's choice, as many as the worker has CPUs.
    """

    run: TrainingRun
    initial: ray.ObjectRef[bytes]
    validation: ray.ObjectRef[Validation] | None
    messages: Any
    threads: int | None


def train(config: Mapping[str, Any]) -> None:
    """Trains; Ray Train calls it on each worker. `config["job"]` is a reference to a TrainingJob.

    An error that a user can fix is reported to `Messages`, where the driver finds it. Workers that Ray restarts see it and
    return at once, because another attempt would end the same way.
    """
    job: TrainingJob = ray.get(config["job"])
    if reported_failure(job.messages) is not None:
        return
    try:
        _train(job)
    except TrainingError as error:  # raised by all workers at the same step: none waits for another, none needs a restart
        if not report_failure(job.messages, error):
            raise
    except Exception as error:
        if (cause := user_error(error)) is not None:
            report_failure(job.messages, cause)
        raise


def user_error(error: BaseException | None) -> MaskLakeError | None:
    """Returns the MaskLakeError inside a Ray exception, without Ray's traceback, or None."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        inner = getattr(error, "cause", None)
        if isinstance(error, MaskLakeError) and not isinstance(error, ray.exceptions.RayTaskError):
            return error
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return None


def _train(job: TrainingJob) -> None:
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    batches = _begun(_batches(job.run))  # the processes that load start while this one reads its model
    train_run(job.run, worker_of(job), batches, lambda: ray.get(job.initial), lambda: _validation(job))


def worker_of(job: TrainingJob) -> Worker:
    """Returns this process as Ray Train set it up."""
    context = ray.train.get_context()
    return Worker(
        rank=context.get_world_rank(),
        count=context.get_world_size(),
        device=ray.train.torch.get_device(),
        replica=replica_of,
        report=_report,
        show=job.messages.say.remote,
    )


def _validation(job: TrainingJob) -> Validation | None:
    return None if job.validation is None else ray.get(job.validation)


def _report(metrics: dict[str, Any], folder: Path | None = None, name: str | None = None) -> None:
    if folder is None:
        ray.train.report(metrics)
    else:
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder), checkpoint_dir_name=name)


def replica_of(model: MaskRCNN) -> torch.nn.Module:
    """Wraps the model so that the gradients of several workers are averaged; returns it unchanged for a single worker.

    The wrapper shares the model's weights; checkpoints and evaluation never see it. Images and targets stay on the host: with
    `device_ids` the wrapper would send them to the GPU one by one and wait for each.
    """
    options = {"broadcast_buffers": False, "device_ids": None, "output_device": None}
    return ray.train.torch.prepare_model(model, parallel_strategy_kwargs=options)


def _batches(run: TrainingRun) -> Iterator[Any]:
    shard = ray.train.get_dataset_shard("train")
    return iter(
        shard.iter_batches(batch_size=run.recipe.batch_size, batch_format="pyarrow", prefetch_batches=2, drop_last=True)
    )


def _begun(batches: Iterator[Any]) -> Iterator[Any]:
    """Returns the same batches, but requests the first one at once, in a thread."""
    thread = ThreadPoolExecutor(1)
    first = thread.submit(next, batches, None)
    thread.shutdown(wait=False)

    def all_of_them() -> Iterator[Any]:
        batch = first.result()
        while batch is not None:
            yield batch
            batch = next(batches, None)

    return all_of_them()
