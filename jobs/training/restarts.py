"""Says why an epoch begins again: Ray Train restarts its workers silently."""

from __future__ import annotations

from typing import Any

import ray
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
        """Shows a line, unless the run ends now: the driver reports the last error."""
        self._failures += 1
        if self._failures > self._max_failures or reported_failure(self._messages) is not None:
            return
        rank, error = min(worker_exceptions.items(), key=lambda item: item[0])
        self._messages.say.remote(
            f"worker {rank} ended ({_cause(error)}); training starts again (restart {self._failures} of "
            f"{self._max_failures}) after the last complete epoch"
        )


def _cause(error: Exception) -> str:
    """Returns why a worker ended. Ray's words for one that does not answer hold its network library's error codes."""
    if isinstance(getattr(error, "health_check_failure", error), ray.exceptions.ActorUnavailableError):
        return "it cannot be reached: its process or its node is lost"
    return last_line(error)
