"""Instances to Arrow rows and back."""

from __future__ import annotations

import numpy as np

from masklake.model import Instances
from masklake.pipeline.images.status import Status
from masklake.pipeline.table.rows import Outcome, outcome_rows
from masklake.pipeline.table.schema import FILE_SCHEMA

NAMES = {1: "person", 7: "cup"}


def instances(count: int, masks: bool = True, keypoints: bool = True) -> Instances:
    rng = np.random.default_rng(count)
    points = rng.random((count, 2, 3), dtype=np.float32)
    points[1::2] = np.nan  # every second is a cup, which has no keypoints
    return Instances(
        size=(10, 20),
        boxes=rng.random((count, 4), dtype=np.float32),
        scores=np.linspace(1, 0.5, count, dtype=np.float32),
        labels=np.array([1, 7] * count)[:count],
        rles=[f"rle{number}".encode() for number in range(count)] if masks else None,
        areas=np.arange(count) if masks else None,
        keypoints=points if keypoints else None,
    )


def rows(*found: Instances | None) -> list[dict]:
    outcomes = [Outcome(n, f"u{n}", "e", 3, Status.OK, instances=one) for n, one in enumerate(found)]
    table = outcome_rows(outcomes, model_id="m", label_id="l", category_names=NAMES)
    assert table.schema == FILE_SCHEMA
    table.validate(full=True)
    return table.to_pylist()


def test_columns_are_aligned() -> None:
    three, none, two = rows(instances(3), instances(0), instances(2))
    assert [one["category"] for one in three["instances"]] == ["person", "cup", "person"]
    assert [one["category_id"] for one in two["instances"]] == [1, 7]
    assert three["rles"] == [b"rle0", b"rle1", b"rle2"]
    assert [one["area"] for one in three["instances"]] == [0, 1, 2]
    assert [len(points) for points in three["keypoints"]] == [2, 0, 2]
    assert (none["instances"], none["rles"], none["keypoints"]) == ([], [], [])
    assert tuple(two["instances"][1]["box"].values()) == tuple(instances(2).boxes[1].tolist())
    point = three["keypoints"][2][1]
    assert (point["x"], point["y"], point["score"]) == tuple(instances(3).keypoints[2, 1].tolist())


def test_without_masks_or_keypoints_the_lists_stay_aligned() -> None:
    (only,) = rows(instances(2, masks=False, keypoints=False))
    assert only["rles"] == [None, None]
    assert only["keypoints"] == [[], []]
    assert [one["area"] for one in only["instances"]] == [None, None]


def test_an_image_without_an_answer_has_empty_lists() -> None:
    outcome = Outcome(5, "u", None, None, Status.MISSING, error="gone")
    (row,) = outcome_rows([outcome], model_id="m", label_id="l", category_names={}).to_pylist()
    assert (row["status"], row["error"], row["etag"], row["bytes"]) == ("missing", "gone", None, None)
    assert (row["instances"], row["rles"], row["keypoints"]) == ([], [], [])


def test_no_outcomes_give_an_empty_table() -> None:
    assert outcome_rows([], model_id="m", label_id="l", category_names={}).num_rows == 0
