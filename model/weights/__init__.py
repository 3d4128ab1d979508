"""Weights of any origin: MaskLake's checkpoints, torchvision's and Detectron2's files, and the names of models."""
