"""Mask R-CNN as a distributed image pipeline: train on Ray, label a bucket, query a table of masks."""
