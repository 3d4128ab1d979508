"""Images alone: what a death says about the image that was in hand, and what it does not."""

from __future__ import annotations

import pytest

from jobs.trials import DEATHS, Trials


def run(trials: Trials, deadly: set[int], with_node: bool = False) -> list[int]:
    """Try all images in turn; the order in which they were tried."""
    order = []
    while len(trials):
        order.append(trials.next())
        if order[-1] in deadly:
            trials.died(order[-1], with_node=with_node)
    return order


def test_an_image_is_crashed_after_three_deaths_and_the_others_get_through() -> None:
    trials = Trials(range(4))
    assert run(trials, deadly={1}) == [0, 1, 2, 3, 1, 1]
    assert trials.crashed == [1]


def test_one_death_from_outside_is_no_evidence() -> None:
    trials = Trials(range(3))
    for _ in range(DEATHS - 1):
        assert trials.next() == 0
        trials.died(0, with_node=False)  # an operator's kill, while this image was in hand
        assert [trials.next(), trials.next()] == [1, 2]
        for image in (1, 2):
            trials.died(image, with_node=True)
    assert trials.crashed == []
    assert sorted(run(trials, deadly=set())) == [0, 1, 2]
    assert trials.crashed == []


def test_a_node_that_died_says_nothing_about_an_image() -> None:
    trials = Trials([7])
    for _ in range(5 * DEATHS):
        trials.died(trials.next(), with_node=True)
    assert trials.crashed == []
    assert len(trials) == 1


def test_nothing_waits_when_all_were_tried() -> None:
    trials = Trials([])
    assert len(trials) == 0
    with pytest.raises(IndexError):
        trials.next()
