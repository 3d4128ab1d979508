"""A training run's pointer to its newest complete checkpoint: written after it, read by every start.

A module of its own, because Ray Train's controller reads it and needs nothing else of training.
"""

from __future__ import annotations

import json
from typing import Any

from masklake.pipeline.errors import InputNotFoundError, TrainingError
from masklake.pipeline.storage.storage import Storage

LATEST = "latest.json"


def read_latest(storage: Storage, run_uri: str) -> dict[str, Any] | None:
    """`epoch` and `checkpoint` (a folder's name) of the newest, and `row`, its row of history, once the epoch was scored.

    None before the first. TrainingError where it is damaged.
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
