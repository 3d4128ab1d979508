"""A detector that costs nothing, or a fixed time per image, and finds nothing: what is left is the labelling run itself.

It is a package of its own in the sense of docs/models.md, "Another detector": `install` makes a folder that, on PYTHONPATH,
reads checkpoints of format `masklake-null/1`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from masklake.model.config import Category, PredictOptions
from masklake.model.fields import Task
from masklake.model.instances import Instances

FORMAT = "masklake-null/1"


class NullDetector:
    """Answers after `seconds` per image, which a thread of its own sleeps as a device would compute."""

    categories = (Category(id=1, name="nothing"),)
    tasks: frozenset[Task] = frozenset({"box"})

    def __init__(self, seconds: float) -> None:
        self.model_id = f"null-{seconds:g}"
        self._seconds = seconds
        self._device = ThreadPoolExecutor(1)

    def batch_key(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Only images of equal size are batched."""
        return size

    def settings(self, options: PredictOptions) -> Mapping[str, Any]:
        """Nothing changes an answer."""
        return {}

    def predict(self, images: Sequence[Tensor], options: PredictOptions = PredictOptions()) -> list[Instances]:  # noqa: B008
        """Returns no instance for each image."""
        if self._seconds:
            self._device.submit(time.sleep, self._seconds * len(images)).result()
        return [_nothing((image.shape[1], image.shape[2])) for image in images]


def _nothing(size: tuple[int, int]) -> Instances:
    return Instances(
        size=size, boxes=np.zeros((0, 4), np.float32), scores=np.zeros(0, np.float32), labels=np.zeros(0, np.int64), rles=None
    )


def checkpoint(seconds: float) -> bytes:
    """Returns a checkpoint of a detector that takes `seconds` per image."""
    return save_tensors({"seconds": torch.tensor(seconds, dtype=torch.float64)}, metadata={"format": FORMAT})


def load(data: bytes, device: torch.device) -> NullDetector:
    """The entry point."""
    return NullDetector(float(load_tensors(data)["seconds"]))


def install(folder: Path) -> Path:
    """Makes `folder`, once it is on PYTHONPATH, an installed package of this detector; returns it."""
    folder.mkdir()
    shutil.copy(__file__, folder / "null_detector.py")
    information = folder / "null_detector-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: null-detector\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[masklake.detectors]\n{FORMAT} = null_detector:load\n")
    return folder
