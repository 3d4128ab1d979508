"""COCO annotation files, checked number by number."""
