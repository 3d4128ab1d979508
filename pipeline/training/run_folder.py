"""The files in a training run's folder, and the pointer to its newest complete checkpoint.

`<output>/<name>/` holds `checkpoint_0001/` and so on, `latest.json` (the name of the newest complete checkpoint; written after
it, read by every start), and at the end `model.safetensors`, `curves.png` and `metrics.json`.

Imports neither torch nor the model: Ray Train's controller reads `latest.json` and needs nothing else of training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from masklake.pipeline.errors import InputNotFoundError, TrainingError
from masklake.pipeline.storage.storage import Storage

MODEL, METRICS, CURVES, LATEST = "model.safetensors", "metrics.json", "curves.png", "latest.json"
OPTIMIZER, STATE = "optimizer.pt", "state.json"
"""Files beside the model in the folder of a checkpoint."""


def checkpoint_name(epoch: int) -> str:
    """Returns the name of an epoch's checkpoint folder."""
    return f"checkpoint_{epoch:04d}"


def best_uri(run_uri: str, epoch: int) -> str:
    """Returns the URI of the model of an epoch while it is the best so far."""
    return Storage.join(run_uri, f"best_{epoch:04d}.safetensors")


def read_latest(storage: Storage, run_uri: str) -> dict[str, Any] | None:
    """Returns `epoch` and `checkpoint` (name of the folder) of the newest checkpoint, and `row`: its row of the history if it
    was scored, else None.

    Returns None before the first checkpoint. Raises TrainingError if the file is damaged.
    """
    uri = Storage.join(run_uri, LATEST)
    try:
        latest = json.loads(storage.read_bytes(uri))
        known: dict[str, Any] = {"epoch": int(latest["epoch"]), "checkpoint": str(latest["checkpoint"])}
        return known | {"row": dict(latest["row"]) if "row" in latest else None}
    except InputNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{uri} is damaged ({type(error).__name__}: {error}); write the newest complete checkpoint into it, "
            '{"epoch": 3, "checkpoint": "checkpoint_0003"}, or remove that run\'s folder'
        ) from error


def write_latest(storage: Storage, run_uri: str, epoch: int, row: Mapping[str, Any] | None = None) -> None:
    """Points `latest.json` at the checkpoint of an epoch. row: the epoch's row of history, once it was scored."""
    latest = {"epoch": epoch, "checkpoint": checkpoint_name(epoch)} | ({} if row is None else {"row": dict(row)})
    storage.write_bytes(Storage.join(run_uri, LATEST), json.dumps(latest).encode())


def read_result(storage: Storage, run_uri: str, epochs: int) -> dict[str, Any] | None:
    """Returns the metrics of a run that is complete with `epochs` epochs; None for one interrupted, shorter or damaged."""
    try:
        metrics = json.loads(storage.read_bytes(Storage.join(run_uri, METRICS)))
        if metrics["epochs"] != epochs or not storage.exists(Storage.join(run_uri, MODEL)):
            return None
    except (InputNotFoundError, ValueError, KeyError, TypeError):
        return None
    return dict(metrics)
