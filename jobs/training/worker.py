"""What each Ray Train worker does: phase by phase epochs of steps, a checkpoint after each, and its share of the evaluation.

The phases of a course (`model.phases`) are one run: an epoch's number says which phase it is of, so that a start at any epoch,
the first or after a kill, goes on in the right one.

A run's folder, `<output>/<name>/`, holds `checkpoint_0001/` and so on (Ray Train uploads them), `latest.json` (the newest one
that is complete: written after it, read by a resume), and at the end `model.safetensors`, `curves.png` and `metrics.json`.

An epoch is saved before it is scored: whatever ends an evaluation, its epoch need not be trained again. The scores then go into
`latest.json`, and with the next epoch's checkpoint into the history there.
"""

from __future__ import annotations

import io
import json
import math
import random
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import Tensor

from masklake.jobs.training.latest import LATEST, read_latest
from masklake.jobs.training.messages import failure_on, report_failure
from masklake.model.config import PredictOptions
from masklake.model.devices import arithmetic
from masklake.model.errors import MaskLakeError
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.phases import Phase, begin
from masklake.model.weights.checkpoint import dumps, load_checkpoint
from masklake.model.wording import counted
from masklake.pipeline.coco.dataset import UNUSABLE_IMAGE, CocoDataset, without_images
from masklake.pipeline.coco.image_check import check_unusable, listed_and_left_out, named, wrong_size
from masklake.pipeline.coco.values import CocoImage
from masklake.pipeline.errors import StorageError, TrainingError
from masklake.pipeline.images.decode import DecodeLimits, decode
from masklake.pipeline.images.fetch import fetch_patiently
from masklake.pipeline.results.evaluation import (
    KIND_NAMES,
    PROPOSAL_COUNTS,
    IouType,
    Score,
    coco_metrics,
    proposal_recall,
    result_rows,
)
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import relative_to
from masklake.pipeline.training.curves import training_curves
from masklake.pipeline.training.recipe import Recipe, build_optimizer, clip, peak_rate, rate_factor, set_rate
from masklake.pipeline.training.samples import SampleSpec, replaced_in, to_training

MODEL, METRICS, CURVES = "model.safetensors", "metrics.json", "curves.png"
OPTIMIZER, STATE = "optimizer.pt", "state.json"

TOTAL = "loss"
"""The sum of all losses, among their names."""

SECONDS_PER_LINE = 5.0
"""About this long between two progress lines of an epoch, and between two looks at whether the loss is still finite."""

COMPARED = ("mask AP", "box AP", f"proposal AR{PROPOSAL_COUNTS[-1]}")
"""Scores by which an epoch is better than another, the first that there is."""

EVALUATION_IMAGES = 16
"""Images fetched together while the ones before are evaluated."""


@dataclass(frozen=True)
class Validation:
    """What a run is scored on: ground truth and the folder of its images."""

    truth: CocoDataset
    folder: str
    max_dets: tuple[int, ...]
    most_unusable: float = 0.0


@dataclass(frozen=True)
class Images:
    """The images of a run's COCO file. left_out: those that were left out before it began; dropped: counts of the images and
    instances that were, by reason; most_unusable: share of the images that may be left out or replaced.
    """

    source: str
    listed: int
    left_out: int
    dropped: Mapping[str, int]
    most_unusable: float

    @staticmethod
    def of(data: CocoDataset, most_unusable: float) -> Images:
        """Of a data set that `usable_images` has looked at."""
        return Images(data.source, *listed_and_left_out(data), dict(data.dropped), most_unusable)

    def check(self, replaced: Collection[str]) -> None:
        """Raises AnnotationError when too many images are unusable; replaced: messages on those that training met."""
        check_unusable(sorted(replaced), self.listed, self.most_unusable, self.source, self.left_out)


@dataclass(frozen=True)
class TrainingJob:
    """All that a worker needs. initial: the untrained (or given) model's checkpoint bytes, in the object store.

    Each phase of the course is a training by the whole recipe, its epochs among it.
    """

    run_uri: str
    course: tuple[Phase, ...]
    steps_per_epoch: int
    recipe: Recipe
    spec: SampleSpec
    storage: Storage
    initial: ray.ObjectRef[bytes]
    validation: ray.ObjectRef[Validation] | None
    evaluate_every: int
    keep_best: bool
    images: Images
    board: Any
    threads: int | None

    @property
    def epochs(self) -> int:
        """Of all phases together."""
        return len(self.course) * self.recipe.epochs

    def phase(self, epoch: int) -> Phase:
        """The phase of the epoch that follows `epoch` done ones; the last one's where none follows."""
        return self.course[min(epoch // self.recipe.epochs, len(self.course) - 1)]


@dataclass
class State:
    """What changes: the epochs that are done, the model, its optimiser, and one row of history an epoch.

    told: messages on replaced images that this start has shown.
    """

    epoch: int
    model: MaskRCNN
    optimizer: torch.optim.Optimizer
    history: list[dict[str, Any]] = field(default_factory=list)
    told: set[str] = field(default_factory=set)


def train(config: Mapping[str, Any]) -> None:
    """The Ray Train loop of one worker; `config["job"]` refers to a TrainingJob.

    An error that a user can mend goes to the board, where the driver finds it; the workers that Ray starts again see it and
    leave at once, as a second attempt would end the same way.
    """
    job: TrainingJob = ray.get(config["job"])
    if failure_on(job.board) is not None:
        return
    try:
        _train(job)
    except TrainingError as error:  # raised by all workers at the same step: none waits for another, none needs a restart
        if not report_failure(job.board, error):
            raise
    except Exception as error:
        if (cause := user_error(error)) is not None:
            report_failure(job.board, cause)
        raise


def user_error(error: BaseException | None) -> MaskLakeError | None:
    """The error of ours behind whatever Ray made of it, without Ray's traceback in its message."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        inner = getattr(error, "cause", None)
        if isinstance(error, MaskLakeError) and not isinstance(error, ray.exceptions.RayTaskError):
            return error
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return None


def _train(job: TrainingJob) -> None:
    context = ray.train.get_context()
    if job.threads is not None:  # elsewhere Ray has set as many as the worker has CPUs
        torch.set_num_threads(job.threads)
    batches = _begun(_batches(job))  # the processes that load start while this one reads its model
    device = ray.train.torch.get_device()
    state = restore(job, device)
    if context.get_world_rank() == 0:
        after = f"going on after epoch {state.epoch}" if state.epoch else "waiting for the first images"
        job.board.say.remote(f"the workers are up, {after}")
    while state.epoch < job.epochs:
        _run_phase(job, state, batches)
        if state.epoch < job.epochs:
            state = _begin(job, state.epoch, load_checkpoint(dumps(state.model), device), state.history)
    if context.get_world_rank() == 0:
        _finish(job, state)


def _begin(job: TrainingJob, epoch: int, model: MaskRCNN, history: list[dict[str, Any]]) -> State:
    """The first state of the phase that comes after `epoch`; what it draws anew is the same on every worker."""
    _seed(job.spec.seed, epoch, 0)
    model = begin(model, job.phase(epoch))
    return State(epoch, model, build_optimizer(model, job.recipe, 0.0), history)


def _run_phase(job: TrainingJob, state: State, batches: Iterator[Any]) -> None:
    """What is left of a phase's epochs."""
    context = ray.train.get_context()
    rank, phase = context.get_world_rank(), job.phase(state.epoch)
    end = (state.epoch // job.recipe.epochs + 1) * job.recipe.epochs
    replica = replica_of(state.model)
    while state.epoch < end:
        _seed(job.spec.seed, state.epoch, rank)
        row = _run_epoch(job, state, replica, batches)
        state.epoch += 1
        state.history.append(row | {"epoch": state.epoch, "learn": phase.learn})
        _save(job, state, rank)
        _score(job, state.model, state.history)


def replica_of(model: MaskRCNN) -> torch.nn.Module:
    """The model as one of several workers' replicas, whose gradients are averaged; where there is one worker, as it is.

    The wrapper shares the model's weights: checkpoints and evaluation never see it. It leaves images and targets where they
    are, on the host: with `device_ids` it would send them to the GPU one by one, each of them waited for.
    """
    options = {"broadcast_buffers": False, "device_ids": None, "output_device": None}
    return ray.train.torch.prepare_model(model, parallel_strategy_kwargs=options)


def _is_due(job: TrainingJob, epoch: int) -> bool:
    return epoch % job.recipe.epochs == 0 or bool(job.evaluate_every and epoch % job.evaluate_every == 0)


def _seed(seed: int, epoch: int, rank: int) -> None:
    """Sampling of anchors and regions: the same again when this epoch runs again, another on each worker."""
    mixed = (seed * 1_000_003 + epoch) * 1_009 + rank
    torch.manual_seed(mixed)
    random.seed(mixed)


# -- one epoch ---------------------------------------------------------------------------------------------------------


def _batches(job: TrainingJob) -> Iterator[Any]:
    shard = ray.train.get_dataset_shard("train")
    return iter(
        shard.iter_batches(batch_size=job.recipe.batch_size, batch_format="pyarrow", prefetch_batches=2, drop_last=True)
    )


def _begun(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches; the first is asked for at once, in a thread."""
    thread = ThreadPoolExecutor(1)
    first = thread.submit(next, batches, None)
    thread.shutdown(wait=False)

    def all_of_them() -> Iterator[Any]:
        batch = first.result()
        while batch is not None:
            yield batch
            batch = next(batches, None)

    return all_of_them()


def _run_epoch(job: TrainingJob, state: State, replica: torch.nn.Module, batches: Iterator[Any]) -> dict[str, Any]:
    """One epoch's steps; returns its history row (mean losses, seconds, images a second)."""
    world = ray.train.get_context().get_world_size()
    first_step = state.epoch % job.recipe.epochs * job.steps_per_epoch  # in its phase
    total_steps = job.recipe.epochs * job.steps_per_epoch
    peak = peak_rate(job.recipe, job.recipe.batch_size * world)
    state.model.train()
    known = {message for row in state.history for message in row.get("replaced", ())}
    replaced: set[str] = set()
    sums, steps, look, rate = _Losses(), 0, 1, 0.0
    batch = next(batches, None)  # before the clock starts: the first of a run waits for the loading tasks to start
    start = said = time.perf_counter()
    while batch is not None and steps < job.steps_per_epoch:
        if unusable := replaced_in(batch):
            replaced.update(unusable)
            job.images.check(known | replaced)
        images, targets = to_training(batch, job.spec)
        rate = peak * rate_factor(job.recipe, first_step + steps, total_steps)
        set_rate(state.optimizer, rate)
        sums.add(_step(replica, images, targets, state.optimizer, job.recipe))
        steps += 1
        batch = next(batches, None) if steps < job.steps_per_epoch else None
        if batch is None or steps == look:
            means = sums.recent()
            _check_finite(means, state.epoch + 1, steps, rate)
            pace = steps / (time.perf_counter() - start)
            look += _agreed(min(steps, round(SECONDS_PER_LINE * pace)))  # at most twice as far: the first may have been fast
            if steps < job.steps_per_epoch and time.perf_counter() - said < SECONDS_PER_LINE / 2:
                continue
            said = time.perf_counter()
            _say_step(job, state.epoch, steps, means, steps * job.recipe.batch_size * world, time.perf_counter() - start)
    if steps < job.steps_per_epoch:
        raise TrainingError(
            f"the images of epoch {state.epoch + 1} ended after {steps} of {counted(job.steps_per_epoch, 'step')}."
        )
    seconds = time.perf_counter() - start
    images_per_s = steps * job.recipe.batch_size * world / max(seconds, 1e-9)
    row = {"losses": sums.means(), "learning_rate": rate, "seconds": seconds, "images_per_s": images_per_s}
    return row | _replaced(job, state, known, replaced)


def _replaced(job: TrainingJob, state: State, known: set[str], met: set[str]) -> dict[str, Any]:
    """The history's entry on the images that had to be replaced, and a line on those that this start has not shown yet.

    known: messages that the history holds; met: those of this worker's epoch. Every worker must call it at the same step.
    """
    replaced = _of_all(met)
    job.images.check(known | replaced)
    if (fresh := replaced - state.told) and ray.train.get_context().get_world_rank() == 0:
        unused = counted(len(fresh), "image could not be used and was replaced", "images could not be used and were replaced")
        job.board.say.remote(f"{unused}: {named(sorted(fresh))}")
    state.told |= replaced
    first_met = replaced - known  # once in a run's history: they are replaced in every epoch
    return {"replaced": sorted(first_met)} if first_met else {}


def _of_all(messages: set[str]) -> set[str]:
    """The workers' messages together. Every worker must call it at the same step."""
    if not torch.distributed.is_initialized():
        return messages
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, messages)
    return set().union(*shares)


def _step(
    replica: torch.nn.Module, images: Sequence[Tensor], targets: Sequence[Any], optimizer: torch.optim.Optimizer, recipe: Recipe
) -> dict[str, Tensor]:
    """Forward, backward, one update; returns the losses, with their sum."""
    with arithmetic("fp32", next(replica.parameters()).device):  # of the way back, too
        losses: dict[str, Tensor] = replica(images, targets)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        clip(replica.parameters(), recipe)
        optimizer.step()
    return {TOTAL: total.detach(), **{name: loss.detach() for name, loss in losses.items()}}


class _Losses:
    """Sums of losses on the device; asking for means is what waits for it, and for the other workers."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._recent: Tensor | None = None
        self._recent_steps = 0
        self._all: Tensor | None = None
        self._steps = 0

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """One step's losses of this worker."""
        self._names = list(losses)
        values = torch.stack([loss.float() for loss in losses.values()])
        self._recent = values if self._recent is None else self._recent + values
        self._all = values if self._all is None else self._all + values
        self._recent_steps += 1
        self._steps += 1

    def recent(self) -> dict[str, float]:
        """Means over the steps since the last call and over all workers. Every worker must call it at the same step."""
        means = self._means(self._recent, self._recent_steps)
        self._recent, self._recent_steps = None, 0
        return means

    def means(self) -> dict[str, float]:
        """Means over all steps and all workers. Every worker must call it at the same step."""
        return self._means(self._all, self._steps)

    def _means(self, sums: Tensor | None, steps: int) -> dict[str, float]:
        if sums is None:
            return {}
        values = sums / steps
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
            values /= torch.distributed.get_world_size()
        return dict(zip(self._names, values.tolist(), strict=True))


def _agreed(steps: int) -> int:
    """The first worker's number, at least 1, for all: their clocks differ, and they must look at the same step."""
    if not torch.distributed.is_initialized():
        return max(1, steps)
    number = torch.tensor(max(1, steps), device=ray.train.torch.get_device())
    torch.distributed.broadcast(number, src=0)
    return int(number)


def _check_finite(losses: Mapping[str, float], epoch: int, step: int, rate: float) -> None:
    """Raises TrainingError, on every worker alike, when the loss is no longer a number."""
    if all(math.isfinite(loss) for loss in losses.values()):
        return
    wrong = ", ".join(name for name, loss in losses.items() if not math.isfinite(loss))
    raise TrainingError(
        f"training diverged in epoch {epoch} by step {step}: {wrong} is not finite at learning rate {rate:.3g}. "
        "Lower --learning-rate, lengthen the warm-up, or set recipe.clip_norm."
    )


def _say_step(job: TrainingJob, epoch: int, step: int, losses: Mapping[str, float], images: int, seconds: float) -> None:
    if ray.train.get_context().get_world_rank() != 0 or not losses:
        return
    parts = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items() if name != TOTAL)
    left = (job.epochs * job.steps_per_epoch - epoch * job.steps_per_epoch - step) * seconds / step
    phase = f" ({job.phase(epoch).learn})" if len(job.course) > 1 else ""
    line = f"epoch {epoch + 1}/{job.epochs}{phase}, step {step}/{job.steps_per_epoch}: loss {losses[TOTAL]:.3f} ({parts})"
    job.board.say.remote(f"{line}; {images / seconds:.1f} images/s, about {_duration(left)} left")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


# -- evaluation --------------------------------------------------------------------------------------------------------


def _score(job: TrainingJob, model: MaskRCNN, history: list[dict[str, Any]]) -> None:
    """Scores the model of the last epoch in `history`, which is saved, where that is due and not done; writes what it finds."""
    row = history[-1]
    if job.validation is None or not _is_due(job, row["epoch"]) or row.keys() & {"scores", "recall"}:
        return
    context = ray.train.get_context()
    rank, phase = context.get_world_rank(), job.phase(row["epoch"] - 1)
    row |= _evaluate(job, ray.get(job.validation), phase, model, rank, context.get_world_size())
    if rank != 0:
        return
    candidates = _candidates(job, history)
    is_best = job.keep_best and _is_best(candidates)
    if is_best:  # under a name that says its epoch, and before the scores that make it the best
        job.storage.write_bytes(_best_uri(job, row["epoch"]), dumps(model))
    _point(job, row["epoch"], row)
    if is_best:
        for earlier in candidates[:-1]:
            if best_score(earlier) is not None:
                job.storage.delete(_best_uri(job, earlier["epoch"]))


def _evaluate(job: TrainingJob, validation: Validation, phase: Phase, model: MaskRCNN, rank: int, world: int) -> dict[str, Any]:
    """How good the model is, from the answers of all workers; only worker 0 has the result, the others an empty one.

    It is the detections' AP; of an RPN that learns alone, the recall of its proposals.
    """
    start = time.perf_counter()
    share = propose_share if phase.learn == "rpn" else predict_share
    unusable: dict[int, str] = {}
    found = share(model.eval(), validation, job.storage, rank, world, unusable)
    shares: list[Any] = [(found, unusable)]
    if world > 1:
        shares = [None] * world if rank == 0 else []
        torch.distributed.gather_object((found, unusable), shares if rank == 0 else None)
    if rank != 0:
        return {}
    answers = [row for rows, _ in shares for row in rows]
    validation, left_out = _scored(validation, {number: why for _, bad in shares for number, why in bad.items()})
    row: dict[str, Any]
    if phase.learn == "rpn":
        row = {"recall": proposal_recall(validation.truth, answers)}
        headline = row["recall"]
    else:
        scores = coco_metrics(validation.truth, answers, max_dets=validation.max_dets)
        headline = {name: value for kind, score in scores.items() for name, value in named_ap(kind, score).items()}
        row = {"ap": headline, "scores": {kind: vars(score) for kind, score in scores.items()}}
    if left_out:
        row["not_scored"] = left_out
        unused = counted(
            len(left_out), "image could not be used and is not scored", "images could not be used and are not scored"
        )
        job.board.say.remote(f"{unused}: {named(left_out)}")
    images = counted(len(validation.truth.images), "image")
    job.board.say.remote(f"evaluated on {images} in {time.perf_counter() - start:.0f} s: {describe_scores(headline)}")
    return row


def _scored(validation: Validation, unusable: Mapping[int, str]) -> tuple[Validation, list[str]]:
    """The validation data without the images that could not be used, and why. Raises AnnotationError for too many of them."""
    truth = validation.truth
    listed, left_out = listed_and_left_out(truth)
    check_unusable(list(unusable.values()), listed, validation.most_unusable, truth.source, left_out)
    return replace(validation, truth=without_images(truth, unusable.keys(), UNUSABLE_IMAGE)), list(unusable.values())


def named_ap(kind: IouType, score: Score) -> dict[str, float | None]:
    """The two numbers that a curve shows."""
    return {f"{KIND_NAMES[kind]} AP": score.ap, f"{KIND_NAMES[kind]} AP50": score.ap50}


def describe_scores(scores: Mapping[str, float | None]) -> str:
    """One line of scores in percent, as papers write them."""
    return ", ".join(f"{name} {'-' if value is None else f'{100 * value:.1f}'}" for name, value in scores.items())


def predict_share(
    model: MaskRCNN,
    validation: Validation,
    storage: Storage,
    rank: int = 0,
    world: int = 1,
    unusable: dict[int, str] | None = None,
) -> list[dict[str, Any]]:
    """COCO result rows of every `world`-th image from `rank` on. unusable: gets the images without an answer, and why."""
    categories = {category.id: category for category in model.config.categories}
    most = max(validation.max_dets)
    options = PredictOptions(max_detections=max(most, model.config.max_detections))
    rows: list[dict[str, Any]] = []
    for loaded in _share(validation, storage, rank, world, unusable):
        answers = model.predict([image for _, image in loaded], options)
        for (image_id, _), found in zip(loaded, answers, strict=True):
            rows.extend(result_rows(image_id, found, categories))
    return rows


def propose_share(
    model: MaskRCNN,
    validation: Validation,
    storage: Storage,
    rank: int = 0,
    world: int = 1,
    unusable: dict[int, str] | None = None,
) -> list[dict[str, Any]]:
    """`image_id` and `boxes` (float32 (P, 4), xyxy, best first) of every `world`-th image from `rank` on that can be used."""
    return [
        {"image_id": image_id, "boxes": boxes}
        for loaded in _share(validation, storage, rank, world, unusable)
        for (image_id, _), boxes in zip(loaded, model.propose([image for _, image in loaded]), strict=True)
    ]


def _share(
    validation: Validation, storage: Storage, rank: int, world: int, unusable: dict[int, str] | None
) -> Iterator[list[tuple[int, Tensor]]]:
    """A worker's images with their ids, some at a time, and the next ones loaded meanwhile; `unusable` gets the others."""
    mine = validation.truth.images[rank::world]
    chunks = [mine[start : start + EVALUATION_IMAGES] for start in range(0, len(mine), EVALUATION_IMAGES)]
    with ThreadPoolExecutor(1) as ahead:
        loading = ahead.submit(_load_images, storage, validation.folder, chunks[0]) if chunks else None
        for number in range(len(chunks)):
            ready = loading.result() if loading is not None else []
            if number + 1 < len(chunks):
                loading = ahead.submit(_load_images, storage, validation.folder, chunks[number + 1])
            if unusable is not None:
                unusable.update((number, loaded) for number, loaded in ready if isinstance(loaded, str))
            yield [(number, loaded) for number, loaded in ready if isinstance(loaded, Tensor)]


def _load_images(storage: Storage, folder: str, images: Sequence[CocoImage]) -> list[tuple[int, Tensor | str]]:
    """Each image with its id, or in its place why it cannot be used. StorageError where the storage is out of reach."""
    limits = DecodeLimits()
    uris = [relative_to(folder, image.file_name) for image in images]
    loaded: list[tuple[int, Tensor | str]] = []
    for image, got in zip(images, fetch_patiently(storage, uris, max_bytes=limits.max_bytes), strict=True):
        if got.may_pass:
            raise StorageError(str(got.error))
        decoded = decode(got.data, limits) if got.data is not None else None
        reason = got.error if decoded is None else decoded.error
        if decoded is not None and decoded.image is not None:
            reason = wrong_size((decoded.image.shape[2], decoded.image.shape[1]), image)
            if reason is None:
                loaded.append((image.id, decoded.image))
                continue
        loaded.append((image.id, f"{image.file_name}: {reason}"))
    return loaded


# -- checkpoints -------------------------------------------------------------------------------------------------------


def restore(job: TrainingJob, device: torch.device) -> State:
    """The newest complete checkpoint's state, or the initial model's, ready for the epoch that follows."""
    latest = read_latest(job.storage, job.run_uri)
    if latest is None:
        return _begin(job, 0, load_checkpoint(ray.get(job.initial), device), [])
    folder = Storage.join(job.run_uri, latest["checkpoint"])
    model = load_checkpoint(job.storage.read_bytes(Storage.join(folder, MODEL)), device)
    saved = json.loads(job.storage.read_bytes(Storage.join(folder, STATE)))
    epoch, history = saved["epoch"], saved["history"]
    if latest["row"] is not None:
        history[-1] = latest["row"]
    _score(job, model, history)  # where the last start ended between the two
    if epoch % job.recipe.epochs == 0 and epoch < job.epochs:  # the saved optimiser is the last phase's
        return _begin(job, epoch, model, history)
    model = begin(model, job.phase(epoch))
    optimizer = build_optimizer(model, job.recipe, 0.0)
    content = io.BytesIO(job.storage.read_bytes(Storage.join(folder, OPTIMIZER)))
    optimizer.load_state_dict(torch.load(content, map_location=device, weights_only=True))
    return State(epoch, model, optimizer, history)


def _save(job: TrainingJob, state: State, rank: int) -> None:
    """Reports the epoch with its checkpoint, then points `latest.json` at it: a kill in between repeats the epoch.

    What `latest.json` names must outlast a power cut as it does, and Ray Train does not sync what it copies.
    """
    metrics = {"epoch": state.epoch, "loss": state.history[-1]["losses"].get(TOTAL)}
    if rank != 0:
        ray.train.report(metrics)
        return
    name = f"checkpoint_{state.epoch:04d}"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, MODEL).write_bytes(dumps(state.model))
        torch.save(state.optimizer.state_dict(), Path(folder, OPTIMIZER))
        Path(folder, STATE).write_text(json.dumps({"epoch": state.epoch, "history": state.history}))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder), checkpoint_dir_name=name)
    folder_uri = Storage.join(job.run_uri, name)
    job.storage.sync(Storage.join(folder_uri, file) for file in (MODEL, OPTIMIZER, STATE))
    _point(job, state.epoch)


def _point(job: TrainingJob, epoch: int, row: Mapping[str, Any] | None = None) -> None:
    """Writes `latest.json`; row: the epoch's of the history, once it was scored."""
    latest = {"epoch": epoch, "checkpoint": f"checkpoint_{epoch:04d}"} | ({} if row is None else {"row": dict(row)})
    job.storage.write_bytes(Storage.join(job.run_uri, LATEST), json.dumps(latest).encode())


def _best_uri(job: TrainingJob, epoch: int) -> str:
    """Where the model of an epoch is kept that was the best so far."""
    return Storage.join(job.run_uri, f"best_{epoch:04d}.safetensors")


def _candidates(job: TrainingJob, history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The epochs whose model may be exported: the last phase's."""
    return [row for row in history if row["epoch"] > job.epochs - job.recipe.epochs]


def _is_best(history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last epoch was evaluated and no earlier one scored more."""
    scores = [best_score(row) for row in history]
    return bool(scores) and scores[-1] is not None and all(score is None or score <= scores[-1] for score in scores)


def best_score(row: Mapping[str, Any]) -> float | None:
    """What `--keep best` compares: the AP of masks where there are any, else of boxes; of an RPN alone, its recall."""
    named = row.get("ap") or row.get("recall") or {}
    return next((named[name] for name in COMPARED if named.get(name) is not None), None)


def _finish(job: TrainingJob, state: State) -> None:
    """The model under its final name, the curves, then the metrics: their presence says that the run is complete."""
    kept, model = state.history[-1], state.model
    scored = [row for row in _candidates(job, state.history) if best_score(row) is not None]
    if job.keep_best and scored:
        kept = max(scored, key=lambda row: (best_score(row), row["epoch"]))
    if kept["epoch"] != state.epoch:
        model = load_checkpoint(job.storage.read_bytes(_best_uri(job, kept["epoch"])))
    metrics = {
        "epochs": state.epoch,
        "kept_epoch": kept["epoch"],
        "model_id": model.model_id,
        "workers": ray.train.get_context().get_world_size(),
        "device": state.model.device.type,
        "seconds": sum(row["seconds"] for row in state.history),
        "scores": kept.get("scores", {}),
        "recall": kept.get("recall", {}),
        "images": {
            "listed": job.images.listed,
            "left_out": job.images.left_out,
            "replaced": sorted({message for row in state.history for message in row.get("replaced", ())}),
            "not_scored": kept.get("not_scored", []),
            "dropped": dict(job.images.dropped),
        },
        "history": [{key: value for key, value in row.items() if key != "scores"} for row in state.history],
    }
    title = f"{job.run_uri.rpartition('/')[2]}: {metrics['model_id']}"
    job.storage.write_bytes(Storage.join(job.run_uri, MODEL), dumps(model))
    job.storage.write_bytes(Storage.join(job.run_uri, CURVES), training_curves(metrics["history"], title))
    job.storage.write_bytes(Storage.join(job.run_uri, METRICS), json.dumps(metrics, indent=1).encode())
