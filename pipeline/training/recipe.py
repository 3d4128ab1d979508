"""Optimiser, learning rate and schedule of a training run; the default is the paper's recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from pydantic import BaseModel, ConfigDict, field_validator
from torch import nn

from masklake.pipeline.training.fields import RecipeFields

MOST_WARMUP = 0.1
"""Maximum share of the warm-up in a run, for short runs."""


class Recipe(BaseModel, RecipeFields, frozen=True):
    """Optimiser, learning rate and its schedule. Defaults: Mask R-CNN, section 3.1, with Detectron2's shorter warm-up.

    A learning rate belongs to a number of images per step: `learning_rate` is for `reference_batch`, and is scaled linearly to
    that of the run (Goyal et al. 2017), so that more workers or larger batches need no other recipe.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("milestones")
    @classmethod
    def _in_order(cls, milestones: tuple[float, ...]) -> tuple[float, ...]:
        if list(milestones) != sorted(set(milestones)):
            raise ValueError("each share must be greater than the one before")
        return milestones


PAPER = Recipe()

TINY = Recipe(
    optimizer="adamw",
    learning_rate=1e-3,
    reference_batch=None,
    weight_decay=0.01,
    clip_norm=5.0,
    warmup_steps=50,
    warmup_factor=0.05,
    schedule="cosine",
    epochs=12,
    batch_size=2,
)
"""For training from random weights on a CPU. On generated shapes, batches of 2 gave better results than batches of 4 in the
same time.
"""

RECIPES: Mapping[str, Recipe] = MappingProxyType({"tiny": TINY})
"""Recipes by preset; every other preset uses the paper's."""


def recipe_of(preset: str) -> Recipe:
    """Returns the default recipe of a preset."""
    return RECIPES.get(preset, PAPER)


def peak_rate(recipe: Recipe, images_per_step: int) -> float:
    """Returns the peak learning rate of a run with this many images per step, on all workers together."""
    scale = images_per_step / recipe.reference_batch if recipe.reference_batch else 1.0
    return recipe.learning_rate * scale


def rate_factor(recipe: Recipe, step: int, steps: int) -> float:
    """Returns the factor of the peak rate at `step` (from 0) of `steps`: linear warm-up, then milestones or half a cosine."""
    warmup = min(recipe.warmup_steps, int(MOST_WARMUP * steps))
    growth = recipe.warmup_factor + (1 - recipe.warmup_factor) * step / warmup if step < warmup else 1.0
    if recipe.schedule == "cosine":
        return growth * 0.5 * (1 + math.cos(math.pi * step / steps))
    return growth * recipe.gamma ** sum(step >= share * steps for share in recipe.milestones)


def build_optimizer(model: nn.Module, recipe: Recipe, rate: float) -> torch.optim.Optimizer:
    """Returns the optimiser of the trainable parameters. `set_rate` sets its rate at every step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(recipe.momentum, 0.999), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip(parameters: Iterable[nn.Parameter], recipe: Recipe) -> None:
    """Scales the gradients so that their total norm is at most `clip_norm`."""
    if recipe.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(list(parameters), recipe.clip_norm)
