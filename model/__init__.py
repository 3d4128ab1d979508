"""Mask R-CNN in pure PyTorch: knows no Ray, no Parquet and no URI.

The names below are imported when first used: `model.errors` and `model.config` serve the command line without torch, whose
import takes seconds.
"""

from __future__ import annotations

import ctypes
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from masklake.model.config import Category, ModelConfig, PredictOptions
    from masklake.model.create import create_model
    from masklake.model.detector import Detector, load_detector
    from masklake.model.instances import Instances, Target
    from masklake.model.mask_rcnn import MaskRCNN
    from masklake.model.presets import PRESETS
    from masklake.model.weights.checkpoint import load_checkpoint, save_checkpoint

# torch allocates every large map anew, and the kernel maps its pages one by one: first writes to 62 MB took 26 ms, with huge
# pages 7 ms. torch reads this at its first allocation, so it must be set before torch is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

KEPT_BYTES = 1 << 30
"""Size of freed memory up to which glibc keeps it."""


def _keep_freed_memory() -> None:
    """Makes glibc reuse freed memory, up to KEPT_BYTES, instead of returning it to the kernel and mapping it again page by
    page.

    The outputs of all layers are such memory: images of 480 x 640 took 2.2 s instead of 2.6 s in float32 (means of six runs
    each, alternating, on two cores) with 4 % more resident memory. Thresholds in the environment take precedence.
    """
    thresholds = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}  # numbers of malloc.h
    process = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(process, "mallopt"):
        for name, option in thresholds.items():
            if name not in os.environ:
                process.mallopt(option, KEPT_BYTES)


_keep_freed_memory()

_HOME = {
    "PRESETS": "masklake.model.presets",
    "Category": "masklake.model.config",
    "Detector": "masklake.model.detector",
    "Instances": "masklake.model.instances",
    "MaskRCNN": "masklake.model.mask_rcnn",
    "ModelConfig": "masklake.model.config",
    "PredictOptions": "masklake.model.config",
    "Target": "masklake.model.instances",
    "create_model": "masklake.model.create",
    "load_checkpoint": "masklake.model.weights.checkpoint",
    "load_detector": "masklake.model.detector",
    "save_checkpoint": "masklake.model.weights.checkpoint",
}

__all__ = [
    "PRESETS",
    "Category",
    "Detector",
    "Instances",
    "MaskRCNN",
    "ModelConfig",
    "PredictOptions",
    "Target",
    "create_model",
    "load_checkpoint",
    "load_detector",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Imports an exported name from its module (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
