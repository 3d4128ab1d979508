"""What a mistyped path may have meant: names beside it that look alike."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from masklake.model.errors import MaskLakeError
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import parent

_ALIKE = 0.6  # of difflib's ratio: `labels` is 0.92 like `lables`, 0.55 like `photos`
_CHOICES = 5


def first_missing(storage: Storage, uri: str) -> str:
    """The outermost folder on the way to `uri` that is not there; `uri` itself where only that is missing."""
    while (above := parent(uri)) != uri and not storage.exists(above):
        uri = above
    return uri


def near(storage: Storage, missing: str, wanted: str, is_right: Callable[[str], bool]) -> str | None:
    """A folder that exists and that `wanted` may have meant, `missing` being the first part of it that is not there.

    One that ``is_right`` is preferred to one whose name is more alike. None where no name is alike, or nothing can be listed.
    """
    above, rest = parent(missing), wanted[len(missing) :]
    name = missing.rpartition("/")[2]
    try:
        names = {folder.casefold(): folder for folder in storage.folders(above)}
        alike = difflib.get_close_matches(name.casefold(), names, _CHOICES, _ALIKE)
        places = [place for match in alike if storage.exists(place := storage.join(above, names[match]) + rest)]
        return next((place for place in places if is_right(place)), places[0] if places else None)
    except MaskLakeError:  # a hint must not hide what it belongs to
        return None


def within(storage: Storage, uri: str, is_right: Callable[[str], bool]) -> str | None:
    """A folder directly below `uri` that ``is_right``: what is meant by who names the folder around it."""
    try:
        places = (storage.join(uri, name) for name in storage.folders(uri))
        return next((place for place in places if is_right(place)), None)
    except MaskLakeError:
        return None
