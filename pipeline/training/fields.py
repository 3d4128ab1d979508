"""The options of a recipe and of the augmentation, without pydantic (see `model.fields`)."""

from dataclasses import dataclass
from typing import Annotated, Literal

from masklake.model.fields import Option

MOST_EPOCHS, MOST_BATCH = 1_000_000, 65_536
"""Maximum values: larger ones are typing errors, and the numbers of samples would not fit into 64 bits."""
MOST_CROP = 65_536
MOST_SCALE = 32
"""Maximum factor for the sides of an image, which takes a thousand times the memory."""

Scale = Annotated[float, Option("Factor.", ge=1 / MOST_SCALE, le=MOST_SCALE)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RecipeFields:
    """Optimiser, learning rate and its schedule."""

    optimizer: Annotated[Literal["sgd", "adamw"], Option("Optimiser.")] = "sgd"
    learning_rate: Annotated[float, Option("Peak learning rate.", gt=0, panel="Training")] = 0.02
    """For `reference_batch` images per step."""
    reference_batch: Annotated[
        int | None, Option("Number of images per step that the learning rate is for.", default="it is not scaled", gt=0)
    ] = 16
    momentum: Annotated[float, Option("Momentum of SGD, beta1 of AdamW.", ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Option("Weight decay. AdamW leaves out norms and biases.", ge=0)] = 1e-4
    clip_norm: Annotated[float | None, Option("Maximum norm of all gradients together.", default="no maximum", gt=0)] = None
    warmup_steps: Annotated[int, Option("Number of steps of linear warm-up, at most a tenth of the run.", ge=0)] = 1000
    warmup_factor: Annotated[float, Option("Share of the learning rate at the first step.", gt=0, le=1)] = 0.001
    schedule: Annotated[Literal["step", "cosine"], Option("Schedule of the learning rate.")] = "step"
    milestones: Annotated[
        tuple[Annotated[float, Option("Share of the run.", gt=0, lt=1)], ...],
        Option("Shares of the run at which the learning rate drops, in order."),
    ] = (8 / 12, 11 / 12)
    gamma: Annotated[float, Option("Factor of the learning rate at each milestone.", gt=0, le=1)] = 0.1
    epochs: Annotated[int, Option("Passes over the images.", gt=0, le=MOST_EPOCHS, panel="Training")] = 12
    """12: Detectron2's 1x schedule."""
    batch_size: Annotated[int, Option("Images per step and worker.", gt=0, le=MOST_BATCH, panel="Training")] = 2


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AugmentationFields:
    """Random changes to training images."""

    flip: Annotated[bool, Option("Mirror half of the images left to right.")] = True
    flip_vertical: Annotated[bool, Option("Mirror half of the images top to bottom (cells, aerial views).")] = False
    crop: Annotated[
        int | None,
        Option(
            "Train on random square windows with this side, in pixels after scaling.",
            default="whole images",
            ge=32,
            le=MOST_CROP,
            panel="Training",
        ),
    ] = None
    scale: Annotated[tuple[Scale, Scale], Option("Range of a random scale factor: minimum and maximum.")] = (1.0, 1.0)
