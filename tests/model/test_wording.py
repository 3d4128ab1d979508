"""Counts in messages read as English sentences do, and names cannot break a line."""

from __future__ import annotations

import pytest

from masklake.model.wording import agreeing, counted, counted_of, one_of, printable


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (2, "image", "2 images"),
        (999, "image", "999 images"),
        (3109, "image", "3,109 images"),
        (1, "box", "1 box"),
        (5, "box", "5 boxes"),
        (1, "category", "1 category"),
        (1203, "category", "1,203 categories"),
        (2, "class", "2 classes"),
        (3, "epoch", "3 epochs"),
        (2, "replay", "2 replays"),
        (2, "model replica", "2 model replicas"),
        (1, "CPU", "1 CPU"),
        (8, "CPU", "8 CPUs"),
    ],
)
def test_a_noun_follows_its_count(count: int, noun: str, text: str) -> None:
    assert counted(count, noun) == text


def test_a_phrase_brings_its_verb_along() -> None:
    phrases = ("image was lost with its worker", "images were lost with their workers")
    assert counted(1, *phrases) == "1 image was lost with its worker"
    assert counted(1200, *phrases) == "1,200 images were lost with their workers"
    assert [agreeing(count, "is", "are") for count in (0, 1, 2)] == ["are", "is", "are"]
    assert [agreeing(count, "such as ", "") for count in (1, 2)] == ["such as ", ""], "an empty phrase is one, too"


def test_a_part_names_its_whole() -> None:
    assert counted_of(2, 3109, "image") == "2 of the 3,109 images"
    assert counted_of(1, 2, "box") == "1 of the 2 boxes"
    assert counted_of(1, 1, "category") == "the only category"


def test_alternatives_are_a_phrase() -> None:
    assert [one_of(["a"]), one_of(["a", "b"]), one_of(["a", "b", "c"])] == ["a", "a or b", "a, b or c"]


def test_a_name_stays_on_its_line_and_colours_nothing() -> None:
    assert printable("a\nb\r\x1b[31m\udcff.jpg") == r"a\nb\r\x1b[31m\udcff.jpg"
    assert printable("Ünïcode, 写真.jpg") == "Ünïcode, 写真.jpg"
