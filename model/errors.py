"""The errors of MaskLake: one tree, one exit code each.

    MaskLakeError                      1
    ├── UnknownPresetError            10   a preset name that does not exist
    ├── CheckpointError               11   weights that are missing, broken or of another model
    ├── ConfigError                   12   options that contradict each other or the model
    └── pipeline.errors                    inputs, tables, runs and clusters (20 to 45)

Raise the most specific one, with a message that names the input and the remedy. Exceptions of other libraries are translated
once, where they are called, with ``raise ... from``. The command line prints the message alone and exits with the code.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:  # the command line prints an error without loading pydantic
    from collections.abc import Collection, Mapping

    from pydantic import BaseModel, ValidationError

T = TypeVar("T", bound="BaseModel")


class MaskLakeError(Exception):
    """Base class of all errors that a user of MaskLake can cause and fix."""

    exit_code: ClassVar[int] = 1


class UnknownPresetError(MaskLakeError):
    """A model preset that does not exist; the message lists those that do."""

    exit_code = 10


class CheckpointError(MaskLakeError):
    """Weights that cannot be read, are not a checkpoint, or belong to another architecture."""

    exit_code = 11


class ConfigError(MaskLakeError):
    """Options that contradict each other, or that this model does not support."""

    exit_code = 12


def validated(kind: type[T], values: Mapping[str, Any], source: str, given: Mapping[str, str] | None = None) -> T:
    """Returns the values as `kind`. Raises ConfigError, which names every wrong field.

    source: where the values come from, in messages; given: names of options by field, for values from the command line, whose
    messages need no source.
    """
    from pydantic import ValidationError

    given = given or {}
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        elsewhere = any(".".join(map(str, fault["loc"])) not in given for fault in error.errors())
        raise ConfigError(f"{f'{source}: ' if elsewhere else ''}{faults(error, kind.model_fields, given)}") from error


def faults(error: ValidationError, known: Collection[str] = (), spelled: Mapping[str, str] | None = None) -> str:
    """Returns every fault of a pydantic validation in one line, each with its field: `recipe.epochs: input should be greater
    than 0`.

    known: names of fields, from which one similar to a misspelt field is suggested. spelled: names of fields in the message,
    such as `--seed`.
    """
    lines = []
    for fault in error.errors():
        field, message = ".".join(map(str, fault["loc"])), fault["msg"]
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, known, n=1) if len(fault["loc"]) == 1 else ()
            message = f"no such option{f'; did you mean {near[0]}?' if near else ''}"
        message = message.removeprefix("Value error, ")
        field = (spelled or {}).get(field, field)
        lines.append(": ".join(filter(None, (field, message[:1].lower() + message[1:]))))
    return "; ".join(lines)
