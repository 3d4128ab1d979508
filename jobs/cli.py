"""The command line. Each command only parses, calls its module and prints; heavy imports wait until a command runs.

Errors a user can cause end in one line on stderr and their own exit code (`model.errors`); Ctrl-C exits with 130, SIGTERM
with 143.
"""

from __future__ import annotations

import math
import os
import sys
from contextlib import nullcontext, redirect_stdout
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from masklake.jobs.terminal.signals import Stopping
from masklake.jobs.terminal.stop_lines import command_of, stopped_line
from masklake.jobs.terminal.usage import USAGE_ERROR, usage_line
from masklake.model.errors import ConfigError, MaskLakeError
from masklake.model.wording import counted

if TYPE_CHECKING:
    from pydantic import BaseModel

app = typer.Typer(
    name="masklake",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130

TASKS = ("box", "mask", "keypoint")  # of model.config.Task, which is not imported before a command runs

Endpoint = Annotated[str | None, typer.Option(help="S3 endpoint URL (MinIO, Ceph, R2); default: AWS_ENDPOINT_URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]


def print_json(report: BaseModel) -> None:
    """One JSON document on stdout: what scripts read. NaN and infinity, which JSON has not, are null."""
    sys.stdout.write(report.model_dump_json(indent=2) + "\n")


def check_finite(number: float | None) -> float | None:
    """An option's number as it is; a range alone lets NaN pass, which no comparison holds for."""
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter(f"{number} is not a finite number")
    return number


def check_positive(number: float | None) -> float | None:
    """An option's number as it is, where it is more than 0."""
    if number is not None and not 0 < number < math.inf:
        raise typer.BadParameter(f"{number}; give a finite number above 0")
    return number


def share_option(text: str) -> Any:
    """An option that is a share, a score or an overlap: 0 to 1."""
    return typer.Option(help=text, min=0, max=1, callback=check_finite)


def show_version(wanted: bool) -> None:
    """Print the installed version and stop, when asked to."""
    if wanted:
        typer.echo(f"masklake {version('masklake')}")
        raise typer.Exit


def split_tasks(text: str | None) -> list[str] | None:
    """The names of --tasks; ConfigError, which names the option, for one that is no task."""
    if text is None:
        return None
    tasks = [task.strip() for task in text.split(",")]
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ConfigError(f"--tasks {text!r}: {unknown[0]!r} is no task; give {', '.join(TASKS)}, with commas between")
    return tasks


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
        str,
        typer.Argument(
            help="A torchvision state dict or Detectron2 checkpoint (.pth, .safetensors, .pkl), local or s3://, or a "
            "torchvision weights' name."
        ),
    ],
    target: Annotated[str, typer.Argument(help="The checkpoint to write, *.safetensors, local or s3://.")],
    preset: Annotated[str, typer.Option(help="The architecture the weights are of, such as maskrcnn_resnet50_fpn.")],
    norm_eps: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=check_finite,
            help="Epsilon of the norms; default: 0 for torchvision's own COCO_V1 files, 1e-5 for all others.",
        ),
    ] = None,
    categories: Annotated[
        str | None,
        typer.Option(help="File that names what the weights were trained on: COCO JSON, or text, one name a line."),
    ] = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Turn another system's weights into a MaskLake checkpoint."""
    from masklake.jobs import convert as command
    from masklake.pipeline.storage.options import StorageOptions
    from masklake.pipeline.storage.storage import Storage

    report = command.run(source, target, preset, Storage(StorageOptions(endpoint_url=endpoint)), norm_eps, categories)
    if as_json:
        print_json(report)
    else:
        typer.echo(
            f"{report.checkpoint}: {report.model_id}, {report.parameters / 1e6:.1f} million parameters, "
            f"{counted(report.categories, 'category')}, eps of the norms {report.norm_eps:g}"
        )


@app.command()
def query(
    table: Annotated[str, typer.Argument(help="The table, a local path or s3://.")],
    sql: Annotated[
        str,
        typer.Argument(
            help="DuckDB SQL in quotes, over images, detections, current_images, current_detections; `-` reads it from stdin."
        ),
    ],
    form: Annotated[
        Literal["table", "csv", "tsv", "json", "jsonl", "parquet"] | None,
        typer.Option("--format", help="How to write the answer; default: what --output's suffix says, else a table."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the whole answer here, local or s3://: *.csv, .tsv, .json, .jsonl, .parquet, .txt; text also with .gz.",
        ),
    ] = None,
    endpoint: Endpoint = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer as JSON, or with --output what was written.")
    ] = False,
) -> None:
    """Ask a table in SQL, offline and without writing to it.

    Instances are stored from score 0.05 on; `WHERE score >= 0.5` leaves the likely ones. `SHOW TABLES`, `DESCRIBE images` and
    `SUMMARIZE images` say what there is. Only a table on the terminal is cut: a file or a pipe gets every row in full.
    """
    from masklake.jobs import query as command
    from masklake.jobs.terminal.answers import Format
    from masklake.pipeline.storage.options import StorageOptions
    from masklake.pipeline.storage.storage import Storage

    storage = Storage(StorageOptions(endpoint_url=endpoint))
    chosen = None if form is None else Format(form)
    if output is None or output == "-":
        if as_json and chosen not in (None, Format.JSON):
            raise ConfigError(f"--json and --format {form} contradict each other; leave one out")
        command.show(storage, table, command.read_sql(sql), Format.JSON if as_json else chosen or Format.TABLE)
        return
    report = command.run(storage, table, command.read_sql(sql), output, chosen)
    if as_json:
        print_json(report)
    else:
        typer.echo(f"{report.output}: {counted(report.rows, 'row')}")


@app.command()
def show(
    table: Annotated[str, typer.Argument(help="The table, a local path or s3://.")],
    uri: Annotated[str, typer.Argument(help="An image of the table: its URI, or a unique ending of it, such as sub/a.jpg.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The picture to write, local or s3://: *.png, .jpg or .webp.")],
    min_score: Annotated[float, share_option("Leave out instances below this score; 0 draws all that are stored.")] = 0.5,
    images: Annotated[
        str | None, typer.Option(help="Folder that the images are in now; default: where they were labelled.")
    ] = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Draw an image's current instances, those of score 0.5 and more unless --min-score says otherwise."""
    from masklake.jobs import show as command
    from masklake.pipeline.storage.options import StorageOptions
    from masklake.pipeline.storage.storage import Storage

    report = command.run(Storage(StorageOptions(endpoint_url=endpoint)), table, uri, output, min_score, images)
    if as_json:
        print_json(report)
    else:
        typer.echo(command.describe(report))


@app.command()
def label(
    source: Annotated[
        str,
        typer.Argument(metavar="INPUT", help="Images: a folder or prefix, a glob, or a list (Parquet, CSV, JSON, text)."),
    ],
    table: Annotated[str, typer.Argument(help="The table to add to, a local path or s3://; made when it is not there.")],
    weights: Annotated[str, typer.Option(help="A checkpoint of `masklake train` or `convert`, or torchvision weights' name.")],
    column: Annotated[str | None, typer.Option(help="The list's column that names the images; default: uri.")] = None,
    precision: Annotated[
        Literal["auto", "fp32", "tf32", "bf16", "fp16"],
        typer.Option(help="Arithmetic of the network; auto: bf16 on a GPU that has it, else fp32."),
    ] = "auto",
    score_threshold: Annotated[float | None, share_option("Least score that is stored; default: the model's (0.05).")] = None,
    max_detections: Annotated[
        int | None, typer.Option(help="Most instances per image; default: the model's.", min=1, max=1000)
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks with commas between: box,mask,keypoint; default: all of the model.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images that go through the network together.", min=1)] = 4,
    tick: Annotated[str | None, typer.Option(help="The run's id, for schedulers: a tick is labelled once.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Also try again what failed for good.")] = False,
    max_failed: Annotated[float, share_option("Share of failed images up to which the exit code is 0.")] = 0.05,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the model runs.")] = "auto",
    workers: Annotated[int | None, typer.Option(help="Model replicas; default: one per GPU, else one per core.", min=1)] = None,
    max_pixels: Annotated[
        int, typer.Option(help="Largest width x height; larger images become too_large.", min=2, max=2**32 - 1)
    ] = 100_000_000,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else this machine.")] = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Label images into a table: each new or changed image once, whatever happens on the way.

    The same command goes on after a kill. Exit code 41: more images failed than --max-failed allows (the table holds all).
    """
    from masklake.jobs import label as command
    from masklake.jobs.labelling.plan import check_failures
    from masklake.jobs.labelling.progress import written_above

    options = command.options(
        input={"uri": source, "column": column},
        table=table,
        weights=weights,
        storage={"endpoint_url": endpoint},
        predict={
            "precision": precision,
            "score_threshold": score_threshold,
            "max_detections": max_detections,
            "tasks": split_tasks(tasks),
            "batch_size": batch_size,
        },
        limits={"max_pixels": max_pixels},
        tick=tick,
        retry_failed=retry_failed,
        device=device,
        workers=workers,
        address=address,
    )
    with redirect_stdout(sys.stderr):  # Ray may write to stdout; that is for the result
        report = command.run(options, say=written_above)
    if as_json:
        print_json(report)
    else:
        typer.echo(command.describe(report))
    check_failures(report.statuses, max_failed)


@app.command()
def train(
    train_json: Annotated[
        str | None,
        typer.Argument(metavar="TRAIN", help="COCO JSON to learn from, local or s3://; required, here or in --config."),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder or prefix that holds runs; required.")] = None,
    name: Annotated[str | None, typer.Option(help="The run's name; required. The same name goes on where it stopped.")] = None,
    config: Annotated[str | None, typer.Option(help="TOML file of options (docs/training.md); those given here win.")] = None,
    images: Annotated[str | None, typer.Option(help="Folder of the images; default: `images` beside the JSON.")] = None,
    val: Annotated[str | None, typer.Option(help="COCO JSON to score on.")] = None,
    val_images: Annotated[str | None, typer.Option(help="Folder of its images; default: `images` beside it.")] = None,
    preset: Annotated[str | None, typer.Option(help="Model preset; default: tiny.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks with commas between: box,mask,keypoint; default: what preset and data have.")
    ] = None,
    learn: Annotated[
        Literal["joint", "rpn", "detector", "separate", "four_step"] | None,
        typer.Option(help="How RPN and detector learn (docs/training.md); default: joint."),
    ] = None,
    proposals: Annotated[str | None, typer.Option(help="Parquet file of `masklake propose`, for --learn detector.")] = None,
    weights: Annotated[str | None, typer.Option(help="Checkpoint, or name of torchvision weights, to start from.")] = None,
    reset_predictors: Annotated[
        bool | None, typer.Option("--reset-predictors", help="The weights are of other categories: start new last layers.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Training processes; default: 1.", min=1)] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"] | None, typer.Option(help="Default: GPUs where there are any.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images; default: the recipe's.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step and worker; default: the recipe's.", min=1)] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate; default: the recipe's.", callback=check_positive)
    ] = None,
    crop: Annotated[int | None, typer.Option(help="Train on random windows of this many pixels a side.", min=32)] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Epochs between evaluations; 0: after the last.", min=0)] = None,
    keep: Annotated[Literal["last", "best"] | None, typer.Option(help="The epoch whose model is exported.")] = None,
    allow_missing: Annotated[
        bool | None, typer.Option("--allow-missing", help="Leave out images that are absent or cannot be used.")
    ] = None,
    max_unusable: Annotated[
        float | None,
        share_option(
            "Share of images, and of instances, that may be left out; default: 0.05. Without it or --allow-missing no image is "
            "left out."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice; default: 0.", min=0, max=2**32 - 1)] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else this machine.")] = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Train a detector on COCO data; write a checkpoint, its AP and its curves.

    The same command goes on after the last complete epoch, and says so when the run is complete.
    """
    from masklake.jobs import train as command

    options = command.read_options(
        config,
        {
            "train": train_json,
            "output": output,
            "name": name,
            "images": images,
            "val": val,
            "val_images": val_images,
            "preset": preset,
            "tasks": split_tasks(tasks),
            "learn": learn,
            "proposals": proposals,
            "weights": weights,
            "reset_predictors": reset_predictors,
            "workers": workers,
            "device": device,
            "recipe": {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate},
            "augmentation": {"crop": crop},
            "evaluate_every": evaluate_every,
            "keep": keep,
            "allow_missing": allow_missing,
            "max_unusable": max_unusable,
            "seed": seed,
            "address": address,
            "storage": {"endpoint_url": endpoint},
        },
    )
    with redirect_stdout(sys.stderr):  # Ray may write to stdout; that is for the result
        report = command.run(options)
    if as_json:
        print_json(report)
    else:
        typer.echo(command.describe(report))


@app.command()
def propose(
    coco: Annotated[str, typer.Argument(metavar="COCO", help="COCO JSON of the images, local or s3://.")],
    weights: Annotated[str, typer.Option(help="A MaskLake checkpoint with a trained RPN (`masklake train --learn rpn`).")],
    output: Annotated[str, typer.Option("--output", "-o", help="The Parquet file to write, local or s3://.")],
    images: Annotated[str | None, typer.Option(help="Folder of the images; default: `images` beside the JSON.")] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Leave out images that are absent or cannot be used.")
    ] = False,
    max_unusable: Annotated[
        float | None,
        share_option("Share of images that may be left out; default: 0.05. Without it or --allow-missing none is left out."),
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the model runs.")] = "auto",
    workers: Annotated[int | None, typer.Option(help="Model replicas; default: one per GPU, else one per core.", min=1)] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else this machine.")] = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Store an RPN's proposals of every image, for `masklake train --learn detector --proposals`."""
    from masklake.jobs import propose as command
    from masklake.pipeline.storage.options import StorageOptions

    options = command.ProposeOptions(
        coco=coco,
        images=images,
        weights=weights,
        output=output,
        allow_missing=allow_missing,
        max_unusable=max_unusable,
        device=device,
        workers=workers,
        address=address,
        storage=StorageOptions(endpoint_url=endpoint),
    )
    with redirect_stdout(sys.stderr):  # Ray may write to stdout; that is for the result
        report = command.run(options, say=lambda line: typer.echo(line, err=True))
    if as_json:
        print_json(report)
    else:
        proposals, of_images = counted(report.proposals, "proposal"), counted(report.images, "image")
        typer.echo(f"{report.output}: {proposals} of {of_images} by {report.model_id}")


@app.command()
def evaluate(
    table: Annotated[str, typer.Argument(help="The table, a local path or s3://.")],
    truth: Annotated[str, typer.Option(help="COCO JSON of the true instances, local or s3://.")],
    images: Annotated[
        str | None, typer.Option(help="Folder of the truth's images; default: match the ends of the table's URIs.")
    ] = None,
    labelling_run: Annotated[
        str | None, typer.Option("--run", help="One labelling run; default: each image's newest row.")
    ] = None,
    max_dets: Annotated[
        list[int] | None, typer.Option(help="Detections per image that count; repeat for several. Default: 1, 10, 100.", min=1)
    ] = None,
    iou_score: Annotated[float, share_option("Least score of a detection in the mean IoU.")] = 0.5,
    max_unusable: Annotated[
        float | None, share_option("Share of the truth's instances that may be left out; default: 0.05.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Also write the report as JSON here.")] = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Score a table's labels: COCO AP of boxes, masks and keypoints, and the foreground's mean IoU."""
    from masklake.jobs import evaluate as command
    from masklake.pipeline.storage.options import StorageOptions
    from masklake.pipeline.storage.storage import Storage

    storage = Storage(StorageOptions(endpoint_url=endpoint))
    dets = max_dets or (1, 10, 100)
    report = command.run(storage, table, truth, images, labelling_run, dets, iou_score, output, max_unusable)
    if as_json:
        print_json(report)
    else:
        typer.echo(command.describe(report))


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="The folder for everything it makes.")] = "out/demo",
    train_images: Annotated[int, typer.Option(help="Images drawn to learn from.", min=8)] = 400,
    unseen_images: Annotated[int, typer.Option(help="Images drawn to label.", min=12)] = 500,
    epochs: Annotated[int, typer.Option(help="Passes over the images.", min=1)] = 10,
    as_json: AsJson = False,
) -> None:
    """See the whole product at work on drawn shapes: train, label, score, query."""
    from masklake.jobs import demo as command

    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        report = command.run(output, train_images, unseen_images, epochs, say=lambda line: typer.echo(line, err=as_json))
    if as_json:
        print_json(report)


def main() -> None:
    """Entry point of the `masklake` script."""
    stopping = Stopping(lambda by: stopped_line(command_of(sys.argv[1:]), by))
    stopping.install()
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()  # here, where its failure still has an exit code
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
        if isinstance(error, USAGE_ERROR):
            _end(2, usage_line(error))
        known = error if isinstance(error, MaskLakeError) else _refused_by_the_machine(error)
        if known is None:
            raise
        _end(known.exit_code, str(known))
    if code == INTERRUPTED:  # how typer ends on Ctrl-C, without a word
        code = stopping.say()
    sys.exit(code)


def _end(code: int, message: str) -> NoReturn:
    if message:
        sys.stderr.write(f"masklake: error: {message}\n")
    sys.exit(code)


def _refused_by_the_machine(error: Exception) -> MaskLakeError | None:
    """The last net: a permission, a path or a full disk that no command looked at by itself is the user's to mend, too."""
    from masklake.pipeline.storage.errors import of_the_machine

    known = of_the_machine(error)
    if known is not None:
        _drop_output()
    return known


def _end_without_reader() -> NoReturn:
    """Who reads our output has seen enough (`| head`); nothing can be written any more."""
    _drop_output()
    sys.exit(141)


def _drop_output() -> None:
    """What is still held back of stdout could not be written at exit either, and would end in a second error there."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def comes_from_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: Python 3.11 wraps it where a class is being made, libraries where they clean up."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error is not None


if __name__ == "__main__":
    main()
