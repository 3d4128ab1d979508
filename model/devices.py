"""Devices: requirements, arithmetic, and transfers between host and device that avoid waiting.

A GPU runs behind the host, which only queues work. A plain copy, even of three constants, makes the host wait until all earlier
work is done, and the GPU then waits for the host. So constants are cached, small tables are copied through pinned memory, and
results are copied back together.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from masklake.model.errors import ConfigError
from masklake.model.fields import Precision


def check_device(device: str | torch.device) -> torch.device:
    """Returns the device if this machine can run a model on it.

    Raises ConfigError for a CUDA device if torch finds none, or if there is no C compiler: Triton builds a small launcher for
    each kernel at its first run.
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
    """Returns the C compiler that Triton would use, in its order: CC, gcc, clang."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def constant(values: Sequence[float], device: torch.device) -> Tensor:
    """Returns float32 (n,), created once per device; must not be written to."""
    return _constant(tuple(values), device)


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # tensors made in inference mode cannot be used in training
        return torch.tensor(values, dtype=torch.float32, device=device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on the device; a copy from the host is asynchronous."""
    if tensor.device == device or device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Context manager: float32 products have the same precision everywhere on a GPU, and convolutions use deterministic
    algorithms.

    By torch's defaults, convolutions round their factors to TF32's 10 bits while a 1x1 convolution computed as a matrix product
    does not.
    """
    if device.type != "cuda":
        yield
        return
    wanted = "tf32" if precision == "tf32" else "ieee"
    # The setting of recurrent layers changes, too, because torch refuses to return `allow_tf32` while the two differ.
    cudnn: Any = torch.backends.cudnn  # its attributes are created at run time
    products = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [part.fp32_precision for part in products]
    algorithms = cudnn.benchmark, cudnn.deterministic
    try:
        for part in products:
            part.fp32_precision = wanted
        cudnn.benchmark, cudnn.deterministic = False, True  # a benchmark may choose another algorithm each time
        yield
    finally:
        for part, value in zip(products, before, strict=True):
            part.fp32_precision = value
        cudnn.benchmark, cudnn.deterministic = algorithms


def resolved(precision: Precision | Literal["auto"], device: torch.device) -> Precision:
    """Returns the precision that `auto` stands for on this device."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Returns tensors of one device on the host, with a single copy. Give wider dtypes first, so that all are aligned."""
    if tensors[0].device.type == "cpu":
        return list(tensors)
    together = torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in tensors]).cpu()
    parts = torch.split(together, [t.nbytes for t in tensors])
    return [part.view(t.dtype).view(t.shape) for part, t in zip(parts, tensors, strict=True)]
