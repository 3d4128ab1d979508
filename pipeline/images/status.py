"""What becomes of an image: the table's `status`."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """What became of one image."""

    OK = "ok"
    MISSING = "missing"
    FETCH_ERROR = "fetch_error"
    DECODE_ERROR = "decode_error"
    TOO_LARGE = "too_large"
    CRASHED = "crashed"
    MODEL_ERROR = "model_error"


FINAL_STATUSES = frozenset({Status.OK, Status.DECODE_ERROR, Status.TOO_LARGE, Status.CRASHED})
"""The same bytes would end the same way: the next run leaves these alone. The others are tried again."""
