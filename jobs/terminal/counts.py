"""How instances are counted for people: what is likely in the pictures, and what is stored."""

from __future__ import annotations

from masklake.model.wording import counted
from masklake.pipeline.table.schema import LIKELY_SCORE


def counted_instances(likely: int, stored: int) -> str:
    """Both numbers, that of likely ones first: `3,109 instances of score >= 0.5, 9,348 stored`."""
    return f"{counted(likely, 'instance')} of score >= {LIKELY_SCORE:g}, {stored:,} stored"
