"""What a device asks of the machine it is in: said once, before the first image, and not by every image that fails."""

from __future__ import annotations

import os
import shutil

import torch

from model.errors import ConfigError


def check_device(device: str | torch.device) -> torch.device:
    """The device, when this machine can run a model on it.

    Raises ConfigError where it names a CUDA device and torch finds none, or no C compiler is there: Triton builds a small
    launcher for each kernel when that first runs.
    """
    chosen = torch.device(device)
    if chosen.type != "cuda":
        return chosen
    if not torch.cuda.is_available():
        raise ConfigError(f"device {chosen}: torch {torch.__version__} finds no CUDA device here; use the device cpu")
    if c_compiler() is None:
        raise ConfigError(
            f"device {chosen}: Triton needs a C compiler to launch kernels and finds none; install gcc, or name one in CC"
        )
    return chosen


def c_compiler() -> str | None:
    """The C compiler that Triton would take, by its order: CC, gcc, clang."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
