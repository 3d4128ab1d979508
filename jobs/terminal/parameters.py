"""The command line's parameters, declared from the fields of the options (`model.fields`).

A field becomes one parameter, with its type, range, default and help text. A field that holds other options becomes theirs. The
given values come back nested as the options are: `--precision fp16` as `{"predict": {"precision": "fp16"}}`.
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
"""Parts of a command's help, in their order, below its arguments."""

MISSING = inspect.Parameter.empty

Values = dict[str, Any]
"""What was given, nested as the fields are."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a command.

    path: of the field in the options. declared: as Python and typer know it. names: what the items of an option may be that
    takes several, with commas between; empty for any other.
    """

    path: tuple[str, ...]
    option: Option
    declared: inspect.Parameter
    names: tuple[str, ...] = ()


def takes(fields: type, own_defaults: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command with the parameters of `fields`, beside its own ones, whose types are `Annotated` in the same way.

    The command is called with the values of `fields` (`Values`) first. own_defaults: False where a parameter that is not given
    may come from elsewhere: its default is shown and left out of the values.
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
    """The given values, nested. None and a flag that is not set count as not given. Raises ConfigError for an unknown name."""
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
    """The parameters of options that the command line has, nested ones in place of the field that holds them."""
    for path, hint, default, shown in _fields(fields):
        option = _metadata(hint, Option)
        if option is not None and (option.argument or option.panel is not None):
            yield _parameter(path, hint, option, default, shown, own_defaults)


# -- fields ------------------------------------------------------------------------------------------------------------


def _fields(
    kind: type, values: Any = None, path: tuple[str, ...] = (), shown: str | None = None
) -> Iterator[tuple[tuple[str, ...], Any, Any, str | None]]:
    """Path, type, default and the default in words (None: as it is) of each field. values: an instance that holds defaults."""
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
    """What an `Annotated` type carries of this kind, or None."""
    return next((data for data in getattr(hint, "__metadata__", ()) if isinstance(data, kind)), None)


def _own_parameters(command: Callable[..., None]) -> list[Parameter]:
    """The parameters that a command declares by itself, behind the first, which takes the values."""
    hints = get_type_hints(command, include_extras=True)
    return [
        _parameter((name,), hints[name], _metadata(hints[name], Option), parameter.default, None, True)
        for name, parameter in list(inspect.signature(command).parameters.items())[1:]
    ]


def _place(parameter: Parameter) -> int:
    """Where a parameter stands in the help: arguments first, then by panel."""
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
    """The type that typer reads a field's value as, without None; and the names of a collection of names, which is text."""
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
    """What typer is told of a parameter."""
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
        return typer.Argument(metavar=option.metavar, **described)
    flags = [f"--{option.name or name.replace('_', '-')}", *filter(None, [option.short])]
    return typer.Option(*flags, **described)


def _check_of(option: Option) -> Callable[[float | None], float | None]:
    """A check of what a range of typer's does not: NaN passes each, as no comparison holds for it, and ends are inside."""

    def check(number: float | None) -> float | None:
        if number is not None and option.gt is not None and not option.gt < number < math.inf:
            raise typer.BadParameter(f"{number}; give a finite number above {option.gt:g}")
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is not a finite number")
        return number

    return check


def _split(text: str, parameter: Parameter) -> list[str]:
    """The names in an option's text; ConfigError, which names the option, for one that is not known."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in parameter.names]:
        flag, one = f"--{parameter.declared.name}", parameter.declared.name.removesuffix("s")
        allowed = ", ".join(parameter.names)
        raise ConfigError(f"{flag} {text!r}: unknown {one} {unknown[0]!r}; give {allowed}, separated by commas")
    return names
