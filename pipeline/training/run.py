"""A training run in a worker: its settings, its state, and the worker itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.phases import Phase
from masklake.pipeline.coco.dataset import CocoDataset
from masklake.pipeline.coco.image_check import check_unusable, listed_and_left_out
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.training.augmentation import SampleSpec
from masklake.pipeline.training.recipe import Recipe

TOTAL = "loss"
"""Name of the sum of all losses."""


@dataclass(frozen=True)
class Images:
    """The images of a run's COCO file.

    left_out: number of images left out before the run began. dropped: counts of images and instances left out, by reason.
    most_unusable: share of the images that may be left out or replaced.
    """

    source: str
    listed: int
    left_out: int
    dropped: Mapping[str, int]
    most_unusable: float

    @staticmethod
    def of(data: CocoDataset, most_unusable: float) -> Images:
        """Returns the images of a data set that `usable_images` has checked."""
        return Images(data.source, *listed_and_left_out(data), dict(data.dropped), most_unusable)

    def check(self, replaced: Collection[str]) -> None:
        """Raises AnnotationError if too many images are unusable. replaced: messages on images that training had to replace."""
        check_unusable(sorted(replaced), self.listed, self.most_unusable, self.source, self.left_out)


@dataclass(frozen=True)
class TrainingRun:
    """The settings of a run, the same on every worker.

    Each phase trains by the whole recipe, including its epochs. The number of an epoch, counted over all phases, determines its
    phase, so that a start at any epoch continues in the right phase.
    """

    uri: str
    phases: tuple[Phase, ...]
    steps_per_epoch: int
    recipe: Recipe
    spec: SampleSpec
    storage: Storage
    evaluate_every: int
    keep_best: bool
    images: Images

    @property
    def epochs(self) -> int:
        """Number of epochs of all phases together."""
        return len(self.phases) * self.recipe.epochs

    def phase(self, epoch: int) -> Phase:
        """Returns the phase of the epoch that follows `epoch` completed ones; after the last epoch, the last phase."""
        return self.phases[min(epoch // self.recipe.epochs, len(self.phases) - 1)]

    def is_scored(self, epoch: int) -> bool:
        """Returns whether the model is scored after `epoch` (from 1): at the end of a phase, or by `evaluate_every`."""
        return epoch % self.recipe.epochs == 0 or bool(self.evaluate_every and epoch % self.evaluate_every == 0)

    def candidates(self, history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the rows of the epochs whose model may be exported: those of the last phase."""
        return [row for row in history if row["epoch"] > self.epochs - self.recipe.epochs]


@dataclass
class State:
    """The state of a run in a worker.

    epoch: number of completed epochs. history: one row per epoch. told: messages on replaced images that this start has shown.
    """

    epoch: int
    model: MaskRCNN
    optimizer: torch.optim.Optimizer
    history: list[dict[str, Any]] = field(default_factory=list)
    told: set[str] = field(default_factory=set)


class Report(Protocol):
    """Stores a checkpoint under the run's folder: the files in `folder` as `name`. Every worker calls it after each epoch."""

    def __call__(self, metrics: dict[str, Any], folder: Path | None = None, name: str | None = None) -> None:
        """folder: None on all workers but the first."""


@dataclass(frozen=True)
class Worker:
    """One process of a run, set up by its launcher (Ray Train).

    rank: its number, from 0. count: number of workers; if it is greater than 1, `torch.distributed` is initialised. replica:
    wraps a model so that the gradients of all workers are averaged. report: stores a checkpoint. show: shows a line to the
    user.
    """

    rank: int
    count: int
    device: torch.device
    replica: Callable[[MaskRCNN], torch.nn.Module]
    report: Report
    show: Callable[[str], None]

    def say(self, line: str) -> None:
        """Shows a line to the user, from the first worker only."""
        if self.rank == 0:
            self.show(line)
