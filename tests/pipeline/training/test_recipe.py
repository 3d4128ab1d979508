"""Schedules by their definition; the optimiser decays what it should."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from masklake.pipeline.training.augmentation import Augmentation
from masklake.pipeline.training.recipe import PAPER, TINY, Recipe, build_optimizer, clip, peak_rate, rate_factor, recipe_of

NAN, INF = float("nan"), float("inf")


def test_the_papers_values_are_the_default() -> None:
    assert recipe_of("maskrcnn_resnet50_fpn") == PAPER
    assert (PAPER.optimizer, PAPER.learning_rate, PAPER.momentum, PAPER.weight_decay) == ("sgd", 0.02, 0.9, 1e-4)
    assert recipe_of("tiny") == TINY


def test_the_rate_is_scaled_by_the_images_of_a_step() -> None:
    assert peak_rate(PAPER, 16) == pytest.approx(0.02)
    assert peak_rate(PAPER, 4) == pytest.approx(0.005)
    assert peak_rate(Recipe(reference_batch=None), 4) == pytest.approx(0.02)


def test_steps_warm_up_and_drop_at_their_milestones() -> None:
    recipe = Recipe(warmup_steps=100, warmup_factor=0.1)
    assert rate_factor(recipe, 0, 12_000) == pytest.approx(0.1)
    assert rate_factor(recipe, 50, 12_000) == pytest.approx(0.55)
    assert rate_factor(recipe, 100, 12_000) == 1.0
    assert rate_factor(recipe, 7_999, 12_000) == 1.0
    assert rate_factor(recipe, 8_000, 12_000) == pytest.approx(0.1)
    assert rate_factor(recipe, 11_999, 12_000) == pytest.approx(0.01)


def test_a_short_run_warms_up_for_a_tenth_of_it() -> None:
    assert rate_factor(Recipe(), 4, 50) < 1.0
    assert rate_factor(Recipe(), 5, 50) == 1.0


def test_a_cosine_ends_near_zero() -> None:
    recipe = Recipe(schedule="cosine", warmup_steps=0)
    assert rate_factor(recipe, 0, 100) == 1.0
    assert rate_factor(recipe, 50, 100) == pytest.approx(0.5)
    assert rate_factor(recipe, 99, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))


def test_adamw_leaves_out_norms_and_biases_and_nothing_frozen_is_touched() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.GroupNorm(2, 4), torch.nn.Conv2d(4, 4, 1))
    model[2].requires_grad_(False)
    decayed, plain = build_optimizer(model, Recipe(optimizer="adamw", weight_decay=0.1), 0.0).param_groups
    assert ([p.ndim for p in decayed["params"]], decayed["weight_decay"]) == ([4], 0.1)
    assert ([p.ndim for p in plain["params"]], plain["weight_decay"]) == ([1, 1, 1], 0.0)
    (all_of_them,) = build_optimizer(model, PAPER, 0.0).param_groups
    assert len(all_of_them["params"]) == 4


def test_gradients_are_clipped_together() -> None:
    weights = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.full((3,), 10.0)
    clip(weights, Recipe(clip_norm=1.0))
    assert torch.cat([w.grad for w in weights if w.grad is not None]).norm() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            (name, value)
            for name in ("learning_rate", "weight_decay", "clip_norm", "momentum", "gamma")
            for value in (NAN, INF)
        ),
        ("learning_rate", 0),
        ("milestones", [0.5, NAN]),
        ("milestones", [0.9, 0.5]),
        ("milestones", [0.5, 0.5]),
        ("milestones", [0, 0.5]),
        ("milestones", [8, 11]),
        ("epochs", 0),
        ("epochs", 10**9),
        ("batch_size", 10**9),
    ],
)
def test_numbers_without_a_meaning_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        Recipe.model_validate({field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("scale", value) for value in ([0, 1], [1.5, 0.5], [-1, 1], [NAN, 1], [1, INF], [1, 1e6], [1], [])),
        ("crop", 31),
        ("crop", 10**9),
    ],
)
def test_augmentations_that_cannot_be_drawn_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        Augmentation.model_validate({field: value})
    assert Augmentation(scale=(0.5, 0.5)).scale == (0.5, 0.5)
