"""Decides whether the first row of a CSV list is a header or an image, which must not be lost, and whether a text list has
columns.

A row with a field that ends like the name of an image is not a header. If names have no suffix, neither is a row that differs
from the next only in numbers: `IMG_001,cat` above `IMG_002,dog`. A bare number is weaker evidence than a name with a number,
since columns may be called `0` or `2023`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from masklake.pipeline.inputs.suffixes import IMAGE_SUFFIXES, looks_like_image

_LOOKED_AT = 20
"""Number of lines of a text list that are checked."""
_NUMBER = re.compile(r"[+-]?[\d.,]+")


def is_headless(first: Sequence[str], second: Sequence[str], wanted: str | None) -> bool:
    """Returns whether the first row of a list names an image rather than columns.

    first, second: the first rows, with spaces around fields stripped; `second` is empty if there is none. wanted: the requested
    column, by name or, without a header, by number.
    """
    if "uri" in map(str.casefold, first):
        return False
    alike = _alike(first, second)
    names_alike = any(same and not _NUMBER.fullmatch(field) for field, same in zip(first, alike, strict=True))
    if wanted is not None and wanted in first:  # a column's name, unless the rows say that it is an image's or a number
        return alike[first.index(wanted)] and (names_alike or all(alike))
    alone = len(first) == 1 and ("/" in first[0] or first[0].isdecimal())
    return names_alike or all(alike) or alone or any(map(looks_like_image, first)) or _is_path(first, wanted)


def images_columns(first: Sequence[str], second: Sequence[str]) -> list[int]:
    """Returns the numbers (from 1) of the columns that may contain image names in a list without a header; only one if that is
    clear.

    Candidates are the columns whose first field ends like the name of an image; if there are none, those with paths; then those
    with consecutive names; then all.
    """
    alike = _alike(first, second)
    kinds = (
        [looks_like_image(field) for field in first],
        ["/" in field for field in first],
        [same and not _NUMBER.fullmatch(field) for field, same in zip(first, alike, strict=True)],
        [True for _ in first],
    )
    kind = next(kind for kind in kinds if any(kind))
    return [number for number, chosen in enumerate(kind, 1) if chosen]


def columns_sign(head: str) -> str | None:
    """Returns the separator of columns in the first lines of a text list; None if each line may be a name.

    Names may contain any separator. Lines have columns if a field of each line ends like the name of an image but no line does,
    as in `a.jpg 3`. With tabs, which names hardly contain, it suffices that a field does.
    """
    whole = head[: head.rfind("\n")] if "\n" in head else head
    lines = [line for line in whole.splitlines() if line.strip() and not line.startswith("#")][:_LOOKED_AT]
    for sign in "\t,; ":
        rows = [[_is_image(field) for field in line.strip().split(sign)] for line in lines]
        if rows and all(len(row) > 1 and any(row) and (sign == "\t" or not row[-1]) for row in rows):
            return sign
    return None


def _is_image(field: str) -> bool:
    return field.strip().lower().endswith(IMAGE_SUFFIXES)


def _alike(first: Sequence[str], second: Sequence[str]) -> list[bool]:
    """Returns for each field of a first row whether the one below differs only in numbers: `photos/000` and `photos/001`."""
    below = [*second, *[""] * len(first)]
    return [bool(re.search(r"\d", one)) and _form(one) == _form(two) for one, two in zip(first, below, strict=False)]


def _form(field: str) -> str:
    return re.sub(r"\d+", "0", field.strip())


def _is_path(first: Sequence[str], wanted: str | None) -> bool:
    """Returns whether the requested column is a number, and its first field is a path."""
    return any("/" in field for number, field in enumerate(first, 1) if str(number) == wanted)
