"""Matching against hand-worked overlaps, and what is drawn."""

from __future__ import annotations

import torch

from masklake.model.sampling import BACKGROUND, IGNORED, match, sample

TRUTH = torch.tensor([[0.0, 0, 10, 10], [100, 100, 120, 120]])


def test_overlap_decides_between_foreground_ignored_and_background() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 5], [0, 0, 10, 1], [50, 50, 60, 60], [100, 100, 120, 120]])
    assert match(TRUTH, boxes, 0.7, 0.3, keep_best=False).tolist() == [0, IGNORED, BACKGROUND, BACKGROUND, 1]


def test_the_best_boxes_of_a_truth_are_foreground_at_any_overlap() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 2], [0, 0, 10, 1], [0, 8, 10, 10], [100, 100, 105, 105]])
    assert match(TRUTH, boxes, 0.7, 0.3, keep_best=True).tolist() == [0, BACKGROUND, 0, 1]


def test_a_truth_that_overlaps_nothing_claims_nothing() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    assert match(TRUTH, boxes, 0.7, 0.3, keep_best=True).tolist() == [0, BACKGROUND]


def test_without_truth_everything_is_background() -> None:
    assert match(torch.zeros(0, 4), TRUTH, 0.5, 0.5, keep_best=True).tolist() == [BACKGROUND, BACKGROUND]


def test_a_sample_holds_at_most_its_share_of_foreground_and_no_ignored() -> None:
    matched = torch.tensor([3] * 50 + [BACKGROUND] * 100 + [IGNORED] * 50)
    positive, negative = sample([matched], 40, 0.25)[0]
    assert len(positive) == 10
    assert len(negative) == 30
    assert (matched[positive] == 3).all()
    assert (matched[negative] == BACKGROUND).all()


def test_missing_foreground_is_filled_with_background() -> None:
    positive, negative = sample([torch.tensor([0] + [BACKGROUND] * 100)], 40, 0.25)[0]
    assert (len(positive), len(negative)) == (1, 39)
