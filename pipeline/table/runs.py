"""Records of a table's runs: their inputs, and the key by which a restart finds the run to continue."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import socket
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from masklake.model.errors import ConfigError

_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")


class Start(BaseModel):
    """One start of a run: a call of `label` that labelled images of it."""

    model_config = ConfigDict(frozen=True, extra="allow")

    started_at: datetime
    by: str = Field(description="user@host of the driver.")
    seconds: float = Field(default=0.0, description="Duration of labelling so far; if it was killed, to within half a minute.")
    workers: int
    gpus: int = Field(default=0, description="Number of GPUs of all workers together.")
    device: str
    price_per_hour: float | None = Field(default=None, description="Price of the machines, as given to `label`.")


class RunRecord(BaseModel):
    """The plan and the results of a run, as stored in `_masklake/<run_id>/run.json` (docs/runs.md).

    Records of earlier versions lack some of the fields.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    run_id: str
    label_id: str
    input: dict[str, Any] = Field(description="The input's specification. Only a restart with an equal one continues the run.")
    images: int = Field(description="Rows of the frozen manifest.")
    status: Literal["planned", "committed"] = "planned"
    planned_at: datetime
    committed_at: datetime | None = None
    model_id: str | None = None
    weights: str | None = None
    starts: tuple[Start, ...] = ()
    statuses: dict[str, int] | None = Field(default=None, description="Images by status; written right before the commit.")
    categories: dict[str, int] | None = Field(default=None, description="Likely instances (`LIKELY_SCORE`) by category.")
    categories_stored: dict[str, int] | None = Field(default=None, description="Instances in the table by category.")
    dropped_at: datetime | None = None
    dropped_by: str | None = Field(default=None, description="user@host of the process that dropped the run.")

    @property
    def seconds(self) -> float | None:
        """Duration of labelling, over all starts; None if the record has none."""
        return sum(start.seconds for start in self.starts) if self.starts else None

    @property
    def gpu_hours(self) -> float | None:
        """Hours of labelling times GPUs, over all starts; None if the record has none."""
        return sum(start.seconds * start.gpus for start in self.starts) / 3600 if self.starts else None

    @property
    def cost(self) -> float | None:
        """Hours of labelling times price, over all starts; None unless each start has a price."""
        prices = [start.price_per_hour for start in self.starts]
        if not prices or None in prices:
            return None
        return sum(start.seconds * (start.price_per_hour or 0.0) for start in self.starts) / 3600


def this_user() -> str:
    """Returns user@host of this process, with the user's number if it has no name, as in many containers."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # KeyError before Python 3.13
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


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
