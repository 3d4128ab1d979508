"""Computes proposals: runs an RPN on blocks of images."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch

from masklake.model.detector import can_propose, load_detector
from masklake.model.errors import ConfigError
from masklake.pipeline.blocks import unpacked
from masklake.pipeline.coco.image_check import wrong_size
from masklake.pipeline.errors import StorageError
from masklake.pipeline.images.decode import DecodeLimits, decode
from masklake.pipeline.images.fetch import fetch_patiently
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.training.proposals import PROPOSAL_SCHEMA


class Proposer:
    """Runs a model's RPN on blocks of images. Ray Data creates it on a worker."""

    def __init__(self, storage: Storage, checkpoint: Any, device: str, threads: int) -> None:
        """checkpoint: a Ray object reference to the bytes; threads: number of torch's threads on a CPU."""
        import ray

        torch.set_num_threads(threads)
        self._storage = storage
        model = load_detector(ray.get(checkpoint), device=device)
        if not can_propose(model):
            raise ConfigError(f"model {model.model_id} gives no proposals")
        self._model = model

    def __call__(self, packed_block: pa.Table) -> pa.Table:
        """Returns PROPOSAL_SCHEMA rows with an `error`, which is null unless the image cannot be used or has another size.

        packed_block: one row of `pipeline.blocks.packed`, of rows of `file_name`, `uri`, `width` and `height`. Raises
        StorageError if the storage is busy or out of reach.
        """
        limits, rows = DecodeLimits(), []
        expected = unpacked(packed_block).to_pylist()
        fetched = fetch_patiently(self._storage, [row["uri"] for row in expected], max_bytes=limits.max_bytes)
        for wanted, got in zip(expected, fetched, strict=True):
            if got.may_pass:
                raise StorageError(str(got.error))
            decoded = None if got.data is None else decode(got.data, limits)
            row: dict[str, Any] = {"file_name": wanted["file_name"], "error": got.error if decoded is None else decoded.error}
            if decoded is not None and decoded.image is not None:
                height, width = decoded.image.shape[1:]
                row["error"] = wrong_size((width, height), wanted)
                if row["error"] is None:
                    [boxes] = self._model.propose([decoded.image])
                    row |= {"width": width, "height": height, "boxes": boxes.ravel()}
            rows.append(row)
        return pa.Table.from_pylist(rows, schema=PROPOSAL_SCHEMA.append(pa.field("error", pa.string())))
