"""The work of a loading task: fetches, decodes and augments the images of training rows.

`pipeline.training.stream` decides their order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from masklake.pipeline.coco.dataset import CocoDataset, learnable
from masklake.pipeline.coco.image_check import wrong_size
from masklake.pipeline.errors import EmptyInputError
from masklake.pipeline.images.decode import DecodeLimits, decode
from masklake.pipeline.images.fetch import fetch_patiently
from masklake.pipeline.images.status import Status
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import relative_to
from masklake.pipeline.training.augmentation import Sample, SampleSpec, make_sample
from masklake.pipeline.training.proposals import proposals_of
from masklake.pipeline.training.samples import Unreachable, sample_rows

REPLACEMENTS = 20
"""Maximum number of images tried in place of an unusable one: if half of all images are bad, one in a million cases fails."""


def training_rows(
    dataset: CocoDataset, folder: str, spec: SampleSpec, keep_empty: bool = False, proposals: pa.Table | None = None
) -> pa.Table:
    """Returns one row per image: image_id, uri, width, height, annotations (JSON, without crowds), and stored proposals if
    given.

    Instances that cannot be used in training are left out (`pipeline.coco.dataset.learnable`), and so are images without
    instances, unless `keep_empty`. folder: of the images. proposals: PROPOSAL_SCHEMA rows. Raises EmptyInputError if no image
    is left, AnnotationError for an image without proposals.
    """
    rows, names = [], []
    for image in dataset.images:
        instances = [
            {"category_id": a.category_id, "bbox": a.bbox, "segmentation": a.segmentation, "keypoints": a.keypoints}
            for a in dataset.annotations.get(image.id, ())
            if learnable(a, image)
        ]
        if instances or keep_empty:
            uri = relative_to(folder, image.file_name)
            rows.append((image.id, uri, image.width, image.height, json.dumps(instances)))
            names.append(image.file_name)
    if not rows:
        raise EmptyInputError(f"{dataset.source}: no image has an instance to learn from.")
    columns = ["image_id", "uri", "width", "height", "annotations"]
    table = pa.table([pa.array(column) for column in zip(*rows, strict=True)], names=columns)
    return table if proposals is None else table.append_column("proposals", proposals_of(table, names, proposals))


@dataclass(frozen=True)
class Loader:
    """Settings of a loading task: the rows of `training_rows`, the storage of their images, and the form of the samples.

    skip_bad: replace an image that cannot be used by another one.
    """

    rows: pa.Table
    spec: SampleSpec
    storage: Storage
    skip_bad: bool = False

    def load(self, rows: Sequence[int], epochs: Sequence[int]) -> pa.Table:
        """Returns SAMPLE_SCHEMA rows for these rows, augmented for these epochs; see `load_samples`.

        The replacement of an unusable image depends on seed, epoch and row. If `REPLACEMENTS` images cannot be used either, the
        row has an error.
        """
        samples = self._load(rows, epochs)
        replaced: list[list[str]] = [[] for _ in samples]
        for attempt in range(REPLACEMENTS if self.skip_bad else 0):
            bad = [place for place, (_, sample) in enumerate(samples) if _is_bad(sample)]
            if not bad:
                break
            for place in bad:
                replaced[place].append(str(samples[place][1]))
            others = [self._other(epochs[place], rows[place], attempt) for place in bad]
            for place, sample in zip(bad, self._load(others, [epochs[place] for place in bad]), strict=True):
                samples[place] = sample
        return sample_rows(samples, replaced)

    def _load(self, rows: Sequence[int], epochs: Sequence[int]) -> list[tuple[int, Sample | str]]:
        seeds = [(self.spec.seed, epoch, row) for epoch, row in zip(epochs, rows, strict=True)]
        return load_samples(self.rows.take(pa.array(rows, pa.int64())), seeds, self.spec, self.storage)

    def _other(self, epoch: int, row: int, attempt: int) -> int:
        random = np.random.default_rng((self.spec.seed, epoch, row, attempt))
        return int(random.integers(self.rows.num_rows))


def _is_bad(sample: Sample | str) -> bool:
    """Returns whether an image cannot be used, which a retry would not change."""
    return isinstance(sample, str) and not isinstance(sample, Unreachable)


def load_samples(
    rows: pa.Table, seeds: Sequence[tuple[int, int, int]], spec: SampleSpec, storage: Storage
) -> list[tuple[int, Sample | str]]:
    """Returns row numbers and samples of `training_rows` rows, each augmented with its own seed, whose last part is the row
    number.

    For an image that cannot be used, the reason takes the place of the sample: Ray would wrap an exception, with its traceback
    as the message.
    """
    limits = DecodeLimits()
    fetched = fetch_patiently(storage, rows["uri"].to_pylist(), max_bytes=limits.max_bytes)
    samples: list[tuple[int, Sample | str]] = []
    for row, got, seed in zip(rows.to_pylist(), fetched, seeds, strict=True):
        decoded = decode(got.data, limits) if got.data is not None else None
        reason = got.error if decoded is None else decoded.error
        if decoded is not None and decoded.status is Status.OK and decoded.image is not None:
            reason = wrong_size((decoded.image.shape[2], decoded.image.shape[1]), row)
            if reason is None:
                samples.append((seed[2], _sample_of(row, decoded.image, spec, seed)))
        if reason is not None:
            message = reason if reason.startswith(row["uri"]) else f"{row['uri']}: {reason}"
            samples.append((seed[2], Unreachable(message) if got.may_pass else message))
    return samples


def _sample_of(row: Mapping[str, Any], image: torch.Tensor, spec: SampleSpec, seed: tuple[int, int, int]) -> Sample:
    proposals = row.get("proposals")
    boxes = None if proposals is None else np.array(proposals, np.float64).reshape(-1, 4)
    return make_sample(image, json.loads(row["annotations"]), spec, seed, boxes)
