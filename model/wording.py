"""Text in messages: counts (`1 image`, `3,109 images`, `2 of the 31 images`, `the only image`), percentages, alternatives,
and names on one line.
"""

from __future__ import annotations

from collections.abc import Sequence


def agreeing(count: int, one: str, many: str | None = None) -> str:
    """Returns the word or phrase that agrees with a count: `one` for 1, else `many`, by default the plural of `one`.

    `agreeing(3, "category")` is `categories`, `agreeing(1, "is", "are")` is `is`.
    """
    if count == 1:
        return one
    return _plural(one) if many is None else many


def counted(count: int, one: str, many: str | None = None) -> str:
    """Returns the count, with commas from 1,000 on, and the noun or phrase that agrees with it, as in `agreeing`.

    `counted(1, "box")` is `1 box`; a verb comes with its noun: `counted(n, "image was lost", "images were lost")`.
    """
    return f"{count:,} {agreeing(count, one, many)}"


def counted_of(part: int, whole: int, one: str) -> str:
    """Returns a part of a known number: `2 of the 31 images`; `the only image` if there is only one.

    A verb that follows agrees with `part`.
    """
    return f"the only {one}" if part == whole == 1 else f"{part:,} of the {counted(whole, one)}"


def percent(value: float | None) -> str:
    """Returns a score of 0..1 as a percentage with one decimal, as papers write it; "-" for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def one_of(names: Sequence[str]) -> str:
    """Returns alternatives as a phrase: `a`, `a or b`, `a, b or c`."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def printable(text: str) -> str:
    r"""Returns the text on one line: each character that would break the line, move the cursor or colour the terminal appears
    as its escape, as in `line\nbreak.jpg`. Names of files may contain any of them.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _plural(noun: str) -> str:
    """Returns the plural of a regular noun: images, epochs, boxes, classes, categories. Nouns in -ch or -sh may need their
    own.
    """
    if noun.endswith(("s", "x")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"
