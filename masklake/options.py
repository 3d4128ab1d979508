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
    """Options of the storage (`StorageOptions`). Credentials come from the environment or a profile.

    endpoint_url: S3 endpoint URL (MinIO, Ceph, R2). region, profile: as for AWS's own tools. anonymous: send unsigned requests,
    for public buckets. connect_timeout_s, request_timeout_s: seconds. max_retries: maximum number of retries of a request.
    """

    endpoint_url: str | None
    region: str | None
    profile: str | None
    anonymous: bool
    connect_timeout_s: float
    request_timeout_s: float
    max_retries: int


class RecipeKeywords(TypedDict, total=False):
    """Changes to the preset's recipe (`Recipe`); docs/training.md explains the fields."""

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
    """Random changes to training images (`Augmentation`); docs/training.md explains the fields.

    flip, flip_vertical: mirror half of the images. crop: side of a random square window, in pixels. scale: smallest and largest
    factor of a random scaling.
    """

    flip: bool
    flip_vertical: bool
    crop: int | None
    scale: tuple[float, float]


def storage_of(keywords: StorageKeywords) -> Storage:
    """Returns Storage with these options. Raises ConfigError for invalid ones."""
    from masklake.pipeline.storage.options import StorageOptions
    from masklake.pipeline.storage.storage import Storage

    return Storage(validated(StorageOptions, dict(keywords), "the storage options"))
