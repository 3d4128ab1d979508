"""Records of a table's runs: their inputs, and the key by which a restart finds the run to continue."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from masklake.model.errors import ConfigError

_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")


class RunRecord(BaseModel):
    """The record of a run, as stored in `_masklake/<run_id>/run.json`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    run_id: str
    label_id: str
    input: dict[str, Any] = Field(description="The input's specification. Only a restart with an equal one continues the run.")
    images: int = Field(description="Rows of the frozen manifest.")
    status: Literal["planned", "committed"] = "planned"
    planned_at: datetime
    committed_at: datetime | None = None


def valid_run_id(run_id: str, given: str = "run id") -> str:
    """Returns `run_id` unchanged. Raises ConfigError unless it can name a folder and a partition on every storage.

    given: the name of the value in messages, such as `--tick`.
    """
    if not _RUN_ID.fullmatch(run_id):
        raise ConfigError(
            f"{given} {run_id!r}: use 1 to 100 letters from a to z, digits, '-' and '_' (it names a folder and a partition)"
        )
    return run_id


def input_key(label_id: str, spec: dict[str, Any]) -> str:
    """Returns 16 hex digits of a hash of label_id and input specification: a start continues a run with an equal key."""
    return hashlib.sha256(json.dumps([label_id, spec], sort_keys=True).encode()).hexdigest()[:16]
