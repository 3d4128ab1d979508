"""Masks in packed forms: COCO run-length encodings, and bits of training masks."""
