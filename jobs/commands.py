"""The commands of `masklake`. Each only parses, calls its module and prints; heavy imports wait until a command runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from masklake.jobs.fields import (
    ConvertFields,
    DemoFields,
    DropFields,
    EvaluateFields,
    LabelFields,
    ProposeFields,
    QueryFields,
    RunsFields,
    ShowFields,
    TrainFields,
    VacuumFields,
)
from masklake.jobs.terminal.help import Command, Commands, CommandsOfATable, examples, paragraphs
from masklake.jobs.terminal.parameters import Values, takes
from masklake.model.errors import ConfigError
from masklake.model.fields import Option
from masklake.model.wording import counted, printable

if TYPE_CHECKING:
    from pydantic import BaseModel

    from masklake.pipeline.storage.storage import Storage

app = typer.Typer(
    name="masklake",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

runs_app = typer.Typer(cls=CommandsOfATable, no_args_is_help=True)

AsJson = Annotated[bool, Option("Print the result as a JSON object on stdout.", panel="Output", name="json")]


R = TypeVar("R", bound="BaseModel")


def command(
    fields: type, *lines: str, own_defaults: bool = True, of: typer.Typer = app, name: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command whose parameters are those of `fields` (`takes`). lines: examples, for its help. of: the group that
    it belongs to. name: its name, if it is not that of the function.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        declared = takes(fields, own_defaults)(function)
        return of.command(name, cls=Command, help=paragraphs(function.__doc__ or ""), epilog=examples(*lines))(declared)

    return register


def print_json(report: BaseModel) -> None:
    """Writes a report to stdout as one JSON document. NaN and infinity, which JSON lacks, become null."""
    sys.stdout.write(report.model_dump_json(indent=2) + "\n")


def print_report(report: R, as_json: bool, describe: Callable[[R], str]) -> None:
    """Writes a command's result to stdout, for scripts or for people."""
    if as_json:
        print_json(report)
    else:
        typer.echo(describe(report))


def show_version(wanted: bool) -> None:
    """Writes the installed version to stdout and exits, if `--version` is given."""
    if wanted:
        from importlib.metadata import version

        typer.echo(f"masklake {version('masklake')}")
        raise typer.Exit


def opened(values: Values) -> Storage:
    """Returns Storage with the storage options among the values, and removes them from the values."""
    from masklake.pipeline.storage.options import StorageOptions
    from masklake.pipeline.storage.storage import Storage

    return Storage(StorageOptions(**values.pop("storage", {})))


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train Mask R-CNN on Ray, label a bucket of images, query the table."""


# -- the commands, in the order of the work ----------------------------------------------------------------------------


@command(DemoFields, "masklake demo", "masklake demo --train-images 100 --epochs 3 --output /tmp/demo")
def demo(values: Values, as_json: AsJson = False) -> None:
    """Try everything on generated images of shapes: train, label, evaluate, query.

    The same command continues where an interrupted demo stopped.
    """
    from masklake.jobs import demo as command

    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        report = command.run(**values, say=lambda line: typer.echo(line, err=as_json))
    if as_json:
        print_json(report)


@command(
    TrainFields,
    "masklake train train.json --val val.json -o runs --name first",
    "masklake train --config run.toml --epochs 24 --workers 4",
    own_defaults=False,
)
def train(
    values: Values,
    config: Annotated[
        str | None,
        Option("TOML file with options (docs/training.md). Options on the command line take precedence.", panel="Input"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a detector on COCO data, and write a checkpoint, its AP and its loss curves.

    The same command continues after the last complete epoch. It reports the results if the run is complete.
    """
    from masklake.jobs import train as command
    from masklake.jobs.training.options import read_options

    options = read_options(config, values)
    with redirect_stdout(sys.stderr):  # Ray may write to stdout, which is for the result
        report = command.run(options)
    print_report(report, as_json, command.describe)


@command(
    ConvertFields,
    "masklake convert coco.pth coco.safetensors --preset maskrcnn_resnet50_fpn",
    "masklake convert a.pth a.safetensors --preset tiny --categories names.txt",
)
def convert(values: Values, as_json: AsJson = False) -> None:
    """Convert weights of torchvision or Detectron2 into a MaskLake checkpoint."""
    from masklake.jobs import convert as command

    storage = opened(values)
    report = command.run(**values, storage=storage)
    if as_json:
        print_json(report)
    else:
        typer.echo(
            f"{report.checkpoint}: {report.model_id}, {report.parameters / 1e6:.1f} million parameters, "
            f"{counted(report.categories, 'category')}, norm epsilon {report.norm_eps:g}"
        )


@command(
    ProposeFields,
    "masklake propose train.json --weights rpn.safetensors -o proposals.parquet",
    "masklake propose s3://b/a.json --weights a.safetensors -o s3://b/a.parquet",
)
def propose(values: Values, as_json: AsJson = False) -> None:
    """Store the proposals of an RPN for the images of a COCO file.

    `masklake train --learn detector --proposals FILE` trains a detector on them.
    """
    from masklake.jobs import propose as command

    options = command.ProposeOptions(**values)
    with redirect_stdout(sys.stderr):  # Ray may write to stdout, which is for the result
        report = command.run(options, say=lambda line: typer.echo(printable(line), err=True))
    if as_json:
        print_json(report)
    else:
        proposals, of_images = counted(report.proposals, "proposal"), counted(report.images, "image")
        typer.echo(f"{report.output}: {proposals} of {of_images} by {report.model_id}")


@command(
    LabelFields,
    "masklake label photos labels --weights runs/first/model.safetensors",
    "masklake label 's3://b/photos/**/*.jpg' s3://b/labels --weights m.safetensors",
)
def label(
    values: Values,
    max_failed: Annotated[float, Option("Maximum share of failed images for exit code 0.", ge=0, le=1, panel="Run")] = 0.05,
    as_json: AsJson = False,
) -> None:
    """Label images into a table. Each new or changed image is labelled once.

    The same command continues after an interruption. Exit code 41 means that more images failed than --max-failed allows; the
    table holds all of them, with their errors.
    """
    from masklake.jobs import label as command
    from masklake.jobs.labelling.plan import check_failures
    from masklake.jobs.labelling.progress import written_above
    from masklake.jobs.labelling.standby import started

    with started() as standby:  # before anything starts a thread
        options = command.options(**values)
        with redirect_stdout(sys.stderr):  # Ray may write to stdout, which is for the result
            report = command.run(options, say=written_above, standby=standby)
    print_report(report, as_json, command.describe)
    for each in (*report.earlier, report):
        check_failures(each.statuses, max_failed)


@command(
    QueryFields,
    'masklake query labels "SELECT status, count(*) FROM images GROUP BY status"',
    'masklake query labels "FROM detections WHERE score >= 0.5" -o likely.csv',
)
def query(
    values: Values,
    as_json: Annotated[
        bool, Option("Print the result as JSON, or with --output a summary of it.", panel="Output", name="json")
    ] = False,
) -> None:
    """Query a table in SQL, offline and read-only.

    By default a table holds instances with a score of at least 0.05; `WHERE score >= 0.5` selects the likely ones. `SHOW
    TABLES`, `DESCRIBE images` and `SUMMARIZE images` show its views, columns and values. Results are truncated on a terminal
    only; files and pipes receive every row in full.
    """
    from masklake.jobs import query as command
    from masklake.jobs.terminal.answers import Format

    storage, form, output = opened(values), values.get("form"), values.get("output")
    chosen = None if form is None else Format(form)
    if output is None or output in command.STDOUT:
        if as_json and chosen not in (None, Format.JSON):
            raise ConfigError(f"--json and --format {form} contradict each other; leave one out")
        shown_as = Format.JSON if as_json else chosen or Format.TABLE
        command.show(storage, values["table"], command.read_sql(values["sql"]), shown_as)
        return
    report = command.run(storage, values["table"], command.read_sql(values["sql"]), output, chosen)
    if as_json:
        print_json(report)
    else:
        typer.echo(f"{report.output}: {counted(report.rows, 'row')}")


@command(
    ShowFields,
    "masklake show labels sub/a.jpg -o a.png",
    "masklake show s3://bucket/labels a.jpg -o a.png --images photos --min-score 0",
)
def show(values: Values, as_json: AsJson = False) -> None:
    """Draw the current instances of an image."""
    from masklake.jobs import show as command

    storage = opened(values)
    report = command.run(storage, **values)
    print_report(report, as_json, command.describe)


@command(
    EvaluateFields,
    "masklake evaluate labels --truth val.json",
    "masklake evaluate labels --truth val.json --max-dets 10 --max-dets 100",
)
def evaluate(values: Values, as_json: AsJson = False) -> None:
    """Evaluate the labels of a table: COCO AP of boxes, masks and keypoints, and mean IoU of the foreground."""
    from masklake.jobs import evaluate as command

    storage = opened(values)
    report = command.run(storage, **values)
    print_report(report, as_json, command.describe)


# -- runs --------------------------------------------------------------------------------------------------------------

app.add_typer(
    runs_app,
    name="runs",
    help="List the runs of a table (`masklake runs TABLE`), remove runs from it, and delete files that are no longer needed.",
    short_help="List the runs of a table, or remove some.",
    epilog=examples("masklake runs labels", "masklake runs drop labels 2026-01-31"),
)


@command(RunsFields, "masklake runs labels", "masklake runs list s3://bucket/labels --json", of=runs_app, name="list")
def list_runs(values: Values, as_json: AsJson = False) -> None:
    """List the runs of a table: their state, images, time, speed, GPU hours, cost, statuses and model, and who started them.

    `masklake runs TABLE` does the same.
    """
    from masklake.jobs import runs as command

    storage = opened(values)
    print_report(command.run(storage, **values), as_json, command.describe)


@command(
    DropFields,
    "masklake runs drop labels 2026-01-31",
    "masklake runs drop s3://bucket/labels 9f86d081884c7d65 --dry-run",
    of=runs_app,
)
def drop(values: Values, as_json: AsJson = False) -> None:
    """Remove a run from a table, in one transaction.

    Its images get back their rows of earlier runs, and the next `masklake label` labels them again. The run's files are kept
    until `masklake runs vacuum`. Fails while a run is being written.
    """
    from masklake.jobs import runs as command

    storage = opened(values)
    report = command.drop(storage, **values, say=lambda line: typer.echo(line, err=True))
    print_report(report, as_json, command.describe_drop)


@command(
    DropFields, "masklake runs rollback labels 2026-01-30", "masklake runs rollback labels 2026-01-30 --dry-run", of=runs_app
)
def rollback(values: Values, as_json: AsJson = False) -> None:
    """Remove all runs that were committed after RUN, in one transaction.

    Runs that were dropped earlier stay dropped. Fails while a run is being written.
    """
    from masklake.jobs import runs as command

    storage = opened(values)
    report = command.rollback(storage, **values, say=lambda line: typer.echo(line, err=True))
    print_report(report, as_json, command.describe_drop)


@command(
    VacuumFields,
    "masklake runs vacuum labels --dry-run",
    "masklake runs vacuum s3://bucket/labels --older-than 30",
    of=runs_app,
)
def vacuum(values: Values, as_json: AsJson = False) -> None:
    """Delete data files that the table no longer lists: those of dropped runs, and remains of killed workers.

    Files of unfinished runs are kept, since these runs continue with them. Fails while a run is being written.
    """
    from masklake.jobs import runs as command

    storage = opened(values)
    report = command.vacuum(storage, **values, say=lambda line: typer.echo(line, err=True))
    print_report(report, as_json, command.describe_vacuum)
