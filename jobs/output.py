"""Whether a command's one file could be written in the end: asked before the work begins."""

from __future__ import annotations

import os

from model.errors import ConfigError
from pipeline.errors import InputNotFoundError
from pipeline.storage import canonical, parse


def check_output(output: str, table: str | None = None) -> None:
    """Raises where `output` names no file that can be written: ConfigError for its name, InputNotFoundError for its folder.

    table: a table, whose folder is its own; whoever reads that folder would take the file for a part of it.
    """
    at = parse(output)
    if not at.key or output.endswith("/") or (at.is_local and os.path.isdir(at.key)):
        raise ConfigError(f"{output}: is a folder; name the file to write in it")
    if table is not None and f"{at.uri}/".startswith(f"{canonical(table)}/"):
        raise ConfigError(f"{output}: lies in the table's own folder; write to another place")
    if at.is_local and not os.path.isdir(os.path.dirname(at.key)):
        raise InputNotFoundError(f"{output}: there is no folder {os.path.dirname(at.key)}; make it, or check the path")
