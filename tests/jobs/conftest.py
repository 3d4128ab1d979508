"""What the tests of jobs share: a tiny model's checkpoint, and folders of small pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import create_model, save_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `tiny` with seeded random weights."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    torch.manual_seed(0)
    save_checkpoint(create_model("tiny"), path)
    return path


def draw(path: Path, seed: int, size: tuple[int, int]) -> None:
    """Blocks of colour, so that a random model finds edges to look at."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST).save(path, quality=90)


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of `count` JPEGs in two shapes."""

    def make(count: int, name: str = "images", first: int = 0) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for number in range(first, first + count):
            draw(folder / f"{number:03d}.jpg", number, (96, 64) if number % 2 else (64, 96))
        return folder

    return make
