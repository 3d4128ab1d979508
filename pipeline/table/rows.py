"""Outcomes of images as Arrow rows of FILE_SCHEMA, built column by column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from masklake.model.instances import Instances
from masklake.pipeline.images.status import Status
from masklake.pipeline.table.schema import BOX, FILE_SCHEMA, INSTANCE, KEYPOINT


@dataclass(frozen=True)
class Outcome:
    """The outcome of one image of the manifest. Its fields are the columns of FILE_SCHEMA."""

    image_id: int
    uri: str
    etag: str | None
    bytes: int | None
    status: Status
    error: str | None = None
    width: int | None = None
    height: int | None = None
    instances: Instances | None = None


def outcome_rows(outcomes: Sequence[Outcome], *, model_id: str, label_id: str, category_names: Mapping[int, str]) -> pa.Table:
    """Returns FILE_SCHEMA rows in the given order, labelled at the current time. category_names: by category id."""
    found = [outcome.instances for outcome in outcomes]
    now = datetime.now(UTC)
    columns = {
        "image_id": [o.image_id for o in outcomes],
        "uri": [o.uri for o in outcomes],
        "etag": [o.etag for o in outcomes],
        "bytes": [o.bytes for o in outcomes],
        "width": [o.width for o in outcomes],
        "height": [o.height for o in outcomes],
        "status": [o.status.value for o in outcomes],
        "error": [o.error for o in outcomes],
        "model_id": [model_id] * len(outcomes),
        "label_id": [label_id] * len(outcomes),
        "labelled_at": [now] * len(outcomes),
        "instances": _instances(found, category_names),
        "rles": _rles(found),
        "keypoints": _keypoints(found),
    }
    return pa.table(columns, schema=FILE_SCHEMA)


def _offsets(lengths: Sequence[int]) -> pa.Array:
    """Returns the offsets, int32 (n + 1,), of n lists of these lengths in the flat values."""
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), type=pa.int32())


def _lengths(found: Sequence[Instances | None]) -> list[int]:
    return [len(instances) if instances is not None else 0 for instances in found]


def _instances(found: Sequence[Instances | None], names: Mapping[int, str]) -> pa.Array:
    """Returns list<struct>: one flat array per field, sliced by offsets."""
    some = [instances for instances in found if instances is not None and len(instances)]
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(i.boxes for i in some)])
    labels = np.concatenate([np.zeros(0, np.int64), *(i.labels for i in some)])
    areas = [i.areas.tolist() if i.areas is not None else [None] * len(i) for i in some]
    fields = [
        pa.array(labels, type=pa.int32()),
        pa.array([names[label] for label in labels.tolist()], type=pa.string()),
        pa.array(np.concatenate([np.zeros(0, np.float32), *(i.scores for i in some)]), type=pa.float32()),
        pa.StructArray.from_arrays([pa.array(boxes[:, side]) for side in range(4)], fields=list(BOX)),
        pa.array(list(chain.from_iterable(areas)), type=pa.int64()),
    ]
    return pa.ListArray.from_arrays(_offsets(_lengths(found)), pa.StructArray.from_arrays(fields, fields=list(INSTANCE)))


def _rles(found: Sequence[Instances | None]) -> pa.Array:
    """Returns list<binary>, aligned with the instances; null for each instance if no masks were requested."""
    flat = [i.rles if i.rles is not None else [None] * len(i) for i in found if i is not None]
    return pa.ListArray.from_arrays(_offsets(_lengths(found)), pa.array(list(chain.from_iterable(flat)), type=pa.binary()))


def _keypoints(found: Sequence[Instances | None]) -> pa.Array:
    """Returns list<list<struct>>: a row of NaN (a category without keypoints) becomes an empty list."""
    counts: list[int] = []
    points: list[NDArray[np.float32]] = [np.zeros((0, 3), np.float32)]
    for instances in found:
        if instances is None or instances.keypoints is None:
            counts += [0] * (len(instances) if instances is not None else 0)
            continue
        for row in instances.keypoints:
            present = row[~np.isnan(row[:, 2])]
            counts.append(len(present))
            points.append(present)
    flat = np.concatenate(points)
    structs = pa.StructArray.from_arrays([pa.array(flat[:, part]) for part in range(3)], fields=list(KEYPOINT))
    inner = pa.ListArray.from_arrays(_offsets(counts), structs)
    return pa.ListArray.from_arrays(_offsets(_lengths(found)), inner)
