"""Registers our operators with torch, like `torch.library.custom_op` but without its cost.

Operators of that decorator load torch's compiler at their first call, in every process that labels an image.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "masklake"

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""The function of each operator, by the operator's name, for calls below torch's dispatcher."""


def register(
    run: Callable[..., Any],
    fake: Callable[..., Any],
    keep: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
) -> Any:
    """Registers a function as the operator `torch.ops.masklake.<name>`, without its leading underscore; returns the operator.

    run: the implementation for every device; its annotations are the schema. It returns new tensors and modifies none. fake:
    returns results with the right shapes, strides and dtypes for tensors without data. keep, differentiate: `setup_context` and
    `backward` of `torch.library.register_autograd`; without them, differentiating is an error.
    """
    name = f"{NAMESPACE}::{run.__name__.removeprefix('_')}"

    def refuse(ctx: Any, *grads: Any) -> None:  # gradients themselves and the edges of masks
        raise NotImplementedError(f"{name} cannot be differentiated")

    IMPLEMENTATIONS[name] = run
    schema = torch.library.infer_schema(run, mutates_args=())
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", _uncompiled(run))
    torch.library.register_fake(name, fake)
    torch.library.register_autograd(name, differentiate or refuse, setup_context=keep)
    return getattr(getattr(torch.ops, NAMESPACE), name.split("::")[1]).default


def _uncompiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function, excluded from torch.compile if that is loaded."""

    def apart(*arguments: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            return torch.compiler.disable(run)(*arguments)
        return run(*arguments)

    return apart
