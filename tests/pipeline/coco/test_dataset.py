"""Every reason for which something of a COCO file is left out."""

from __future__ import annotations

from masklake.pipeline.coco.dataset import (
    MISSING_FILE,
    OUTSIDE,
    REPEATED_IMAGE,
    REPEATED_ROW,
    UNUSABLE_IMAGE,
    ZERO_AREA,
    counted_reason,
)


def test_every_reason_has_words_for_one() -> None:
    assert counted_reason(1, OUTSIDE) == "1 box outside its image"
    for reason in (REPEATED_IMAGE, REPEATED_ROW, ZERO_AREA, OUTSIDE, MISSING_FILE, UNUSABLE_IMAGE):
        assert counted_reason(2, reason) == f"2 {reason}"
        assert counted_reason(1, reason) != f"1 {reason}"
