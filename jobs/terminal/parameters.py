"""The command line's parameters, declared from the fields of the options (`model.fields`).

Each field becomes one parameter, with its type, range, default and help text. A field that holds nested options is replaced by
their parameters. Given values are nested like the options: `--precision fp16` becomes `{"predict": {"precision": "fp16"}}`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from masklake.model.errors import ConfigError
from masklake.model.fields import Group, Option

PANELS = ("Input", "Model", "Training", "Metrics", "Run", "Cluster", "Storage", "Output", "Help")
"""Panels of a help page, in order; they follow the arguments."""

MISSING = inspect.Parameter.empty

Values = dict[str, Any]
"""Values that were given, nested like the fields."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a command.

    path: keys of the field in the nested options. declared: the parameter that typer reads. names: allowed items of an option
    that takes a comma-separated list; empty for other options.
    """

    path: tuple[str, ...]
    option: Option
    declared: inspect.Parameter
    names: tuple[str, ...] = ()


def takes(fields: type, own_defaults: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that adds the parameters of `fields` to those of a command, whose types are `Annotated` likewise.

    The command's first argument receives the values of `fields` (`Values`). own_defaults: whether they include defaults; False
    if a parameter that is not given may come from a file. Help pages show the defaults in both cases.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        shared = list(parameters(fields, own_defaults))
        own = _own_parameters(command)

        @functools.wraps(command)
        def called(**given: Any) -> None:
            command(collected(shared, given), **{p.declared.name: given[p.declared.name] for p in own})

        declared = [parameter.declared for parameter in sorted([*shared, *own], key=_place)]
        called.__signature__ = inspect.Signature(declared)  # type: ignore[attr-defined]  # what typer reads
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in declared}
        return called

    return decorate


def collected(declared: Sequence[Parameter], given: Mapping[str, Any]) -> Values:
    """Returns the given values, nested. None and a flag that is not set count as not given.

    Raises ConfigError for an unknown name in a comma-separated list.
    """
    values: Values = {}
    for parameter in declared:
        value = given[parameter.declared.name]
        if value is None or value is False:
            continue
        inner = values
        for key in parameter.path[:-1]:
            inner = inner.setdefault(key, {})
        inner[parameter.path[-1]] = _split(value, parameter) if parameter.names else value
    return values


def parameters(fields: type, own_defaults: bool = True) -> Iterator[Parameter]:
    """Yields the command line parameters of `fields`, including those of nested options."""
    for path, hint, default, shown in _fields(fields):
        option = _metadata(hint, Option)
        if option is not None and (option.argument or option.panel is not None):
            yield _parameter(path, hint, option, default, shown, own_defaults)


# -- fields ------------------------------------------------------------------------------------------------------------


def _fields(
    kind: type, values: Any = None, path: tuple[str, ...] = (), shown: str | None = None
) -> Iterator[tuple[tuple[str, ...], Any, Any, str | None]]:
    """Yields path, type, default and description of the default (None: show its value) of each field.

    values: an instance that holds the defaults.
    """
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        default = field.default if values is None else getattr(values, field.name)
        group = _metadata(hint, Group)
        if group is not None:
            yield from _fields(group.fields, None, (*path, field.name), group.default)
        elif dataclasses.is_dataclass(hint):
            nested = None if default is dataclasses.MISSING else default
            yield from _fields(hint, nested, (*path, field.name), shown)  # type: ignore[arg-type]  # it is a class
        else:
            yield (*path, field.name), hint, MISSING if default is dataclasses.MISSING else default, shown


def _metadata(hint: Any, kind: type) -> Any:
    """Returns the metadata of this kind in an `Annotated` type, or None."""
    return next((data for data in getattr(hint, "__metadata__", ()) if isinstance(data, kind)), None)


def _own_parameters(command: Callable[..., None]) -> list[Parameter]:
    """Returns the parameters that a command declares itself: all but the first, which takes the values."""
    hints = get_type_hints(command, include_extras=True)
    return [
        _parameter((name,), hints[name], _metadata(hints[name], Option), parameter.default, None, True)
        for name, parameter in list(inspect.signature(command).parameters.items())[1:]
    ]


def _place(parameter: Parameter) -> int:
    """Returns the position of a parameter on the help page: arguments first, then by panel."""
    return -1 if parameter.option.argument else PANELS.index(parameter.option.panel or "")


# -- typer -------------------------------------------------------------------------------------------------------------


def _parameter(
    path: tuple[str, ...], hint: Any, option: Option, default: Any, shown: str | None, own_defaults: bool
) -> Parameter:
    kind, names = _command_line_type(get_args(hint)[0])
    if kind is bool:
        default = False
    elif not own_defaults or shown is not None:
        shown = shown or (option.default if default is None else None if default is MISSING else str(default))
        default = None
    elif default is None:
        shown = option.default
    elif isinstance(default, tuple):
        default = list(default)
    # The type is known when this runs, which mypy cannot follow.
    annotation = Annotated[kind if default is not None else kind | None, _described(option, path[-1], kind, shown)]  # type: ignore[valid-type]
    declared = inspect.Parameter(path[-1], inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    return Parameter(path, option, declared, names)


def _command_line_type(kind: Any) -> tuple[Any, tuple[str, ...]]:
    """Returns the type that typer converts a field's value to, without None, and the allowed names if it is a set of names
    (given as text).
    """
    alternatives = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    choices = [choice for choice in alternatives if choice is not type(None)]
    if all(get_origin(choice) is Literal for choice in choices):
        return Literal[tuple(value for choice in choices for value in get_args(choice))], ()
    (only,) = choices
    if get_origin(only) is frozenset:
        return str, get_args(get_args(only)[0])
    if get_origin(only) is tuple:
        return list[get_args(only)[0]], ()  # type: ignore[misc]  # a type of typer's, not of mypy's
    return only, ()


def _described(option: Option, name: str, kind: Any, shown: str | None) -> Any:
    """Returns typer's description of a parameter."""
    numbers = {int, float} & {kind, *get_args(kind)}
    described: dict[str, Any] = {"help": option.help, "show_default": shown or True, "rich_help_panel": option.panel}
    if int in numbers:
        described |= {
            "min": option.ge if option.gt is None else int(option.gt) + 1,
            "max": option.le if option.lt is None else int(option.lt) - 1,
        }
    elif float in numbers:
        described |= {"min": option.ge, "max": option.le, "callback": _check_of(option)}
    if option.argument:
        return typer.Argument(metavar=option.metavar or name.upper(), **described)
    flags = [f"--{option.name or name.replace('_', '-')}", *filter(None, [option.short])]
    return typer.Option(*flags, **described)


def _check_of(option: Option) -> Callable[[float | None], float | None]:
    """Returns a callback for what typer's ranges do not check: NaN, infinity and open ends."""

    def check(number: float | None) -> float | None:
        if number is not None and option.gt is not None and not option.gt < number < math.inf:
            raise typer.BadParameter(f"{number}; give a finite number above {option.gt:g}")
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is not a finite number")
        return number

    return check


def _split(text: str, parameter: Parameter) -> list[str]:
    """Returns the names in an option's text. Raises ConfigError, which names the option, for an unknown name."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in parameter.names]:
        flag, one = f"--{parameter.declared.name}", parameter.declared.name.removesuffix("s")
        allowed = ", ".join(parameter.names)
        raise ConfigError(f"{flag} {text!r}: unknown {one} {unknown[0]!r}; give {allowed}, separated by commas")
    return names
