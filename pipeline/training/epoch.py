"""One epoch of training: its steps, mean losses and progress lines."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from masklake.model.devices import arithmetic
from masklake.model.wording import counted
from masklake.pipeline.coco.image_check import first_few
from masklake.pipeline.errors import TrainingError
from masklake.pipeline.training.recipe import Recipe, clip, peak_rate, rate_factor, set_rate
from masklake.pipeline.training.run import TOTAL, State, TrainingRun, Worker
from masklake.pipeline.training.samples import replaced_in, to_training

SECONDS_PER_LINE = 5.0
"""Approximate seconds between two progress lines of an epoch, and between two checks that the loss is finite."""


def run_epoch(
    run: TrainingRun, worker: Worker, state: State, replica: torch.nn.Module, batches: Iterator[Any]
) -> dict[str, Any]:
    """Trains for one epoch; returns its row of history (mean losses, seconds, images per second).

    Raises TrainingError, on every worker alike, if the loss is not finite or the batches end early.
    """
    state.model.train()
    known = {message for row in state.history for message in row.get("replaced", ())}
    replaced: set[str] = set()
    losses, steps, rate = Losses(), 0, 0.0
    batch = next(batches, None)  # before the clock starts: the first of a run waits for the loading tasks to start
    progress = _Progress(run, worker, state.epoch)
    while batch is not None and steps < run.steps_per_epoch:
        if unusable := replaced_in(batch):
            replaced.update(unusable)
            run.images.check(known | replaced)
        images, targets = to_training(batch, run.spec)
        rate = _rate(run, worker, state.epoch, steps)
        set_rate(state.optimizer, rate)
        losses.add(step(replica, images, targets, state.optimizer, run.recipe))
        steps += 1
        batch = next(batches, None) if steps < run.steps_per_epoch else None
        progress.look(losses, steps, rate, last=batch is None)
    if steps < run.steps_per_epoch:
        raise TrainingError(
            f"the images of epoch {state.epoch + 1} ended after {steps} of {counted(run.steps_per_epoch, 'step')}."
        )
    seconds = progress.seconds
    images_per_s = _image_count(run, worker, steps) / max(seconds, 1e-9)
    row = {"losses": losses.means(), "learning_rate": rate, "seconds": seconds, "images_per_s": images_per_s}
    return row | _replaced(run, worker, state, known, replaced)


def _rate(run: TrainingRun, worker: Worker, epoch: int, step: int) -> float:
    """Returns the learning rate at a step (from 0) of the epoch that follows `epoch` completed ones."""
    peak = peak_rate(run.recipe, _image_count(run, worker, 1))
    first_step = epoch % run.recipe.epochs * run.steps_per_epoch  # in its phase
    return peak * rate_factor(run.recipe, first_step + step, run.recipe.epochs * run.steps_per_epoch)


def _image_count(run: TrainingRun, worker: Worker, steps: int) -> int:
    """Returns the number of images in so many steps of all workers."""
    return steps * run.recipe.batch_size * worker.count


def _replaced(run: TrainingRun, worker: Worker, state: State, known: set[str], met: set[str]) -> dict[str, Any]:
    """Returns the entry of the history for images that had to be replaced; shows a line on those that this start has not shown
    yet.

    known: messages in the history; met: those of this worker's epoch. Every worker must call it at the same step.
    """
    replaced = _of_all(met)
    run.images.check(known | replaced)
    if fresh := replaced - state.told:
        unused = counted(len(fresh), "image could not be used and was replaced", "images could not be used and were replaced")
        worker.say(f"{unused}: {first_few(sorted(fresh))}")
    state.told |= replaced
    first_met = replaced - known  # once in a run's history: they are replaced in every epoch
    return {"replaced": sorted(first_met)} if first_met else {}


def _of_all(messages: set[str]) -> set[str]:
    """Returns the messages of all workers together. Every worker must call it at the same step."""
    if not torch.distributed.is_initialized():
        return messages
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, messages)
    return set().union(*shares)


def step(
    replica: torch.nn.Module, images: Sequence[Tensor], targets: Sequence[Any], optimizer: torch.optim.Optimizer, recipe: Recipe
) -> dict[str, Tensor]:
    """Runs forward, backward and one update; returns the losses and their sum."""
    with arithmetic("fp32", next(replica.parameters()).device):  # of the way back, too
        losses: dict[str, Tensor] = replica(images, targets)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        clip(replica.parameters(), recipe)
        optimizer.step()
    return {TOTAL: total.detach(), **{name: loss.detach() for name, loss in losses.items()}}


class Losses:
    """Sums of losses on the device. Only asking for means waits for the device and for the other workers."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._recent: Tensor | None = None
        self._recent_steps = 0
        self._all: Tensor | None = None
        self._steps = 0

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Adds the losses of one step of this worker."""
        self._names = list(losses)
        values = torch.stack([loss.float() for loss in losses.values()])
        self._recent = values if self._recent is None else self._recent + values
        self._all = values if self._all is None else self._all + values
        self._recent_steps += 1
        self._steps += 1

    def recent(self) -> dict[str, float]:
        """Returns means over the steps since the last call and over all workers. Every worker must call it at the same step."""
        means = self._means(self._recent, self._recent_steps)
        self._recent, self._recent_steps = None, 0
        return means

    def means(self) -> dict[str, float]:
        """Returns means over all steps and all workers. Every worker must call it at the same step."""
        return self._means(self._all, self._steps)

    def _means(self, sums: Tensor | None, steps: int) -> dict[str, float]:
        if sums is None:
            return {}
        values = sums / steps
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
            values /= torch.distributed.get_world_size()
        return dict(zip(self._names, values.tolist(), strict=True))


class _Progress:
    """Checks that the losses of an epoch are finite and shows them, every few seconds, on all workers at the same step."""

    def __init__(self, run: TrainingRun, worker: Worker, epoch: int) -> None:
        """epoch: number of completed epochs. The clock starts now."""
        self._run = run
        self._worker = worker
        self._epoch = epoch
        self._next = 1  # the step at which to look
        self._start = self._said = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def look(self, losses: Losses, steps: int, rate: float, last: bool) -> None:
        """Checks and shows the losses if that is due after so many steps. last: whether no step follows.

        Raises TrainingError, on every worker alike, if a loss is not finite.
        """
        if not last and steps != self._next:
            return
        means = losses.recent()
        _check_finite(means, self._epoch + 1, steps, rate)
        # At most twice as far as now: the first steps may have been fast.
        self._next += _agreed(min(steps, round(SECONDS_PER_LINE * steps / self.seconds)), self._worker)
        if steps == self._run.steps_per_epoch or time.perf_counter() - self._said >= SECONDS_PER_LINE / 2:
            self._said = time.perf_counter()
            self._say(means, steps)

    def _say(self, losses: Mapping[str, float], steps: int) -> None:
        if not losses:
            return
        run, epoch, seconds = self._run, self._epoch, self.seconds
        parts = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items() if name != TOTAL)
        left = ((run.epochs - epoch) * run.steps_per_epoch - steps) * seconds / steps
        phase = f" ({run.phase(epoch).trains})" if len(run.phases) > 1 else ""
        line = f"epoch {epoch + 1}/{run.epochs}{phase}, step {steps}/{run.steps_per_epoch}: loss {losses[TOTAL]:.3f} ({parts})"
        speed = _image_count(run, self._worker, steps) / seconds
        self._worker.say(f"{line}; {speed:.1f} images/s, about {_duration(left)} left")


def _agreed(steps: int, worker: Worker) -> int:
    """Returns the first worker's number, at least 1, on all workers: their clocks differ, and they must check at the same
    step.
    """
    if not torch.distributed.is_initialized():
        return max(1, steps)
    number = torch.tensor(max(1, steps), device=worker.device)
    torch.distributed.broadcast(number, src=0)
    return int(number)


def _check_finite(losses: Mapping[str, float], epoch: int, step: int, rate: float) -> None:
    """Raises TrainingError, on every worker alike, if a loss is not finite."""
    if all(math.isfinite(loss) for loss in losses.values()):
        return
    wrong = ", ".join(name for name, loss in losses.items() if not math.isfinite(loss))
    raise TrainingError(
        f"training diverged in epoch {epoch} by step {step}: {wrong} is not finite at learning rate {rate:.3g}. "
        "Lower --learning-rate, lengthen the warm-up, or set recipe.clip_norm."
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
