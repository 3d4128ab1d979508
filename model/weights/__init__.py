"""Weights from any source: MaskLake's checkpoints, and files of torchvision and Detectron2."""
