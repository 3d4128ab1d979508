"""A trainer without Ray: the worker's own loop in this process; its epochs count instead of learning, and it can be killed.

An epoch adds 1 to a bias, so that the bias says which epoch a model is of, and its AP follows from it (`score_of`).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from masklake.jobs import train
from masklake.jobs.cluster.connection import Capacity
from masklake.jobs.shapes import generate
from masklake.jobs.training import worker as train_worker
from masklake.jobs.training.options import TrainOptions
from masklake.jobs.training.worker import TrainingJob
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.weights.checkpoint import dumps, load_checkpoint
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.training import checkpoints, loop, validation

NARROW: dict[str, Any] = {
    "backbone": {"widths": (8, 8, 8, 8), "stem_channels": 8},
    **{"fpn_channels": 8, "box_hidden": 8, "mask_channels": (8,), "mask_deconv_channels": 8, "keypoint_channels": (8,)},
}
KILLS = ("epoch", "report", "latest.json", "score", "best", "model.safetensors", "curves.png", "metrics.json")
"""Where a start may end: within an epoch or its evaluation; after a checkpoint's upload; after the write of a file, except of
`metrics.json`, before it."""


class Killed(BaseException):
    """The process is gone."""


def age(model: MaskRCNN) -> int:
    """The epoch that a model is of."""
    return round(float(model.network.box_head.cls_score.bias[0].detach()))


def score_of(epoch: int) -> float:
    """Its box AP: the second and third epochs are the best, equally."""
    return {1: 0.3, 2: 0.5, 3: 0.5, 4: 0.2}[epoch]


class FakeTrainer:
    """Stands in for Ray Train under `jobs.train.run`. kill: the next start's end; trained, scored: epochs, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.kill: str | None = None
        self.trained: list[int] = []
        self.scored: list[int] = []
        self._write = Storage.write_bytes
        context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
        patch.setattr(train, "connect_ray", lambda _: Capacity(cpus=4, gpus=0, memory=1e9, embedded=True))
        patch.setattr(train, "fit", self._fit)
        patch.setattr(ray, "get", lambda value: value)
        patch.setattr(ray.train, "get_context", lambda: context)
        patch.setattr(ray.train, "report", self._report)
        patch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
        patch.setattr(ray.train.torch, "prepare_model", lambda model, **_: model)
        patch.setattr(train_worker, "_batches", lambda _: iter(()))
        patch.setattr(loop, "run_epoch", self._run_epoch)
        patch.setattr(validation, "evaluate", self._evaluate)
        patch.setattr(checkpoints, "training_curves", lambda history, title: f"{title}: {len(history)}".encode())
        patch.setattr(Storage, "write_bytes", lambda storage, uri, data: self._write_bytes(storage, uri, data))

    def _die(self, moment: str) -> None:
        if self.kill == moment:
            self.kill = None
            raise Killed(moment)

    def _write_bytes(self, storage: Storage, uri: str, data: bytes) -> None:
        name = uri.rpartition("/")[2]
        if name == "metrics.json":
            self._die(name)
        self._write(storage, uri, data)
        self._die("best" if name.startswith("best_") else name)

    def _fit(self, plan: Any, storage: Storage, say: Any) -> None:
        nobody = SimpleNamespace(say=SimpleNamespace(remote=say))
        self.run_uri = plan.options.run_uri
        run = dataclasses.replace(plan.run(storage), steps_per_epoch=1)
        job = TrainingJob(run, initial=dumps(plan.model), validation=plan.validation, messages=nobody, threads=None)
        train_worker._train(job)

    def _report(self, metrics: Any, checkpoint: Any, checkpoint_dir_name: str) -> None:
        shutil.copytree(checkpoint.path, Path(self.run_uri, checkpoint_dir_name), dirs_exist_ok=True)
        self._die("report")

    def _run_epoch(self, run: Any, worker: Any, state: Any, replica: Any, batches: Any) -> dict[str, Any]:
        self._die("epoch")
        self.trained.append(state.epoch + 1)
        with torch.no_grad():
            state.model.network.box_head.cls_score.bias[0] += 1
        return {"losses": {"loss": 1.0}, "learning_rate": 0.1, "seconds": 1.0, "images_per_s": 1.0}

    def _evaluate(self, data: Any, storage: Any, phase: Any, model: MaskRCNN, worker: Any) -> dict[str, Any]:
        self._die("score")
        self.scored.append(age(model))
        ap = score_of(age(model))
        return {"ap": {"box AP": ap}, "scores": {"bbox": {"ap": ap, "ap50": ap}}}


def draw_data(folder: Path) -> Path:
    """Training and validation data of a few drawn images."""
    generate(folder / "train", 3, 64, seed=1)
    generate(folder / "val", 2, 64, seed=2)
    return folder


def counting_run(data: Path, output: Path, epochs: int = 2, **changes: Any) -> TrainOptions:
    """Options of a run called `r`, of a narrow model that is scored after each epoch."""
    values = {
        "train": str(data / "train" / "instances.json"),
        "val": str(data / "val" / "instances.json"),
        "output": str(output),
        "name": "r",
        "model": NARROW,
        "evaluate_every": 1,
        "recipe": {"epochs": epochs},
    }
    model = {**NARROW, **changes.pop("model", {})}
    return TrainOptions.model_validate({**values, "model": model, **changes})


def begin_at_zero(patch: pytest.MonkeyPatch) -> None:
    """New models begin with a bias of 0: they are of no epoch yet."""
    build = train.build_model

    def zeroed(*arguments: Any) -> MaskRCNN:
        model = build(*arguments)
        with torch.no_grad():
            model.network.box_head.cls_score.bias[0] = 0
        return model

    patch.setattr(train, "build_model", zeroed)


def check_result(folder: Path, epochs: int, keep: str) -> None:
    """Model, metrics and curves are of one epoch: the one that was asked for."""
    metrics = json.loads((folder / "metrics.json").read_text())
    model = load_checkpoint(folder / "model.safetensors")
    expected = epochs if keep == "last" else max(range(1, epochs + 1), key=lambda epoch: (score_of(epoch), epoch))
    assert (metrics["epochs"], metrics["kept_epoch"], age(model)) == (epochs, expected, expected)
    assert metrics["model_id"] == model.model_id
    assert metrics["scores"]["bbox"]["ap"] == score_of(expected)
    assert [row["epoch"] for row in metrics["history"]] == list(range(1, epochs + 1))
    assert [row["ap"]["box AP"] for row in metrics["history"]] == [score_of(epoch) for epoch in range(1, epochs + 1)]
    assert (folder / "curves.png").read_text() == f"r: {model.model_id}: {epochs}"
