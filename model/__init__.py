"""Mask R-CNN in pure PyTorch: knows no Ray, no Parquet and no URI."""
