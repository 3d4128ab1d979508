"""The training loop of one worker: phases of epochs, a checkpoint after each epoch, and the worker's share of the evaluation.

An epoch is saved before it is scored: if an evaluation ends early, its epoch need not be trained again. The scores are then
written to `latest.json`, and with the next epoch's checkpoint to the history.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.phases import begin_phase
from masklake.model.weights.checkpoint import dumps, load_checkpoint
from masklake.model.wording import agreeing
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.training.checkpoints import export, read_checkpoint, resume, write_checkpoint
from masklake.pipeline.training.epoch import run_epoch
from masklake.pipeline.training.recipe import build_optimizer
from masklake.pipeline.training.run import TOTAL, State, TrainingRun, Worker
from masklake.pipeline.training.run_folder import MODEL, OPTIMIZER, STATE, checkpoint_name, write_latest
from masklake.pipeline.training.validation import Validate, score


def train_run(
    run: TrainingRun, worker: Worker, batches: Iterator[Any], initial: Callable[[], bytes], validation: Validate
) -> None:
    """Trains from the newest complete checkpoint to the end of the last phase; the first worker then exports the result.

    batches: Arrow tables of SAMPLE_SCHEMA rows. initial: returns the checkpoint bytes of the model before the first step.
    """
    state = restore(run, worker, initial, validation)
    after = f"continuing after epoch {state.epoch}" if state.epoch else "waiting for the first images"
    up = agreeing(worker.count, "the worker is up", "the workers are up")
    worker.say(f"{up}, {after}")
    while state.epoch < run.epochs:
        _run_phase(run, worker, state, batches, validation)
        if state.epoch < run.epochs:
            state = _first_state(run, state.epoch, load_checkpoint(dumps(state.model), worker.device), state.history)
    if worker.rank == 0:
        export(run, state, worker.count)


def restore(run: TrainingRun, worker: Worker, initial: Callable[[], bytes], validation: Validate) -> State:
    """Returns the state of the newest complete checkpoint, or of the initial model, ready for the epoch that follows."""
    checkpoint = read_checkpoint(run, worker.device)
    if checkpoint is None:
        return _first_state(run, 0, load_checkpoint(initial(), worker.device), [])
    score(run, worker, validation, checkpoint.model, checkpoint.history)  # if the last start ended after saving the epoch
    if checkpoint.epoch % run.recipe.epochs == 0 and checkpoint.epoch < run.epochs:  # a new phase has a new optimiser
        return _first_state(run, checkpoint.epoch, checkpoint.model, checkpoint.history)
    return resume(run, checkpoint, worker.device)


def _first_state(run: TrainingRun, epoch: int, model: MaskRCNN, history: list[dict[str, Any]]) -> State:
    """Returns the first state of the phase after `epoch`; new random weights are the same on every worker."""
    _seed(run.spec.seed, epoch, 0)
    model = begin_phase(model, run.phase(epoch))
    return State(epoch, model, build_optimizer(model, run.recipe, 0.0), history)


def _run_phase(run: TrainingRun, worker: Worker, state: State, batches: Iterator[Any], validation: Validate) -> None:
    """Runs the remaining epochs of a phase."""
    phase = run.phase(state.epoch)
    end = (state.epoch // run.recipe.epochs + 1) * run.recipe.epochs
    replica = worker.replica(state.model)
    while state.epoch < end:
        _seed(run.spec.seed, state.epoch, worker.rank)
        row = run_epoch(run, worker, state, replica, batches)
        state.epoch += 1
        state.history.append(row | {"epoch": state.epoch, "learn": phase.trains})
        _save(run, worker, state)
        score(run, worker, validation, state.model, state.history)


def _seed(seed: int, epoch: int, rank: int) -> None:
    """Seeds the sampling of anchors and regions: equal if an epoch is repeated, different on each worker."""
    mixed = (seed * 1_000_003 + epoch) * 1_009 + rank
    torch.manual_seed(mixed)
    random.seed(mixed)


def _save(run: TrainingRun, worker: Worker, state: State) -> None:
    """Reports the epoch with its checkpoint, then points `latest.json` at it: a kill in between repeats the epoch.

    The files that `latest.json` names must survive a power cut as it does, and Ray Train does not sync what it copies.
    """
    metrics = {"epoch": state.epoch, "loss": state.history[-1]["losses"].get(TOTAL)}
    if worker.rank != 0:
        worker.report(metrics)
        return
    name = checkpoint_name(state.epoch)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(state, Path(folder))
        worker.report(metrics, Path(folder), name)
    folder_uri = Storage.join(run.uri, name)
    run.storage.sync(Storage.join(folder_uri, file) for file in (MODEL, OPTIMIZER, STATE))
    write_latest(run.storage, run.uri, state.epoch)
