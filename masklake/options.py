"""Keyword options of the public API that several functions share, for type checkers and for completion in an editor.

Each type has the fields of one options model, which holds the defaults and the checks. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict

from masklake.model.errors import validated

if TYPE_CHECKING:
    from masklake.pipeline.storage.storage import Storage


class StorageKeywords(TypedDict, total=False):
    """Where storage is and who asks: `StorageOptions`. Credentials come from the environment or a profile.

    endpoint_url: an S3 endpoint (MinIO, Ceph, R2). region, profile: as of AWS's tools. anonymous: send unsigned requests, for
    public buckets. connect_timeout_s, request_timeout_s: seconds. max_retries: of one request.
    """

    endpoint_url: str | None
    region: str | None
    profile: str | None
    anonymous: bool
    connect_timeout_s: float
    request_timeout_s: float
    max_retries: int


class RecipeKeywords(TypedDict, total=False):
    """Changes to the preset's recipe: `Recipe`, explained in docs/training.md."""

    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    reference_batch: int | None
    momentum: float
    weight_decay: float
    clip_norm: float | None
    warmup_steps: int
    warmup_factor: float
    schedule: Literal["step", "cosine"]
    milestones: Sequence[float]
    gamma: float
    epochs: int
    batch_size: int


class AugmentationKeywords(TypedDict, total=False):
    """What training changes in an image: `Augmentation`, explained in docs/training.md.

    flip, flip_vertical: mirror half of the images. crop: side of a random window, pixels. scale: range of a random enlargement.
    """

    flip: bool
    flip_vertical: bool
    crop: int | None
    scale: tuple[float, float]


def storage_of(keywords: StorageKeywords) -> Storage:
    """Handles on storage with these options."""
    from masklake.pipeline.storage.options import StorageOptions
    from masklake.pipeline.storage.storage import Storage

    return Storage(validated(StorageOptions, dict(keywords), "the storage options"))
