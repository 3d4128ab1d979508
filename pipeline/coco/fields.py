"""Limits of a COCO file's faults that options need, without pydantic (see `model.fields`)."""

MOST_UNUSABLE = 0.05
"""Default maximum share of instances (or of images, if images may be left out) that may be left out."""
