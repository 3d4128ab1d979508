"""Suggestions for a mistyped path: existing folders with similar names."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from masklake.model.errors import MaskLakeError
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import parent

_ALIKE = 0.6  # of difflib's ratio: `labels` is 0.92 like `lables`, 0.55 like `photos`
_CHOICES = 5


def first_missing(storage: Storage, uri: str) -> str:
    """Returns the outermost folder of the path `uri` that does not exist; `uri` itself if its parent exists."""
    while (above := parent(uri)) != uri and not storage.exists(above):
        uri = above
    return uri


def similar_folder(storage: Storage, missing: str, wanted: str, is_right: Callable[[str], bool]) -> str | None:
    """Returns an existing folder for which `wanted` may be a mistyped name, or None. missing: outermost folder of `wanted` that
    does not exist.

    A folder for which `is_right` holds is preferred to one whose name is more similar. None if no name is similar or nothing
    can be listed.
    """
    above, rest = parent(missing), wanted[len(missing) :]
    name = missing.rpartition("/")[2]
    try:
        names = {folder.casefold(): folder for folder in storage.folders(above)}
        alike = difflib.get_close_matches(name.casefold(), names, _CHOICES, _ALIKE)
        places = [place for match in alike if storage.exists(place := storage.join(above, names[match]) + rest)]
        return next((place for place in places if is_right(place)), places[0] if places else None)
    except MaskLakeError:  # a hint must not hide the error that it belongs to
        return None


def folder_within(storage: Storage, uri: str, is_right: Callable[[str], bool]) -> str | None:
    """Returns a folder directly below `uri` for which `is_right` holds, or None: users may have given its parent."""
    try:
        places = (storage.join(uri, name) for name in storage.folders(uri))
        return next((place for place in places if is_right(place)), None)
    except MaskLakeError:
        return None
