"""Counts of instances for display: likely ones, and all stored ones."""

from __future__ import annotations

from masklake.model.wording import counted
from masklake.pipeline.table.fields import LIKELY_SCORE


def counted_instances(likely: int, stored: int) -> str:
    """Returns both numbers, likely ones first: `3,109 instances of score >= 0.5, 9,348 stored`."""
    return f"{counted(likely, 'instance')} of score >= {LIKELY_SCORE:g}, {stored:,} stored"
