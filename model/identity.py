"""A model's name: what a table row says it was labelled by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from model.config import ModelConfig


def model_id(config: ModelConfig, state: Mapping[str, Tensor]) -> str:
    """Preset name, a dash and the first 12 hex digits of the SHA-256 over the configuration and every weight.

    The same on every device and for every order of `state`.
    """
    digest = hashlib.sha256(config.model_dump_json().encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"{config.preset}-{digest.hexdigest()[:12]}"
