"""The command line. Each command only parses, calls its module and prints; heavy imports wait until a command runs.

Errors a user can cause end in one line on stderr and their own exit code (`model.errors`); Ctrl-C exits with 130.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer

from model.errors import MaskLakeError

app = typer.Typer(
    name="masklake",
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


def show_version(wanted: bool) -> None:
    """Print the installed version and stop, when asked to."""
    if wanted:
        typer.echo(f"masklake {version('masklake')}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train Mask R-CNN on Ray, label a bucket of images, query the table."""


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="A torchvision state dict (.pth), local or s3://, or a torchvision weights' name.")
    ],
    target: Annotated[str, typer.Argument(help="The checkpoint to write, *.safetensors, local or s3://.")],
    preset: Annotated[str, typer.Option(help="The architecture the weights are of, such as maskrcnn_resnet50_fpn.")],
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Turn another system's weights into a MaskLake checkpoint."""
    from jobs import convert as command
    from pipeline.storage import Storage, StorageOptions

    report = command.run(source, target, preset, Storage(StorageOptions(endpoint_url=endpoint)))
    if as_json:
        print_json(report.model_dump())
    else:
        typer.echo(
            f"{report.checkpoint}: {report.model_id}, {report.parameters / 1e6:.1f} million parameters, "
            f"{report.categories} categories"
        )


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
