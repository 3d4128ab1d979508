"""COCO annotation files: reading, checking and writing."""
