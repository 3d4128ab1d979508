"""Steps that wait out a store's bad minute: what follows hours of work must not fail by one 503."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from masklake.pipeline.errors import StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Between the attempts: a minute in all, on top of what each client does for each request."""


def patiently(step: Callable[[], T]) -> T:
    """The step's answer. It runs again while its StorageError `may_pass`, so repeating it must do no harm; raises the last."""
    for pause in PAUSES_S:
        try:
            return step()
        except StorageError as error:
            if not error.may_pass:
                raise
            logger.warning("%s; trying again in %.0f s", error, pause)
        time.sleep(pause)
    return step()
