"""Retries while a store is busy: a step that follows hours of work must not fail because of one 503."""

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
    """Returns the result of `step`, repeating it while its StorageError `may_pass`; raises the last one. Repeating must do no
    harm.
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
