"""A training run's pointer to its newest complete checkpoint: written after it, read by every start.

A module of its own, because Ray Train's controller reads it and needs nothing else of training.
"""

from __future__ import annotations

import json
from typing import Any

from pipeline.errors import InputNotFoundError
from pipeline.storage import Storage

LATEST = "latest.json"


def read_latest(storage: Storage, run_uri: str) -> dict[str, Any] | None:
    """`epoch` and `checkpoint` (a folder's name) of the newest; None before the first."""
    try:
        data = storage.read_bytes(Storage.join(run_uri, LATEST))
    except InputNotFoundError:
        return None
    return dict(json.loads(data))
