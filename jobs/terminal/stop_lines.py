"""The line that each command shows when a signal ends it, for Ctrl-C and SIGTERM alike."""

from __future__ import annotations

from collections.abc import Mapping

CONTINUE = "Run the same command again to continue."
NOTHING_WRITTEN = "Nothing was written."

AFTER_A_STOP: Mapping[str, str] = {
    "convert": NOTHING_WRITTEN,
    "demo": CONTINUE,
    "evaluate": NOTHING_WRITTEN,
    "label": CONTINUE,
    "propose": f"{NOTHING_WRITTEN} The same command starts from the beginning.",
    "query": "The table is as it was, and no file was written.",
    "runs": "A run is dropped or not, in one transaction: `masklake runs TABLE` shows it.",
    "show": NOTHING_WRITTEN,
    "train": "Run the same command again to continue after the last complete epoch.",
}
"""Lines by command; every command has one (a test compares them with the commands)."""


def command_of(arguments: list[str]) -> str | None:
    """Returns the command in a command line (without the program's name): its first word that is not an option."""
    return next((argument for argument in arguments if not argument.startswith("-")), None)


def stopped_line(command: str | None, by: str = "interrupted") -> str:
    """Returns the line for stderr. by: the cause, such as "interrupted" (Ctrl-C) or "stopped by SIGTERM"."""
    return " ".join(filter(None, (f"masklake: {by}.", AFTER_A_STOP.get(command or "")))) + "\n"
