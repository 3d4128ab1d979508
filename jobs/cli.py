"""The command line. Each command only parses, calls its module and prints; heavy imports wait until a command runs.

Errors a user can cause end in one line on stderr and their own exit code (`model.errors`); Ctrl-C exits with 130.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from model.errors import MaskLakeError

app = typer.Typer(
    name="masklake",
    help="Train Mask R-CNN on Ray, label a bucket of images, query the table.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Endpoint = Annotated[str | None, typer.Option(help="S3 endpoint URL (MinIO, Ceph, R2); default: AWS_ENDPOINT_URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]


def print_json(value: Any) -> None:
    """One JSON document on stdout: what scripts read."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def main() -> None:
    """Entry point of the `masklake` script."""
    try:
        app()
    except MaskLakeError as error:
        sys.stderr.write(f"masklake: error: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("masklake: interrupted. The same command goes on where this one stopped.\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
