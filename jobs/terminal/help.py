"""Help pages: paragraphs, examples, and the classes that keep them quick."""

from __future__ import annotations

import inspect
from typing import Any

from typer.core import TyperCommand, TyperGroup

from masklake.jobs.terminal.parameters import PANELS


def paragraphs(text: str) -> str:
    """Returns a docstring's text with each paragraph on one line: typer keeps the line breaks of all but the first."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n"))


def examples(*lines: str) -> str:
    """Returns example command lines, for the end of a help page."""
    return "\n".join(["Examples:", *(f"  {line}" for line in lines)]).replace("[", r"\[")


class _QuickFlags:
    """Reads flags without pydantic, and puts `--help` into a panel of its own, after the others.

    typer's own flags (`--help`, `--install-completion`) have None for a default, which typer converts by pydantic: an import of
    0.1 s for each command, help page and wrong argument.
    """

    def get_params(self, context: Any) -> list[Any]:
        """Returns typer's parameters of the command."""
        parameters: list[Any] = super().get_params(context)  # type: ignore[misc]  # of the class beside this one
        for parameter in parameters:
            if getattr(parameter, "is_bool_flag", False) and parameter.default is None:
                parameter.default = False
            if parameter.name == "help" and isinstance(self, TyperCommand):
                parameter.rich_help_panel = PANELS[-1]
        return parameters


class Command(_QuickFlags, TyperCommand):
    """A command."""


class Commands(_QuickFlags, TyperGroup):
    """The group of all commands."""


class CommandsOfATable(Commands):
    """Group of commands that take a table as their first argument. Without a command's name it runs the first command;
    `TABLE COMMAND` is the same as `COMMAND TABLE`.
    """

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        """Puts the name of the command first. A table that has the name of a command needs a path: `./drop`."""
        first, *_ = self.commands
        if args and args[0] not in (*self.commands, *context.help_option_names):
            named = len(args) > 1 and args[1] in self.commands
            args = [args[1], args[0], *args[2:]] if named else [first, *args]
        return super().parse_args(context, args)
