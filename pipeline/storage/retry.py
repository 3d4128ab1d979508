"""Retries while a store is busy: a step after hours of work must not fail because of a single 503."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from masklake.pipeline.errors import StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds between attempts: one minute in total, on top of each client's own retries per request."""


def patiently(step: Callable[[], T]) -> T:
    """Returns the result of `step`, which is repeated while it raises a StorageError that `may_pass`. Raises the last one.

    It must be safe to repeat the step.
    """
    for pause in PAUSES_S:
        try:
            return step()
        except StorageError as error:
            if not error.may_pass:
                raise
            logger.warning("%s; trying again in %.0f s", error, pause)
        time.sleep(pause)
    return step()
