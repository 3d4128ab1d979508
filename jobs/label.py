"""`masklake label`: plans a run, streams images through the model, completes lost images, commits, reports (design 3.3).

The same call continues where an earlier one stopped, however it stopped. `jobs.labelling.plan` makes its decisions,
`pipeline.labelling.labeller` is the workers' part, and `pipeline.labelling.run_output` knows which of the written files count.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from masklake.jobs.cluster.blocks import data_set
from masklake.jobs.cluster.connection import connect_ray, data_context, last_line, own_capacity
from masklake.jobs.cluster.waiting import has_place, said_while_waiting
from masklake.jobs.fields import LabelFields
from masklake.jobs.labelling import plan as label_plan
from masklake.jobs.labelling.lost_images import DEATHS, Alone
from masklake.jobs.labelling.plan import Round, WorkerPlan, is_short
from masklake.jobs.labelling.progress import own_progress_bar, progress_bar, start_counter
from masklake.jobs.labelling.standby import Standby, Task
from masklake.jobs.terminal.counts import counted_instances
from masklake.jobs.weights import read_detector
from masklake.model.config import PredictOptions
from masklake.model.errors import ConfigError, MaskLakeError, faults
from masklake.model.wording import counted
from masklake.pipeline.errors import LabellingError, LeaseHeldError
from masklake.pipeline.images.decode import DecodeLimits
from masklake.pipeline.images.status import Status
from masklake.pipeline.inputs.listing import InputSpec
from masklake.pipeline.labelling import run_output
from masklake.pipeline.labelling.labeller import LabellingActor, LabelSpec
from masklake.pipeline.labelling.lease import Lease
from masklake.pipeline.labelling.manifest import Plan, plan_run
from masklake.pipeline.labelling.run_output import Finished, Summary
from masklake.pipeline.labelling.start_clock import StartClock
from masklake.pipeline.storage.left_out import LeftOut
from masklake.pipeline.storage.options import StorageOptions
from masklake.pipeline.storage.retry import patiently
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.fields import LIKELY_SCORE
from masklake.pipeline.table.rows import Outcome, outcome_rows
from masklake.pipeline.table.runs import Start, this_user, valid_run_id
from masklake.pipeline.table.table import Table, open_table

log = logging.getLogger(__name__)

Say = Callable[[str], None]

WAIT_S = 5.0
"""Seconds between two attempts to take a lease that another driver holds."""


class LabelOptions(BaseModel, LabelFields, frozen=True):
    """One labelling run, complete."""

    model_config = ConfigDict(extra="forbid")

    input: InputSpec
    storage: StorageOptions = StorageOptions()
    predict: PredictOptions = PredictOptions(**vars(LabelFields.predict))
    limits: DecodeLimits = DecodeLimits()

    @field_validator("tick")
    @classmethod
    def _check_tick(cls, tick: str | None) -> str | None:
        return tick if tick is None else valid_run_id(tick, "--tick")


class LabelReport(BaseModel):
    """The results of a run. Counts are those of the whole run; labelled_now, seconds and images_per_s those of this start."""

    model_config = ConfigDict(frozen=True)

    table: str
    run_id: str | None = Field(description="None when there was nothing new to label.")
    model_id: str
    label_id: str
    images: int
    resumed: bool
    statuses: dict[str, int] = Field(description="Images by status.")
    instances: int = Field(description="Likely instances: those of score >= 0.5 (`LIKELY_SCORE`).")
    instances_stored: int = Field(description="Instances in the table, of any score: average precision needs them all.")
    categories: dict[str, int] = Field(description="Likely instances by category.")
    categories_stored: dict[str, int] = Field(description="Instances in the table by category.")
    failed_share: float = Field(description="Share of the images that failed, 0 to 1.")
    labelled_now: int = Field(description="Images that this start of the run labelled.")
    seconds: float = Field(description="Duration of labelling, including the start of the workers.")
    images_per_s: float
    skipped: bool = Field(default=False, description="Whether nothing was done because another driver works on the run.")
    earlier: tuple[LabelReport, ...] = Field(default=(), description="Reports of unfinished runs that were finished first.")
    left_out: dict[str, int] = Field(
        default={}, description="Entries of the input that are not images or can never be read, by reason."
    )


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The table, the model and the options of one call of `run`."""

    options: LabelOptions
    table: Table
    model_id: str
    label_id: str
    checkpoint: bytes
    standby: Standby | None


@dataclass(frozen=True, kw_only=True)
class _Run(_Job):
    """A planned run and everything that its steps need."""

    plan: Plan
    lease: Lease


def run(options: LabelOptions, say: Say = log.info, standby: Standby | None = None) -> LabelReport:
    """Labels the images that the table does not hold yet; returns when the run is committed. Calls `say` with a line on each
    step. standby: labels a short run on this machine.

    Raises the errors of `pipeline.errors`. After any of them, and after a kill, the same call continues the run. Images that
    failed are not an error here: see `jobs.labelling.plan.check_failures`.
    """
    job = _job(options, standby)
    earlier: list[LabelReport] = []
    while True:
        try:
            report = _run_next(job, say)
        except LeaseHeldError as error:
            if options.if_running == "fail":
                raise
            say(f"{'skipped' if options.if_running == 'skip' else 'waiting'}: {error}")
            if options.if_running == "skip":
                return _nothing_new(job).model_copy(update={"skipped": True, "earlier": tuple(earlier)})
            _wait_for(job.table, error.run_id)
            continue
        if options.tick is None or report.run_id in (None, options.tick):
            return report.model_copy(update={"earlier": tuple(earlier)})
        say(f"run {report.run_id}, which was unfinished, is committed; tick {options.tick} follows")
        earlier.append(report)
        job = replace(job, standby=None)  # a process that stands by labels one run


def _job(options: LabelOptions, standby: Standby | None) -> _Job:
    storage = Storage(options.storage)
    table = open_table(storage, options.table)
    checkpoint, model = read_detector(storage, options.weights)
    standby = _prepared(standby, options, checkpoint)
    options = with_precision(options)
    label_id = label_plan.label_id(model.model_id, model.settings(options.predict), options.limits)
    return _Job(
        options=options, table=table, model_id=model.model_id, label_id=label_id, checkpoint=checkpoint, standby=standby
    )


def _run_next(job: _Job, say: Say) -> LabelReport:
    """Continues the unfinished run of this input and label_id, or plans a new one, and labels it."""
    options, table = job.options, job.table
    left_out = LeftOut()
    plan = plan_run(
        table.storage,
        table,
        options.input,
        job.label_id,
        tick=options.tick,
        retry_failed=options.retry_failed,
        facts={"model_id": job.model_id, "weights": options.weights},
        left_out=left_out,
        before_freeze=lambda images: _check_can_run(options, table, images, job.standby),
    )
    if line := str(left_out):
        say(line)
    left = {"left_out": left_out.counts()}
    if plan is None:
        say("nothing new: the table holds every image of this input, labelled by this model with these options")
        return _nothing_new(job).model_copy(update=left)
    say(
        f"run {plan.run_id} {'continues' if plan.resumed else 'starts'}: {counted(plan.images, 'image')}, "
        f"model {job.model_id}, precision {options.predict.precision}"
    )
    with Lease.acquire(table.storage, table.uri, plan.run_id, on_wait=say) as lease:
        return _label(_Run(**vars(job), plan=plan, lease=lease), say).model_copy(update=left)


def _wait_for(table: Table, run_id: str) -> None:
    """Returns as soon as nobody holds the lease."""
    while True:
        time.sleep(WAIT_S)
        try:
            Lease.acquire(table.storage, table.uri, run_id).release()
        except LeaseHeldError:
            continue
        return


def _check_can_run(options: LabelOptions, table: Table, images: int, standby: Standby | None) -> None:
    """Raises, before anything is written, the storage's error if the table is not writable, and ClusterTooSmallError if the
    run does not fit into the cluster. Called only if there is something to label, since it starts Ray, except for a short run.
    """
    table.storage.check_writable(table.uri)
    capacity = own_capacity() if standby is not None and is_short(images, options.block_rows) else connect_ray(options.address)
    label_plan.plan_workers(capacity, images, options.workers, options.device)


def _prepared(standby: Standby | None, options: LabelOptions, checkpoint: bytes) -> Standby | None:
    """Lets the process load the model. Returns None, and ends it, if the options ask for Ray."""
    on_a_cluster = options.address or os.environ.get("RAY_ADDRESS")
    if standby is not None and (on_a_cluster or options.workers not in (None, 1)):
        standby.close()
        return None
    if standby is not None:
        standby.load(checkpoint, label_plan.device_of(options.device, own_capacity()))
    return standby


def with_precision(options: LabelOptions) -> LabelOptions:
    """Returns the options with a concrete precision for `auto`; it is part of `label_id`, so it depends on this machine
    alone.
    """
    cluster = options.address or os.environ.get("RAY_ADDRESS")
    here = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = label_plan.precision(options.predict.precision, options.device, cluster is not None, here)
    return options.model_copy(update={"predict": options.predict.model_copy(update={"precision": precision})})


def options(**values: Any) -> LabelOptions:
    """Returns LabelOptions from plain values. Raises ConfigError with one line that names the invalid ones."""
    try:
        return LabelOptions.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"the labelling options: {faults(error)}") from error


def describe(report: LabelReport) -> str:
    """Returns the report as a few lines of text."""
    if report.earlier:
        return "\n\n".join([*map(describe, report.earlier), describe(report.model_copy(update={"earlier": ()}))])
    if report.run_id is None:
        return f"{report.table}: {'skipped' if report.skipped else 'nothing new'}"
    statuses = ", ".join(f"{count:,} {status}" for status, count in report.statuses.items() if count)
    shown = list(report.categories.items())[:10]
    hidden = len(report.categories) - len(shown)
    more = f" and {counted(hidden, 'more category', 'more categories')}" if hidden else ""
    by_category = ", ".join(f"{count:,} {category}" for category, count in shown) + more
    return (
        f"run        {report.run_id}{' (resumed)' if report.resumed else ''}\n"
        f"images     {statuses}\n"
        f"found      {counted_instances(report.instances, report.instances_stored)}\n"
        f"categories {by_category or 'none'} (of score >= {LIKELY_SCORE:g})\n"
        f"speed      {report.images_per_s:.1f} images/s ({report.labelled_now:,} in {report.seconds:.1f} s, "
        "start-up included)\n"
        f"table      {report.table}"
    )


def _label(run: _Run, say: Say) -> LabelReport:
    """Streams, completes, settles, merges, commits and reports, while the lease is held."""
    table, plan = run.table, run.plan
    files = _finished(run, [])
    before = len(run_output.missing(files, plan.images))
    started = time.perf_counter()
    if before and not table.is_committed(plan.run_id):
        files = _stream_and_complete(run, files, say)
    seconds = time.perf_counter() - started
    summary = _commit(run, files)
    return LabelReport(
        table=table.uri,
        run_id=plan.run_id,
        model_id=run.model_id,
        label_id=run.label_id,
        images=plan.images,
        resumed=plan.resumed,
        statuses=summary.statuses,
        instances=sum(summary.likely.values()),
        instances_stored=sum(summary.stored.values()),
        categories=summary.likely,
        categories_stored=summary.stored,
        failed_share=label_plan.failed_share(summary.statuses),
        labelled_now=before,
        seconds=seconds,
        images_per_s=before / seconds,
    )


def _commit(run: _Run, files: list[Finished]) -> Summary:
    """Settles and merges the run's files, writes its summary into its record, and commits it, unless it is committed."""
    table, run_id = run.table, run.plan.run_id
    if table.is_committed(run_id):
        return patiently(lambda: run_output.summarise(table, run_id))
    settled = run_output.settle(table, run_id, files, run.plan.images)
    run.lease.check()
    merged = run_output.merge(table, run_id, settled)
    summary = patiently(lambda: run_output.summarise(table, run_id, merged))
    known = {"statuses": summary.statuses, "categories": summary.likely, "categories_stored": summary.stored}
    patiently(lambda: table.update_record(run_id, **known))
    patiently(lambda: table.commit_run(run_id, merged, run.lease.confirm))
    return summary


def _stream_and_complete(run: _Run, files: list[Finished], say: Say) -> list[Finished]:
    """Labels the images that `files` lack: a few in the process that stands by, others in Ray's workers."""
    plan = run.plan
    missing = run_output.missing(files, plan.images)
    if run.standby is not None and not is_short(len(missing), run.options.block_rows):
        run.standby.close()  # its model takes memory
    elif run.standby is not None:
        files = _by_standby(run, run.standby, files, missing, say)
        missing = run_output.missing(files, plan.images)
        if not len(missing):
            return files
        say(label_plan.lost_line(len(missing), 1))
    capacity = connect_ray(run.options.address)
    workers = label_plan.plan_workers(capacity, len(missing), run.options.workers, run.options.device)
    say(f"{counted(workers.workers, 'model replica')} on {workers.device}, {counted(len(missing), 'image')} left")
    with _noted(run, workers):
        return _label_missing(run, workers, files, missing, say)


def _noted(run: _Run, workers: WorkerPlan) -> StartClock:
    """Returns a context manager that records in the run how long these workers have worked, and who started them."""
    start = Start(
        started_at=datetime.now(UTC),
        by=this_user(),
        workers=workers.workers,
        gpus=workers.workers * workers.gpus_each,
        device=workers.device,
        price_per_hour=run.options.price_per_hour,
    )
    return StartClock(run.table, run.plan.run_id, start, run.lease.check)


def _label_missing(
    run: _Run, workers: WorkerPlan, files: list[Finished], missing: NDArray[np.int64], say: Say
) -> list[Finished]:
    """Labels the missing images in ever smaller blocks. An image that ends its workers even alone is `crashed`."""
    plan = run.plan
    steps = list(label_plan.rounds(len(missing), workers.workers, run.options.block_rows))
    for number, step in enumerate(steps):
        if number:
            say(label_plan.lost_line(len(missing), step.rows))
        written = _stream(run, workers, step, missing, say)
        files = _finished(run, [*files, *written])
        missing = run_output.missing(files, plan.images)
        if not len(missing):
            return files
    if steps:
        say(label_plan.lost_line(len(missing), 1))
    written, crashed = _alone(run, workers, missing, say)
    if crashed:
        one, many = (
            "image kills its worker even on its own: it becomes",
            "images kill their workers even on their own: they become",
        )
        say(f"{counted(len(crashed), one, many)} `crashed`")
        _write_crashed(run, np.array(crashed))
    files = _finished(run, [*files, *written])
    if absent := len(run_output.missing(files, plan.images)):
        neither = counted(absent, "image is", "images are")
        raise LabellingError(f"{neither} neither labelled nor `crashed`; run the same command again to continue")
    return files


def _by_standby(run: _Run, standby: Standby, files: list[Finished], missing: NDArray[np.int64], say: Say) -> list[Finished]:
    """Labels the missing images without Ray; returns all files. Images are still missing if the process ended."""
    workers = label_plan.plan_workers(own_capacity(), len(missing), 1, run.options.device)
    say(f"{counted(1, 'model replica')} on {workers.device}, {counted(len(missing), 'image')} left")
    rows = pa.concat_tables(run_output.manifest_rows(run.table, run.plan.run_id, missing))
    task = Task(_spec(run, workers), run.table, run.plan.run_id, rows)
    bar = own_progress_bar(run.plan.images, run.plan.images - len(missing), run.options.progress)
    with _noted(run, workers), bar as add:
        written = standby.label(task, add)
    return _finished(run, [*files, *(written or ())])


def _finished(run: _Run, known: list[Finished]) -> list[Finished]:
    return patiently(lambda: run_output.finished(run.table, run.plan.run_id, known))


def _write_crashed(run: _Run, image_ids: NDArray[np.int64]) -> None:
    reason = f"the worker process ended {DEATHS} times while it processed this image alone"
    for part in run_output.manifest_rows(run.table, run.plan.run_id, image_ids):
        outcomes = [Outcome(**row, status=Status.CRASHED, error=reason) for row in part.to_pylist()]
        crashed = outcome_rows(outcomes, model_id=run.model_id, label_id=run.label_id, category_names={})
        run_output.write_rows(run.table, run.plan.run_id, crashed)


# -- Ray ---------------------------------------------------------------------------------------------------------------


def _stream(run: _Run, workers: WorkerPlan, step: Round, missing: NDArray[np.int64], say: Say) -> list[Finished]:
    """Runs one pass of Ray Data over the missing images, a part of the manifest at a time; returns the blocks that were
    written.
    """
    import ray

    files: list[Finished] = []
    with (
        _watched(run, workers, len(missing), step.max_lost) as counter,
        said_while_waiting(workers.needs, lambda: has_place(ray.get(counter.workers.remote(), timeout=5)), say),
        ray.data.DataContext.current(_context(step)),
    ):
        for part in run_output.manifest_rows(run.table, run.plan.run_id, missing, label_plan.PART_ROWS):
            reports = _dataset(run, workers, step, part, counter).iter_batches(batch_size=None, batch_format="pyarrow")
            with closing(iter(reports)) as answers:  # after a failure the workers stop at once
                for report in answers:
                    files += run_output.reported(report)
    return files


def _alone(run: _Run, workers: WorkerPlan, missing: NDArray[np.int64], say: Say) -> tuple[list[Finished], list[int]]:
    """Labels each missing image by itself; returns the blocks that were written, and the images that are `crashed`."""
    import ray

    with _watched(run, workers, len(missing), len(missing)) as counter:
        rows = pa.concat_tables(run_output.manifest_rows(run.table, run.plan.run_id, missing))
        arguments = _actor_arguments(run, workers, counter)
        actor = ray.remote(num_cpus=workers.cpus_each, num_gpus=workers.gpus_each, max_restarts=0)(LabellingActor)
        return Alone(lambda: actor.remote(*arguments), rows, workers.workers, say).run()


@contextmanager
def _watched(run: _Run, workers: WorkerPlan, missing: int, max_lost: int) -> Iterator[Any]:
    """Context manager for a counter of the workers' progress. Shows it, and stops the block if `_Watcher` finds a reason."""
    import ray

    counter = start_counter()
    watcher = _Watcher(run.lease, counter, workers.workers, max_lost)
    try:
        with (
            warnings.catch_warnings(),
            progress_bar(counter, run.plan.images, run.plan.images - missing, watcher.look, run.options.progress),
        ):
            warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)  # max_task_retries has no other way in
            yield counter
    except KeyboardInterrupt:
        if watcher.reason is not None:
            raise watcher.reason from None
        raise
    except ray.exceptions.RayError as error:
        raise LabellingError(f"labelling stopped: {last_line(error)}; run the same command again to continue") from error
    finally:
        ray.kill(counter)


def _context(step: Round) -> Any:
    """Returns Ray Data's settings for this round alone: with `max_errored_blocks` below 0 it hangs when a worker dies
    (measured).
    """
    context = data_context()
    context.max_errored_blocks = step.max_lost
    return context


def _dataset(run: _Run, workers: WorkerPlan, step: Round, part: pa.Table, counter: Any) -> Any:
    """Returns the Ray data set: blocks of manifest rows -> labellers, which fetch, label and write -> reports."""
    import ray

    concurrency = 1 if step.alone else workers.concurrency
    return data_set(part, step.sizes(part.num_rows)).map_batches(
        LabellingActor,
        fn_constructor_args=_actor_arguments(run, workers, counter),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=workers.workers,
            max_concurrent_calls_per_actor=concurrency,
            # More would queue behind a slow image while another worker is idle, and die with an image that kills its worker.
            max_tasks_in_flight_per_actor=concurrency,
            enable_true_multi_threading=concurrency > 1,
        ),
        num_cpus=workers.cpus_each,
        num_gpus=workers.gpus_each or None,
        # A node that is cut off is known to be dead some 20 s later: with a limit each block that goes there till then is lost.
        max_task_retries=-1,  # an image that kills its worker ends it by `jobs.labelling.progress.TAKES`
    )


def _actor_arguments(run: _Run, workers: WorkerPlan, counter: Any) -> tuple[Any, ...]:
    import ray

    return _spec(run, workers), [ray.put(run.checkpoint)], counter, run.table, run.plan.run_id


def _spec(run: _Run, workers: WorkerPlan) -> LabelSpec:
    """Returns everything that a worker needs to know of the options."""
    return LabelSpec(
        storage=run.table.storage,
        model_id=run.model_id,
        label_id=run.label_id,
        predict=run.options.predict,
        limits=run.options.limits,
        device=workers.device,
        torch_threads=workers.cpus_each,
        decode_threads=workers.decode_threads,
    )


class _Watcher:
    """Interrupts the driver if it must stop: its lease is lost, or its workers keep ending."""

    def __init__(self, lease: Lease, counter: Any, workers: int, max_lost: int) -> None:
        self.reason: MaskLakeError | None = None
        self._lease = lease
        self._counter = counter
        self._workers = workers
        self._max_lost = max_lost
        self._main = threading.current_thread() is threading.main_thread()

    def look(self) -> None:
        """Called twice a second from the progress thread."""
        if self.reason is not None:
            return
        try:
            self._lease.check()  # a run has one writer
            self._check_workers()
        except MaskLakeError as error:
            self.reason = error
            if self._main:  # elsewhere nothing can be interrupted, and the check before the commit stops the run
                import _thread

                _thread.interrupt_main()

    def _check_workers(self) -> None:
        import ray

        try:
            starts, lost = ray.get([self._counter.starts.remote(), self._counter.lost.remote()], timeout=5)
        except ray.exceptions.RayError:
            return  # the counter's node is gone or busy; only the progress bar and this check depend on it
        if label_plan.cannot_start(starts, self._workers):
            raise LabellingError(
                f"{starts} workers in a row ended while they loaded the model: their machine may lack memory, or the model's "
                "libraries do not work there (Ray's log files say more); nothing is lost, run the same command again"
            )
        if lost > self._max_lost:
            raise LabellingError(
                f"workers died twice with each of {lost:,} blocks, too many to be caused by bad images: their machine may lack "
                "memory (Ray's log files say more); nothing is lost, run the same command again"
            )


def _nothing_new(job: _Job) -> LabelReport:
    return LabelReport(
        table=job.table.uri,
        run_id=None,
        model_id=job.model_id,
        label_id=job.label_id,
        images=0,
        resumed=False,
        statuses={},
        instances=0,
        instances_stored=0,
        categories={},
        categories_stored={},
        failed_share=0.0,
        labelled_now=0,
        seconds=0.0,
        images_per_s=0.0,
    )
