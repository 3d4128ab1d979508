"""Messages for wrong usage: what is wrong, the usual cause, and where to read more."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import typer

USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]  # click's UsageError, of whichever click typer brings along

QUOTE_SQL = 'SQL is one argument: put it in quotes, as in masklake query TABLE "SELECT count(*) FROM images"'

EXTRA_ARGUMENTS: Mapping[str, str] = {
    "query": QUOTE_SQL,
    "label": "The shell expands a pattern without quotes: put it in quotes, as in masklake label 'photos/*.jpg' TABLE",
    "show": "It draws one image at a time",
}
"""By command: the usual cause of too many arguments."""


def usage_line(error: Any) -> str:
    """Returns the lines for a USAGE_ERROR, without `masklake: error:`; empty if the help was printed instead."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return ""
    context = error.ctx
    command = _command(context)
    parts = [_message(error), _hint(command, error)]
    text = ". ".join(part for part in parts if part)
    path = f"masklake {command}" if command else "masklake"
    return f"{f'{command}: ' if command else ''}{text}{'' if text.endswith('?') else '.'} See {path} --help"


def _command(context: Any) -> str | None:
    """Returns the name of a command after those of its groups, without the program's; None for the program itself."""
    names = []
    while context is not None and context.parent is not None:
        names.append(context.info_name)
        context = context.parent
    return " ".join(reversed(names)) or None


def _message(error: Any) -> str:
    """Returns click's own message as part of a sentence, with the given value and what is allowed."""
    text = str(error.format_message()).strip().rstrip(".").replace("Value error, ", "")
    allowed, given = _allowed(error), _given(error)
    if allowed and given is not None:
        text = f"{text.partition(': ')[0]}: {given!r}"
    text = f"{text}; give {allowed}" if allowed and "; give " not in text else text
    text = re.sub(r"argument\(s\) (\(\S*\))$", r"argument \1", text[:1].lower() + text[1:]).replace("(s)", "s")
    about = getattr(getattr(error, "param", None), "help", None)
    return f"{text}: {about.rstrip('.')}" if about and type(error).__name__ == "MissingParameter" else text


def _given(error: Any) -> Any:
    """Returns the value that pydantic rejected, which its message does not contain; None for other errors."""
    faults = getattr(error.__cause__, "errors", None)
    return faults()[0]["input"] if faults is not None else None


def _allowed(error: Any) -> str:
    """Returns which values a numeric option accepts, if another one was given; otherwise an empty string."""
    parameter = getattr(error, "param", None)
    if type(error).__name__ != "BadParameter" or parameter is None:
        return ""
    described = getattr(parameter, "type_descriptor", None)  # typer's own; before it, click's types
    kind = set(re.findall(r"\w+", str(described.annotation) if described is not None else parameter.type.name))
    if not kind & {"int", "integer", "float"}:
        return ""
    ranged = parameter if described is not None else parameter.type
    least, most = getattr(ranged, "min", None), getattr(ranged, "max", None)
    number = "a number" if "float" in kind else "a whole number"
    if least is None:
        return number
    return f"{number} of {least} or more" if most is None else f"{number} from {least} to {most}"


def _hint(command: str | None, error: Any) -> str:
    if "unexpected extra" in str(error.format_message()):
        return EXTRA_ARGUMENTS.get(command or "", "")
    if type(error).__name__ == "NoSuchOption" and command == "query" and _is_of_sql(str(error.option_name)):
        return QUOTE_SQL
    return ""


def _is_of_sql(option: str) -> bool:
    """Returns whether what looks like an option is a minus in SQL without quotes, or SQL that begins with a comment."""
    return not option.startswith("--") or any(character.isspace() for character in option)
