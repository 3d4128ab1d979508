"""The fields of the options: name, type, default, range and help text, each in one place and without pydantic.

A model of options inherits its fields (`PredictOptions` those of `PredictFields`) and adds the checks. The command line
declares its parameters from the same fields (`jobs.terminal.parameters`). All `fields.py` modules avoid heavy imports: that of
pydantic alone takes as long as a whole help page. They keep their annotations as objects (no `from __future__ import
annotations`): evaluating them from text would add 12 ms to every start of the command line.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
AnyPrecision = Literal["auto"] | Precision
Task = Literal["box", "mask", "keypoint"]
Device = Literal["auto", "cpu", "cuda"]
TrainingMode = Literal["joint", "rpn", "detector", "separate", "four_step"]
"""Which stages are trained, and in which order (`model.phases`)."""


@dataclass(frozen=True)
class Option:
    """Describes an option, as metadata of its `Annotated` type. Pydantic reads the range, the command line the rest.

    help: one sentence or two. default: description of the default, if it is None.
    gt, ge, le, lt: the range of a number, or of each number of a tuple. min_length: of a collection.
    panel: panel of the help page; None: the command line does not have the option, unless it is an argument.
    name: name on the command line, if it is not the field's. short: a dash and a letter. argument: whether it is positional.
    metavar: name of an argument on the help page, if it is not the field's in capitals.
    """

    help: str
    default: str | None = None
    gt: float | None = None
    ge: float | None = None
    le: float | None = None
    lt: float | None = None
    min_length: int | None = None
    panel: str | None = None
    name: str | None = None
    short: str | None = None
    argument: bool = False
    metavar: str | None = None

    __is_annotated_types_grouped_metadata__ = True  # to pydantic: iterate over it (the protocol of `annotated_types`)

    def __iter__(self) -> Iterator[Any]:
        """Yields the constraints in pydantic's form."""
        from pydantic import Field

        limits = {
            name: getattr(self, name) for name in ("gt", "ge", "le", "lt", "min_length") if getattr(self, name) is not None
        }
        yield from Field(**limits).metadata


@dataclass(frozen=True)
class Group:
    """Metadata of a field that holds changes to other options, by name. default: description of the unchanged values."""

    fields: type
    default: str


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PredictFields:
    """Options of a detector's `predict`."""

    precision: Annotated[
        AnyPrecision,
        Option("Arithmetic of the network. `auto` is bf16 on a GPU that supports it and fp32 elsewhere.", panel="Model"),
    ] = "fp32"
    """Boxes, scores and suppression are always fp32. `fp32` is IEEE single precision on every device, `tf32` lets a GPU round
    the factors of its products to 10 bits (on a CPU it is `fp32`)."""
    score_threshold: Annotated[
        float | None,
        Option("Minimum score of a stored instance.", default="the model's, usually 0.05", ge=0, le=1, panel="Model"),
    ] = None
    nms_iou: Annotated[
        float | None, Option("IoU above which the weaker of two boxes of a category is dropped.", ge=0, le=1)
    ] = None
    max_detections: Annotated[
        int | None,
        Option("Maximum number of instances per image.", default="the model's, usually 100", gt=0, le=1000, panel="Model"),
    ] = None
    mask_threshold: Annotated[float | None, Option("Probability above which a pixel belongs to the mask.", ge=0, le=1)] = None
    tasks: Annotated[
        frozenset[Task] | None,
        Option(
            "Tasks to run, separated by commas: box,mask,keypoint.", default="all of the model's", min_length=1, panel="Model"
        ),
    ] = None
    batch_size: Annotated[int, Option("Images per forward pass on a GPU.", gt=0, panel="Model")] = 4
    """Images of a batch have equal canvases; blank images fill incomplete batches. On a CPU images run one at a time, which is
    faster."""
