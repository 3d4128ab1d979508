"""Mask R-CNN in pure PyTorch: knows no Ray, no Parquet and no URI."""

from model.build import create_model
from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import Category, ModelConfig, PredictOptions
from model.instances import Instances, Target
from model.mask_rcnn import MaskRCNN
from model.presets import PRESETS

__all__ = [
    "PRESETS",
    "Category",
    "Instances",
    "MaskRCNN",
    "ModelConfig",
    "PredictOptions",
    "Target",
    "create_model",
    "load_checkpoint",
    "save_checkpoint",
]
