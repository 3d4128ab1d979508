"""Says why an epoch begins again: Ray Train restarts its workers silently."""

from __future__ import annotations

from typing import Any

import ray.train

from masklake.jobs.cluster.connection import last_line
from masklake.jobs.training.messages import reported_failure


class Restarts(ray.train.UserCallback):
    """Says that workers ended and start again. Ray Train calls it in its controller's process."""

    def __init__(self, messages: Any, max_failures: int) -> None:
        self._messages = messages
        self._max_failures = max_failures
        self._failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Shows a line, unless the run ends now: its last error is for the driver to say."""
        self._failures += 1
        if self._failures > self._max_failures or reported_failure(self._messages) is not None:
            return
        rank, error = min(worker_exceptions.items(), key=lambda item: item[0])
        self._messages.say.remote(
            f"worker {rank} ended ({last_line(error)}); the workers start again (restart {self._failures} of "
            f"{self._max_failures}) after the last complete epoch"
        )
