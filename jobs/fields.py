"""The options of each command, from which its parameters are declared, without pydantic (see `model.fields`)."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from masklake.model.fields import Device, Group, Option, PredictFields, Task, TrainingMode
from masklake.pipeline.coco.fields import MOST_UNUSABLE
from masklake.pipeline.images.fields import DecodeFields
from masklake.pipeline.inputs.fields import InputFields
from masklake.pipeline.results.fields import MAX_DETS, MOST_DETECTIONS
from masklake.pipeline.storage.fields import StorageFields
from masklake.pipeline.table.fields import LIKELY_SCORE
from masklake.pipeline.training.fields import AugmentationFields, RecipeFields

TableArgument = Annotated[str, Option("The table: a local path or s3:// URI.", argument=True)]
IfRunning = Literal["fail", "skip", "wait"]
ReplicaDevice = Annotated[Device, Option("Device to run the model on.", panel="Cluster")]
Replicas = Annotated[
    int | None, Option("Number of model replicas.", default="one per GPU, else one per core", gt=0, panel="Cluster")
]
Address = Annotated[str | None, Option("Address of a Ray cluster.", default="RAY_ADDRESS, else this machine", panel="Cluster")]
Images = Annotated[str | None, Option("Folder of the images.", default="images, beside the JSON file", panel="Input")]
DryRun = Annotated[bool, Option("Print what would be done, and change nothing.", panel="Run")]
AllowMissing = Annotated[bool, Option("Leave out images that are missing or unusable.", panel="Input")]
ReportOutput = Annotated[
    str | None, Option("File to write the report to, as JSON, in addition to stdout.", panel="Output", short="-o")
]

SHEET_IMAGES = 12
"""Number of images on the demo's contact sheet."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DemoFields:
    """`masklake demo`."""

    output: Annotated[str, Option("Folder for all files of the demo.", panel="Output")] = "out/demo"
    train_images: Annotated[int, Option("Number of images to draw for training.", ge=8, panel="Input")] = 400
    unseen_images: Annotated[int, Option("Number of images to draw for labelling.", ge=SHEET_IMAGES, panel="Input")] = 500
    epochs: Annotated[int, Option("Passes over the training images.", gt=0, panel="Training")] = 10


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TrainFields:
    """`masklake train`."""

    train: Annotated[
        str,
        Option("COCO JSON file to train on, local or s3://. Required, here or in --config.", argument=True),
    ]
    images: Images = None
    val: Annotated[str | None, Option("COCO JSON file to evaluate on. Without it no AP is computed.", panel="Input")] = None
    val_images: Annotated[
        str | None, Option("Folder of the images to evaluate on.", default="images, beside that JSON file", panel="Input")
    ] = None
    output: Annotated[str, Option("Folder or prefix that holds the runs. Required.", panel="Output", short="-o")]
    name: Annotated[str, Option("Name of the run. Required. A run continues if its name is given again.", panel="Output")]
    preset: Annotated[str, Option("Model preset.", panel="Model")] = "tiny"
    tasks: Annotated[
        frozenset[Task] | None,
        Option(
            "Tasks to train, separated by commas: box,mask,keypoint.",
            default="those of both preset and data",
            min_length=1,
            panel="Model",
        ),
    ] = None
    learn: Annotated[
        TrainingMode,
        Option("How the RPN and the detector are trained: together, alone, or in turn (docs/training.md).", panel="Training"),
    ] = "joint"
    proposals: Annotated[
        str | None,
        Option("Parquet file of `masklake propose`, for --learn detector.", default="the model's own", panel="Input"),
    ] = None
    weights: Annotated[
        str | None,
        Option("Checkpoint, or name of torchvision weights, to start from.", default="random weights", panel="Model"),
    ] = None
    """A classifier's weights initialise the backbone."""
    reset_predictors: Annotated[
        bool, Option("Reinitialise the last layers, for categories other than those of the weights.", panel="Model")
    ] = False
    workers: Annotated[int, Option("Number of training processes.", gt=0, panel="Cluster")] = 1
    device: Annotated[Device, Option("Device to train on. `auto` uses GPUs if there is one per worker.", panel="Cluster")] = (
        "auto"
    )
    threads: Annotated[int | None, Option("CPU threads per worker.", default="its share of the cores", gt=0)] = None
    seed: Annotated[int, Option("Random seed.", ge=0, le=2**32 - 1, panel="Training")] = 0
    recipe: Annotated[dict[str, Any], Group(RecipeFields, "the preset's recipe")] = field(default_factory=dict)
    model: Annotated[dict[str, Any], Option("Changes to the preset's configuration (`model.ModelConfig`).")] = field(
        default_factory=dict
    )
    augmentation: AugmentationFields = AugmentationFields()
    evaluate_every: Annotated[
        int, Option("Number of epochs between evaluations. 0 evaluates after the last epoch only.", ge=0, panel="Training")
    ] = 0
    max_dets: Annotated[
        tuple[Annotated[int, Option("Number of detections.", gt=0, le=MOST_DETECTIONS)], ...],
        Option("Maximum numbers of detections per image.", min_length=1),
    ] = MAX_DETS
    keep: Annotated[
        Literal["last", "best"], Option("Epoch whose model is exported. `best` requires --val.", panel="Output")
    ] = "last"
    allow_missing: AllowMissing = False
    max_unusable: Annotated[
        float | None,
        Option(
            "Maximum share of images, and of instances, that may be left out.",
            default=f"{MOST_UNUSABLE:g}, but no images without --allow-missing",
            ge=0,
            le=1,
            panel="Input",
        ),
    ] = None
    keep_empty: Annotated[bool, Option("Also train on images without instances.")] = False
    max_failures: Annotated[int, Option("Maximum number of restarts after a worker ended.", ge=0)] = 2
    storage: StorageFields = StorageFields()
    address: Address = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ConvertFields:
    """`masklake convert`."""

    source: Annotated[
        str,
        Option(
            "A torchvision state dict or Detectron2 checkpoint (.pth, .safetensors, .pkl), local or s3://, or the name of "
            "torchvision weights.",
            argument=True,
        ),
    ]
    target: Annotated[str, Option("The checkpoint to write, *.safetensors, local or s3://.", argument=True)]
    preset: Annotated[str, Option("Architecture of the weights, such as maskrcnn_resnet50_fpn.", panel="Model")]
    norm_eps: Annotated[
        float | None,
        Option(
            "Epsilon of the norm layers.",
            default="0 for torchvision's own COCO_V1 files, 1e-5 for all others",
            ge=0,
            panel="Model",
        ),
    ] = None
    categories: Annotated[
        str | None,
        Option(
            "File with the categories the weights were trained on: COCO JSON, or text with one name per line.",
            default="the preset's",
            panel="Model",
        ),
    ] = None
    storage: StorageFields = StorageFields()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ProposeFields:
    """`masklake propose`."""

    coco: Annotated[str, Option("COCO JSON file of the images, local or s3://.", argument=True)]
    images: Images = None
    weights: Annotated[str, Option("A MaskLake checkpoint with a trained RPN (`masklake train --learn rpn`).", panel="Model")]
    output: Annotated[str, Option("The Parquet file to write, local or s3://.", panel="Output", short="-o")]
    allow_missing: AllowMissing = False
    max_unusable: Annotated[
        float | None,
        Option(
            "Maximum share of images that may be left out.",
            default=f"{MOST_UNUSABLE:g} with --allow-missing, else 0",
            ge=0,
            le=1,
            panel="Input",
        ),
    ] = None
    device: ReplicaDevice = "auto"
    workers: Replicas = None
    address: Address = None
    storage: StorageFields = StorageFields()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LabelFields:
    """`masklake label`."""

    input: InputFields
    table: Annotated[
        str, Option("The table to add to: a local path or s3:// URI. It is created if it does not exist.", argument=True)
    ]
    weights: Annotated[
        str,
        Option("A checkpoint of `masklake train` or `masklake convert`, or the name of torchvision weights.", panel="Model"),
    ]
    storage: StorageFields = StorageFields()
    predict: PredictFields = PredictFields(precision="auto")
    limits: DecodeFields = DecodeFields()
    tick: Annotated[
        str | None,
        Option("ID of the run, for schedulers. Each ID is labelled once.", default="derived from the input", panel="Run"),
    ] = None
    if_running: Annotated[
        IfRunning,
        Option("What to do while another driver works on the same run. `fail` exits with code 31, `skip` with 0.", panel="Run"),
    ] = "fail"
    retry_failed: Annotated[bool, Option("Retry images with permanent failures (decode_error, crashed, ...).", panel="Run")] = (
        False
    )
    device: ReplicaDevice = "auto"
    workers: Replicas = None
    price_per_hour: Annotated[
        float | None,
        Option("Price of the machines per hour, for the cost in `masklake runs`.", default="unknown", ge=0, panel="Run"),
    ] = None
    block_rows: Annotated[
        int | None, Option("Number of images that a worker takes at a time.", default="512, fewer at the end", gt=0)
    ] = None
    address: Address = None
    progress: Annotated[bool, Option("Show a progress bar on stderr.")] = True


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class QueryFields:
    """`masklake query`."""

    table: TableArgument
    sql: Annotated[
        str,
        Option(
            "DuckDB SQL in quotes, over images, detections, current_images and current_detections. `-` reads it from stdin.",
            argument=True,
        ),
    ]
    form: Annotated[
        Literal["table", "csv", "tsv", "json", "jsonl", "parquet"] | None,
        Option("Format of the result.", default="by the suffix of --output, else table", panel="Output", name="format"),
    ] = None
    output: Annotated[
        str | None,
        Option(
            "File to write the whole result to, local or s3://: *.csv, .tsv, .json, .jsonl, .parquet or .txt. "
            "Text formats may end with .gz.",
            default="stdout",
            panel="Output",
            short="-o",
        ),
    ] = None
    storage: StorageFields = StorageFields()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RunsFields:
    """`masklake runs list`."""

    table: TableArgument
    storage: StorageFields = StorageFields()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DropFields:
    """`masklake runs drop` and `masklake runs rollback`."""

    table: TableArgument
    run: Annotated[str, Option("ID of a committed run, as `masklake runs TABLE` shows it.", argument=True)]
    dry_run: DryRun = False
    storage: StorageFields = StorageFields()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VacuumFields:
    """`masklake runs vacuum`."""

    table: TableArgument
    older_than: Annotated[
        float,
        Option(
            "Days for which a dropped run's files are kept. 0 may break queries that are running.",
            ge=0,
            le=36_500,
            panel="Run",
        ),
    ] = 7.0
    dry_run: DryRun = False
    storage: StorageFields = StorageFields()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ShowFields:
    """`masklake show`."""

    table: TableArgument
    uri: Annotated[str, Option("An image of the table: its URI, or a unique ending of it, such as sub/a.jpg.", argument=True)]
    output: Annotated[str, Option("The picture to write, local or s3://: *.png, .jpg or .webp.", panel="Output", short="-o")]
    min_score: Annotated[
        float, Option("Minimum score of a drawn instance. 0 draws all stored instances.", ge=0, le=1, panel="Output")
    ] = LIKELY_SCORE
    images: Annotated[str | None, Option("Folder of the images.", default="where they were labelled", panel="Input")] = None
    storage: StorageFields = StorageFields()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EvaluateFields:
    """`masklake evaluate`."""

    table: TableArgument
    truth: Annotated[str, Option("COCO JSON file of the ground truth, local or s3://.", panel="Input")]
    images: Annotated[
        str | None,
        Option("Folder of the ground truth's images.", default="match the ends of the table's URIs", panel="Input"),
    ] = None
    labelling_run: Annotated[
        str | None,
        Option("ID of the labelling run to evaluate.", default="the newest row of each image", panel="Input", name="run"),
    ] = None
    max_dets: Annotated[
        tuple[int, ...],
        Option(
            "Maximum number of detections per image. Repeat the option for several.",
            gt=0,
            le=MOST_DETECTIONS,
            panel="Metrics",
        ),
    ] = MAX_DETS
    iou_score: Annotated[float, Option("Minimum score of a detection in the mean IoU.", ge=0, le=1, panel="Metrics")] = (
        LIKELY_SCORE
    )
    max_unusable: Annotated[
        float | None,
        Option(
            "Maximum share of ground-truth instances that may be left out.",
            default=f"{MOST_UNUSABLE:g}",
            ge=0,
            le=1,
            panel="Input",
        ),
    ] = None
    output: ReportOutput = None
    storage: StorageFields = StorageFields()
