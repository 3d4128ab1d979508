"""The outcome of an image: the table's `status`."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """The outcome of one image."""

    OK = "ok"
    MISSING = "missing"
    FETCH_ERROR = "fetch_error"
    DECODE_ERROR = "decode_error"
    TOO_LARGE = "too_large"
    CRASHED = "crashed"
    MODEL_ERROR = "model_error"


FINAL_STATUSES = frozenset({Status.OK, Status.DECODE_ERROR, Status.TOO_LARGE, Status.CRASHED})
"""Statuses that the same bytes would get again: the next run skips these images and retries the others."""

ERROR_LENGTH = 300
"""Maximum number of characters of another library's message in the `error` of a row."""
