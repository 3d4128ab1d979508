"""Masks in compact forms: COCO run-length encodings, and bits for training masks."""
