"""The limits of an evaluation, without pydantic (see `model.fields`)."""

MOST_DETECTIONS = 1_000_000
"""Maximum of each of `max_dets`: the evaluator counts in 32 bits."""
