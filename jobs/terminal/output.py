"""Checks, before the work begins, whether a command's output file can be written at the end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from masklake.model.errors import ConfigError
from masklake.pipeline.errors import InputNotFoundError
from masklake.pipeline.storage.errors import translated
from masklake.pipeline.storage.local_files import check_writable
from masklake.pipeline.storage.uri import below, canonical, parse_uri, real_place


def check_output(output: str, table: str | None = None, sources: Mapping[str, str | None] | None = None) -> None:
    """Raises ConfigError if `output` is not a valid name for a file, InputNotFoundError if its folder does not exist, and the
    storage's error if no file can be written in a local folder.

    table: a table whose folder must not hold the output, since readers of that folder would take the file for a part of the
    table. sources: as in `check_not_read`.
    """
    at = parse_uri(output)
    if not at.key or output.endswith("/") or (at.is_local and os.path.isdir(at.key)):
        raise ConfigError(f"{output}: is a folder; name the file to write in it")
    if table is not None and (_is_in(at.uri, canonical(table)) or _is_in(real_place(output), real_place(table))):
        raise ConfigError(f"{output}: lies in the table's own folder; write to another place")
    folder = os.path.dirname(at.key)
    if at.is_local and os.path.lexists(folder) and not os.path.isdir(folder):
        raise InputNotFoundError(f"{output}: {folder} is a file, not a folder; check the path")
    if at.is_local and not os.path.isdir(folder):
        raise InputNotFoundError(f"{output}: there is no folder {folder}; make it, or check the path")
    check_not_read(output, sources or {})
    if at.is_local and (os.path.isfile(at.key) or not os.path.exists(at.key)):  # a device or a pipe is written to, as it is
        with translated(output):
            check_writable(Path(real_place(output)).parent)


def _is_in(place: str, folder: str) -> bool:
    return f"{place}/".startswith(below(folder))


def check_not_read(output: str, sources: Mapping[str, str | None]) -> None:
    """Raises ConfigError if `output` is one of the `sources` that the command reads, which it would overwrite.

    sources: inputs by their name in the message (`the file of --truth`); None for an option that was not given.
    """
    for name, source in sources.items():
        if source is not None and same_place(output, source):
            raise ConfigError(f"{output}: is {name}, which this would overwrite; name another file")


def same_place(one: str, other: str) -> bool:
    """Returns whether two names refer to the same object, also through a link if both are local files."""
    if canonical(one) == canonical(other):
        return True
    places = parse_uri(one), parse_uri(other)
    if not all(at.is_local and os.path.exists(at.key) for at in places):
        return False
    return os.path.samefile(places[0].key, places[1].key)
