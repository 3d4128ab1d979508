"""`masklake.label` and `masklake.train`: the commands of the same names, as functions."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack

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
    retry_failed: bool = False,
    device: Device = "auto",
    workers: int | None = None,
    block_rows: int | None = None,
    address: str | None = None,
    progress: bool = True,
    **storage: Unpack[StorageKeywords],
) -> LabelReport:
    """Label images into a table: each new or changed image once. The same call continues a run that was stopped.

    Ray starts in this process unless it runs already, or `address` or RAY_ADDRESS names a cluster.

    Args:
        source: A folder or prefix (searched recursively), a glob, one image, or a Parquet, CSV, text or JSON list of URIs.
        table: The table's folder or prefix; created if absent.
        weights: A MaskLake checkpoint, local or s3://, or the name of torchvision weights.
        column: Column of a list that holds the URIs; default: `uri`, or the only one.
        precision: Arithmetic of the network; `auto` is bf16 on a GPU that has it, else fp32.
        score_threshold: Minimum score of a stored instance; default: the model's (0.05).
        nms_iou: IoU above which the weaker of two boxes of a category is dropped; default: the model's.
        max_detections: Maximum number of instances per image; default: the model's (100).
        mask_threshold: Probability above which a pixel belongs to the mask; default: the model's (0.5).
        tasks: Any of "box", "mask" and "keypoint"; default: all that the model has.
        batch_size: Images that go through the network together on a GPU.
        max_bytes: Larger files become `too_large`.
        max_pixels: Images with more pixels become `too_large`.
        max_side: Images with a longer side, in pixels, become `too_large`.
        tick: The run's id, for schedulers; default: derived from the run's content.
        retry_failed: Also try permanent failures again (decode_error, crashed, too_large).
        device: Where the model runs.
        workers: Model replicas; default: one per GPU, else one per core.
        block_rows: Images written together; default: by the run's size.
        address: Ray cluster.
        progress: Show a progress bar on stderr.
        **storage: Endpoint, region and the like (`StorageKeywords`).

    Returns:
        What the run did. Failed images are rows of the table, too: look at `statuses` and `failed_share`.

    Raises:
        MaskLakeError: Bad options, input, table or weights, a store that refuses, or a cluster that cannot do it.
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
        "retry_failed": retry_failed,
        "device": device,
        "workers": workers,
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
    """Train a detector on COCO data; write a checkpoint, its AP and its curves.

    The same call continues after the last complete epoch, and returns at once if the run is complete. Ray starts in this
    process unless it runs already, or `address` or RAY_ADDRESS names a cluster.

    Args:
        train: COCO JSON to learn from, local or s3://.
        output: Folder or prefix that holds runs.
        name: The run's name, and that of its folder.
        images: Folder of the images; default: `images` beside the JSON.
        val: COCO JSON to score on; without it there is no AP.
        val_images: Folder of its images; default: `images` beside it.
        preset: Model preset.
        tasks: Any of "box", "mask" and "keypoint"; default: those that both preset and data have.
        learn: How RPN and detector are trained: together, one of them alone, or in alternating phases.
        proposals: Parquet file of `masklake propose`, for `learn="detector"`.
        weights: Checkpoint, or name of torchvision weights, to start from.
        reset_predictors: Start with new last layers, for weights of other categories.
        workers: Training processes.
        device: `auto` takes GPUs if there is one per worker.
        threads: CPU threads per worker; default: its share of the cores.
        seed: Random seed.
        recipe: Changes to the preset's recipe, such as `{"epochs": 3}`.
        model: Changes to the preset's `ModelConfig`, by field.
        augmentation: Changes to the default augmentation.
        evaluate_every: Epochs between evaluations; 0: only after the last.
        max_dets: Detections per image that AP and AR count.
        keep: The epoch whose model is exported; "best" needs `val`.
        allow_missing: Leave out images that are absent or cannot be used.
        max_unusable: Maximum share of images, and of instances, that may be left out; default: 0.05, but no image without
            `allow_missing`.
        keep_empty: Also learn from images without any instance.
        max_failures: Restarts after a worker's death.
        address: Ray cluster.
        **storage: Endpoint, region and the like (`StorageKeywords`).

    Returns:
        Where the checkpoint, metrics and curves are, and the scores.

    Raises:
        MaskLakeError: Bad options or data, a store that refuses, or a training that failed.
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
    """A path as text; anything else as it is, for the options to judge."""
    return os.fspath(place) if isinstance(place, os.PathLike) else place
