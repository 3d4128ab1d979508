"""Checkpoints of a training run, and the files that a complete run leaves."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.phases import begin_phase
from masklake.model.weights.checkpoint import dumps, load_checkpoint
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.training.curves import training_curves
from masklake.pipeline.training.recipe import build_optimizer
from masklake.pipeline.training.run import State, TrainingRun
from masklake.pipeline.training.run_folder import CURVES, METRICS, MODEL, OPTIMIZER, STATE, best_uri, read_latest
from masklake.pipeline.training.validation import best_score


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint. epoch: number of completed epochs. history: one row per epoch. folder: its URI."""

    epoch: int
    model: MaskRCNN
    history: list[dict[str, Any]]
    folder: str


def read_checkpoint(run: TrainingRun, device: torch.device) -> Checkpoint | None:
    """Returns the newest complete checkpoint, or None; its history includes the scores in `latest.json`."""
    latest = read_latest(run.storage, run.uri)
    if latest is None:
        return None
    folder = Storage.join(run.uri, latest["checkpoint"])
    model = load_checkpoint(run.storage.read_bytes(Storage.join(folder, MODEL)), device)
    saved = json.loads(run.storage.read_bytes(Storage.join(folder, STATE)))
    epoch, history = saved["epoch"], saved["history"]
    if latest["row"] is not None:
        history[-1] = latest["row"]
    return Checkpoint(epoch, model, history, folder)


def resume(run: TrainingRun, checkpoint: Checkpoint, device: torch.device) -> State:
    """Returns the state to continue from within a phase, with the saved optimiser."""
    model = begin_phase(checkpoint.model, run.phase(checkpoint.epoch))
    optimizer = build_optimizer(model, run.recipe, 0.0)
    content = io.BytesIO(run.storage.read_bytes(Storage.join(checkpoint.folder, OPTIMIZER)))
    optimizer.load_state_dict(torch.load(content, map_location=device, weights_only=True))
    return State(checkpoint.epoch, model, optimizer, checkpoint.history)


def write_checkpoint(state: State, folder: Path) -> None:
    """Writes the files of a checkpoint into a local folder."""
    (folder / MODEL).write_bytes(dumps(state.model))
    torch.save(state.optimizer.state_dict(), folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps({"epoch": state.epoch, "history": state.history}))


def export(run: TrainingRun, state: State, workers: int) -> None:
    """Writes the model under its final name, the curves, and last the metrics, whose presence marks the run as complete."""
    kept, model = state.history[-1], state.model
    scored = [row for row in run.candidates(state.history) if best_score(row) is not None]
    if run.keep_best and scored:
        kept = max(scored, key=lambda row: (best_score(row), row["epoch"]))
    if kept["epoch"] != state.epoch:
        model = load_checkpoint(run.storage.read_bytes(best_uri(run.uri, kept["epoch"])))
    metrics = {
        "epochs": state.epoch,
        "kept_epoch": kept["epoch"],
        "model_id": model.model_id,
        "workers": workers,
        "device": state.model.device.type,
        "seconds": sum(row["seconds"] for row in state.history),
        "scores": kept.get("scores", {}),
        "recall": kept.get("recall", {}),
        "images": {
            "listed": run.images.listed,
            "left_out": run.images.left_out,
            "replaced": sorted({message for row in state.history for message in row.get("replaced", ())}),
            "not_scored": kept.get("not_scored", []),
            "dropped": dict(run.images.dropped),
        },
        "history": [{key: value for key, value in row.items() if key != "scores"} for row in state.history],
    }
    title = f"{run.uri.rpartition('/')[2]}: {metrics['model_id']}"
    run.storage.write_bytes(Storage.join(run.uri, MODEL), dumps(model))
    run.storage.write_bytes(Storage.join(run.uri, CURVES), training_curves(metrics["history"], title))
    run.storage.write_bytes(Storage.join(run.uri, METRICS), json.dumps(metrics, indent=1).encode())
