"""Curves are a PNG with a line for each loss and score, whatever the run measured."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from masklake.pipeline.training.curves import training_curves

HISTORY = [
    {"epoch": 1, "losses": {"loss": 3.0, "mask": 1.0}},
    {"epoch": 2, "losses": {"loss": 2.0, "mask": 0.5}, "ap": {"mask AP": 0.3, "keypoint AP": None}},
]


@pytest.mark.parametrize("history", [HISTORY, HISTORY[:1], []])
def test_a_png_of_the_stated_size(history: list[dict[str, object]]) -> None:
    image = Image.open(io.BytesIO(training_curves(history, "run")))
    assert (image.format, image.size) == ("PNG", (1200, 480))


def ink(history: list[dict[str, object]]) -> int:
    return int((np.asarray(Image.open(io.BytesIO(training_curves(history, "run"))).convert("L")) < 200).sum())


def test_more_history_draws_more() -> None:
    assert ink(HISTORY) > ink([]) + 500


def test_no_line_joins_epochs_in_which_other_parts_learnt() -> None:
    phases = [{**row, "learn": learn} for row, learn in zip(HISTORY, ("rpn", "detector"), strict=True)]
    joint = [{**row, "learn": "joint"} for row in HISTORY]
    assert ink(phases) < ink(joint) == ink(HISTORY)


def test_the_recall_of_proposals_is_drawn_with_the_scores() -> None:
    recall = {**HISTORY[0], "recall": {"proposal AR100": 0.2}}
    assert ink([recall, HISTORY[1]]) > ink(HISTORY)
