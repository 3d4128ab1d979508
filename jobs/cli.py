"""Entry point of the `masklake` script: runs a command, and ends with a line and an exit code.

Errors a user can cause end in one line on stderr and their own exit code (`model.errors`); Ctrl-C exits with 130, SIGTERM
with 143. Signals are handled before the commands are imported, which takes half a second, and more on a busy machine.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NoReturn

from masklake.jobs.terminal.signals import Stopping
from masklake.jobs.terminal.stop_lines import command_of, stopped_line

if TYPE_CHECKING:
    from masklake.model.errors import MaskLakeError

INTERRUPTED = 130


def main() -> None:
    """Entry point of the `masklake` script."""
    stopping = Stopping(lambda by: stopped_line(command_of(sys.argv[1:]), by))
    stopping.install()
    try:
        code = _run()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer's own answer to it is 1
            _end_without_reader()
        if stopping.requested and stop.code:
            sys.exit(stopping.say())
        raise
    except BrokenPipeError:
        _end_without_reader()
    except Exception as error:
        if stopping.requested or comes_from_interrupt(error):
            sys.exit(stopping.say())
        known = _known(error)
        if known is None:
            raise
        _end(*known)
    if code == INTERRUPTED:  # also how typer ends on Ctrl-C, without a word
        code = stopping.say()
    sys.exit(code)


def _run() -> int | None:
    """Runs the command that the arguments name; returns its exit code, None for 0."""
    from masklake.jobs.commands import app

    code: int | None = app(standalone_mode=False)
    sys.stdout.flush()  # here, where its failure still has an exit code
    return code


def _known(error: Exception) -> tuple[int, str] | None:
    """Returns exit code and message of an error that the user can cause; None if it is not one."""
    from masklake.jobs.terminal.usage import USAGE_ERROR, usage_line
    from masklake.model.errors import MaskLakeError
    from masklake.model.wording import printable
    from masklake.pipeline.errors import QueryError

    if isinstance(error, USAGE_ERROR):
        return 2, printable(usage_line(error))
    known = error if isinstance(error, MaskLakeError) else _refused_by_the_machine(error)
    if known is None:
        return None
    # Names of files may break lines and colour the terminal. DuckDB's words about a query are lines of their own.
    lines = str(known).split("\n") if isinstance(known, QueryError) else [str(known)]
    return known.exit_code, "\n".join(printable(line) for line in lines)


def _end(code: int, message: str) -> NoReturn:
    if message:
        sys.stderr.write(f"masklake: error: {message}\n")
    sys.exit(code)


def _refused_by_the_machine(error: Exception) -> MaskLakeError | None:
    """Returns the error for a permission, a path or a full disk that no command has handled; None if it is none of these."""
    from masklake.pipeline.storage.errors import of_the_machine

    known = of_the_machine(error)
    if known is not None:
        _drop_output()
    return known


def _end_without_reader() -> NoReturn:
    """Ends the process after the reader of its output has closed the pipe (`| head`): nothing more can be written."""
    _drop_output()
    sys.exit(141)


def _drop_output() -> None:
    """Discards what is still buffered for stdout: writing it at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def comes_from_interrupt(error: BaseException | None) -> bool:
    """Returns whether Ctrl-C caused an error: Python 3.11 wraps it while it creates a class, libraries while they clean up."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error is not None


if __name__ == "__main__":
    main()
