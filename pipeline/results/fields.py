"""Defaults and limits of an evaluation, without pydantic (see `model.fields`)."""

MAX_DETS = (1, 10, 100)
"""COCO's maximum numbers of detections per image."""

MOST_DETECTIONS = 1_000_000
"""Maximum of each of `max_dets`: the evaluator counts in 32 bits."""
