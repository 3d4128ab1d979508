"""Fixtures of the tests of the public API: a table with known content, and a tiny model's checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pycocotools.mask
import pytest
import torch
from PIL import Image

from masklake.model import create_model, save_checkpoint
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.schema import FILE_SCHEMA
from masklake.pipeline.table.table import open_table

SIZE = (40, 60)
"""Height and width of the table's images."""


def bitmap(seed: int) -> np.ndarray:
    """The mask of an image's instance number `seed`."""
    return np.random.default_rng(seed).random(SIZE) < 0.3


def encoded(mask: np.ndarray) -> bytes:
    """COCO compressed counts by pycocotools."""
    return bytes(pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"])


def write_table(folder: Path, images: dict[Path, Sequence[float]]) -> str:
    """A table whose images, drawn in plain grey, hold a cat for each of their scores."""
    table = open_table(Storage(), str(folder))
    box = {"x1": 10.0, "y1": 10.0, "x2": 50.0, "y2": 30.0}
    rows: list[dict[str, Any]] = []
    for index, (image, scores) in enumerate(images.items()):
        Image.fromarray(np.full((*SIZE, 3), 128, np.uint8)).save(image)
        row = dict.fromkeys(FILE_SCHEMA.names) | {"image_id": index, "uri": str(image), "status": "ok"}
        row |= {"width": SIZE[1], "height": SIZE[0], "bytes": image.stat().st_size, "keypoints": []}
        row["instances"] = [{"category_id": 1, "category": "cat", "score": score, "box": box} for score in scores]
        row["rles"] = [encoded(bitmap(seed)) for seed in range(len(scores))]
        rows.append(row)
    run = Path(table.run_folder("first"))
    run.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=FILE_SCHEMA), run / "a.parquet")
    table.commit_run("first")
    return table.uri


@pytest.fixture
def table(tmp_path: Path) -> str:
    """A table of two images: a.png with cats of scores 0.9 and 0.3, and b.png without an instance."""
    return write_table(tmp_path / "table", {tmp_path / "a.png": [0.9, 0.3], tmp_path / "b.png": []})


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `tiny` with seeded random weights."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    torch.manual_seed(0)
    save_checkpoint(create_model("tiny"), path)
    return path
