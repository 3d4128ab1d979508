"""Whether a CSV list begins with its columns' names or with its first image, which must not be lost as one.

A field that ends like an image's name decides. Where names have no suffix, rows that differ in their numbers alone do:
`IMG_001,cat` above `IMG_002,dog` is no header. A number by itself says less than a name with one: columns may be called `0` or
`2023`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from masklake.pipeline.inputs.suffixes import looks_like_image

_NUMBER = re.compile(r"[+-]?[\d.,]+")


def is_headless(first: Sequence[str], second: Sequence[str], wanted: str | None) -> bool:
    """Whether a list's first row names an image, and no columns.

    first, second: its first rows, without spaces around their fields; the second is empty where there is none. wanted: the
    column that was asked for, by its name or, where there is no header, by its number.
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
    """The numbers, from 1, of the columns that may name the images of a list without a header: one, if that is clear.

    They are those whose first field ends like an image's name; if none does, those with paths; then those with names that count
    on; then all.
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


def _alike(first: Sequence[str], second: Sequence[str]) -> list[bool]:
    """For each field of a first row whether the one below differs in its numbers alone: `photos/000` and `photos/001`."""
    below = [*second, *[""] * len(first)]
    return [bool(re.search(r"\d", one)) and _form(one) == _form(two) for one, two in zip(first, below, strict=False)]


def _form(field: str) -> str:
    return re.sub(r"\d+", "0", field.strip())


def _is_path(first: Sequence[str], wanted: str | None) -> bool:
    """Whether a column was asked for by a number, and its first field is a path."""
    return any("/" in field for number, field in enumerate(first, 1) if str(number) == wanted)
