"""`masklake.label` and `masklake.train`: the commands of the same names, as functions."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack

from masklake.jobs.fields import IfRunning
from masklake.model.errors import validated
from masklake.model.fields import AnyPrecision, Device, Task, TrainingMode
from masklake.options import AugmentationKeywords, RecipeKeywords, StorageKeywords

if TYPE_CHECKING:
    from masklake.jobs.label import LabelReport
    from masklake.jobs.train import TrainReport


def label(
    source: str | os.PathLike[str],
    table: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str],
    column: str | None = None,
    precision: AnyPrecision = "auto",
    score_threshold: float | None = None,
    nms_iou: float | None = None,
    max_detections: int | None = None,
    mask_threshold: float | None = None,
    tasks: Collection[Task] | None = None,
    batch_size: int = 4,
    max_bytes: int = 256 * 2**20,
    max_pixels: int = 100_000_000,
    max_side: int = 65_535,
    tick: str | None = None,
    if_running: IfRunning = "fail",
    retry_failed: bool = False,
    device: Device = "auto",
    workers: int | None = None,
    price_per_hour: float | None = None,
    block_rows: int | None = None,
    address: str | None = None,
    progress: bool = True,
    **storage: Unpack[StorageKeywords],
) -> LabelReport:
    """Labels images into a table, each new or changed image once. The same call continues a run that was interrupted.

    Ray starts in this process, unless it is connected to Ray already, or `address` or RAY_ADDRESS names a cluster.

    Args:
        source: A folder or prefix (searched recursively), a glob, one image, or a Parquet, CSV, text or JSON list of URIs.
        table: Folder or prefix of the table; created if it does not exist.
        weights: A MaskLake checkpoint, local or s3://, or the name of torchvision weights.
        column: Column of a list that holds the URIs; default: `uri`, or the only one.
        precision: Arithmetic of the network; `auto` is bf16 on a GPU that supports it, else fp32.
        score_threshold: Minimum score of a stored instance; default: the model's (0.05).
        nms_iou: IoU above which the weaker of two boxes of a category is dropped; default: the model's.
        max_detections: Maximum number of instances per image; default: the model's (100).
        mask_threshold: Probability above which a pixel belongs to the mask; default: the model's (0.5).
        tasks: Any of "box", "mask" and "keypoint"; default: all of the model's.
        batch_size: Number of images per forward pass on a GPU.
        max_bytes: Maximum size of a file. Larger files get the status `too_large`.
        max_pixels: Maximum width x height. Larger images get the status `too_large`.
        max_side: Maximum width and height in pixels. Larger images get the status `too_large`.
        tick: ID of the run, for schedulers; default: derived from the run's content.
        if_running: What to do while another driver works on the same run: raise LeaseHeldError, do nothing, or wait until it
            has ended.
        retry_failed: Retry images with permanent failures (decode_error, crashed, too_large).
        device: Device to run the model on.
        workers: Number of model replicas; default: one per GPU, else one per core.
        price_per_hour: Price of the machines per hour, for the cost in the list of runs.
        block_rows: Number of images that a worker takes at a time; default: 512, fewer at the end of a run.
        address: Address of a Ray cluster; default: RAY_ADDRESS, else this process.
        progress: Show a progress bar on stderr.
        **storage: Options of the storage, such as `endpoint_url` and `region` (`StorageKeywords`).

    Returns:
        The results of the run. Failed images are rows of the table, too: see `statuses` and `failed_share`.

    Raises:
        MaskLakeError: Invalid options, input, table or weights, an error of the storage, or a cluster that is too small or
            out of reach. Each subclass names one cause.
    """
    from masklake.jobs import label as command

    values = {
        "input": {"uri": _text(source), "column": column},
        "table": _text(table),
        "weights": _text(weights),
        "storage": storage,
        "predict": {
            "precision": precision,
            "score_threshold": score_threshold,
            "nms_iou": nms_iou,
            "max_detections": max_detections,
            "mask_threshold": mask_threshold,
            "tasks": tasks,
            "batch_size": batch_size,
        },
        "limits": {"max_bytes": max_bytes, "max_pixels": max_pixels, "max_side": max_side},
        "tick": tick,
        "if_running": if_running,
        "retry_failed": retry_failed,
        "device": device,
        "workers": workers,
        "price_per_hour": price_per_hour,
        "block_rows": block_rows,
        "address": address,
        "progress": progress,
    }
    return command.run(validated(command.LabelOptions, values, "the labelling options"))


def train(
    train: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    name: str,
    images: str | os.PathLike[str] | None = None,
    val: str | os.PathLike[str] | None = None,
    val_images: str | os.PathLike[str] | None = None,
    preset: str = "tiny",
    tasks: Collection[Task] | None = None,
    learn: TrainingMode = "joint",
    proposals: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    reset_predictors: bool = False,
    workers: int = 1,
    device: Device = "auto",
    threads: int | None = None,
    seed: int = 0,
    recipe: RecipeKeywords | None = None,
    model: Mapping[str, Any] | None = None,
    augmentation: AugmentationKeywords | None = None,
    evaluate_every: int = 0,
    max_dets: Sequence[int] = (1, 10, 100),
    keep: Literal["last", "best"] = "last",
    allow_missing: bool = False,
    max_unusable: float | None = None,
    keep_empty: bool = False,
    max_failures: int = 2,
    address: str | None = None,
    **storage: Unpack[StorageKeywords],
) -> TrainReport:
    """Trains a detector on COCO data, and writes a checkpoint, its AP and its loss curves.

    The same call continues after the last complete epoch, and returns at once if the run is complete. Ray starts in this
    process, unless it is connected to Ray already, or `address` or RAY_ADDRESS names a cluster.

    Args:
        train: COCO JSON file to train on, local or s3://.
        output: Folder or prefix that holds the runs.
        name: Name of the run and of its folder.
        images: Folder of the images; default: `images`, beside the JSON file.
        val: COCO JSON file to evaluate on. Without it no AP is computed.
        val_images: Folder of the images to evaluate on; default: `images`, beside that JSON file.
        preset: Model preset.
        tasks: Any of "box", "mask" and "keypoint"; default: those of both preset and data.
        learn: How the RPN and the detector are trained: together, alone, or in turn (docs/training.md).
        proposals: Parquet file of `masklake propose`, for `learn="detector"`; default: the model's own.
        weights: Checkpoint, or name of torchvision weights, to start from; default: random weights.
        reset_predictors: Reinitialise the last layers, for categories other than those of the weights.
        workers: Number of training processes.
        device: Device to train on. `auto` uses GPUs if there is one per worker.
        threads: CPU threads per worker; default: its share of the cores.
        seed: Random seed.
        recipe: Changes to the preset's recipe, such as `{"epochs": 3}`.
        model: Changes to the preset's `ModelConfig`, by field.
        augmentation: Changes to the default augmentation.
        evaluate_every: Number of epochs between evaluations. 0 evaluates after the last epoch only.
        max_dets: Maximum numbers of detections per image, for AP and AR.
        keep: Epoch whose model is exported. "best" requires `val`.
        allow_missing: Leave out images that are missing or unusable.
        max_unusable: Maximum share of images, and of instances, that may be left out; default: 0.05, but no images without
            `allow_missing`.
        keep_empty: Also train on images without instances.
        max_failures: Maximum number of restarts after a worker ended.
        address: Address of a Ray cluster; default: RAY_ADDRESS, else this process.
        **storage: Options of the storage, such as `endpoint_url` and `region` (`StorageKeywords`).

    Returns:
        The scores, and where the checkpoint, metrics and curves are.

    Raises:
        MaskLakeError: Invalid options or data, an error of the storage, a cluster that is too small or out of reach, or a
            training that failed. Each subclass names one cause.
    """
    from masklake.jobs import train as command
    from masklake.jobs.training.options import TrainOptions

    values = {
        "train": _text(train),
        "output": _text(output),
        "name": name,
        "images": _text(images),
        "val": _text(val),
        "val_images": _text(val_images),
        "preset": preset,
        "tasks": tasks,
        "learn": learn,
        "proposals": _text(proposals),
        "weights": _text(weights),
        "reset_predictors": reset_predictors,
        "workers": workers,
        "device": device,
        "threads": threads,
        "seed": seed,
        "recipe": recipe or {},
        "model": model or {},
        "augmentation": augmentation or {},
        "evaluate_every": evaluate_every,
        "max_dets": max_dets,
        "keep": keep,
        "allow_missing": allow_missing,
        "max_unusable": max_unusable,
        "keep_empty": keep_empty,
        "max_failures": max_failures,
        "address": address,
        "storage": storage,
    }
    return command.run(validated(TrainOptions, values, "the training options"))


def _text(place: Any) -> Any:
    """Returns a path as text, and anything else unchanged, for the options to validate."""
    return os.fspath(place) if isinstance(place, os.PathLike) else place
