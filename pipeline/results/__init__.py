"""Evaluation and display of labels: COCO metrics, mean IoU, drawings."""
