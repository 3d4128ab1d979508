"""The decisions of a labelling run: identity, workers, rounds, and whether too many images failed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masklake.jobs.cluster.connection import RESERVED_CPUS, Capacity
from masklake.jobs.labelling import plan as label_plan
from masklake.jobs.labelling.plan import (
    FIRST_LIMITS,
    FIRST_OPTIONS,
    LOST_BLOCKS,
    RETRY_ROWS,
    Round,
    cannot_start,
    check_failures,
    failed_share,
    label_id,
    plan_workers,
    rounds,
)
from masklake.model import PRESETS, MaskRCNN, PredictOptions
from masklake.model.errors import ConfigError
from masklake.model.identity import differing
from masklake.pipeline.errors import ClusterTooSmallError, TooManyFailuresError
from masklake.pipeline.images.decode import DecodeLimits

TINY = PRESETS["tiny"]
MEMORY = float(8 * 2**30)


def laptop(cores: int, gpus: int = 0) -> Capacity:
    return Capacity(cores + RESERVED_CPUS, gpus, MEMORY, embedded=True)


def identity(predict: PredictOptions | None = None, limits: DecodeLimits | None = None, model: str = "tiny-0") -> str:
    return label_id(model, MaskRCNN(TINY).settings(predict or PredictOptions()), limits or DecodeLimits())


def test_the_label_id_names_everything_that_changes_a_row() -> None:
    changes = [
        identity(model="tiny-1"),
        identity(PredictOptions(precision="bf16")),
        identity(PredictOptions(score_threshold=0.5)),
        identity(PredictOptions(max_detections=7)),
        identity(PredictOptions(mask_threshold=0.4)),
        identity(PredictOptions(nms_iou=0.3)),
        identity(PredictOptions(tasks=frozenset({"box"}))),
        identity(limits=DecodeLimits(max_pixels=1000)),
    ]
    assert len({identity(), *changes}) == 1 + len(changes)


def test_the_label_id_names_nothing_else() -> None:
    assert identity(PredictOptions(batch_size=9)) == identity()
    assert identity(PredictOptions(score_threshold=TINY.score_threshold)) == identity()
    assert identity(PredictOptions(tasks=TINY.tasks)) == identity()


def test_a_label_id_never_moves() -> None:
    """Whoever has to change one of these makes every bucket be labelled again."""
    assert identity(model="tiny-3888091d4543") == "c6a177b65ce6f4d1"
    bf16 = PredictOptions(precision="bf16", score_threshold=0.5, max_detections=7, tasks=frozenset({"box"}))
    assert identity(bf16, DecodeLimits(max_pixels=1000), "tiny-3888091d4543") == "4741e83e0c54dca0"


def test_every_limit_has_the_default_it_was_introduced_with() -> None:
    """A limit that is new leaves label_ids alone as long as it has that default."""
    assert DecodeLimits.model_fields.keys() == FIRST_LIMITS.keys()
    assert differing(DecodeLimits(**FIRST_LIMITS), {"DecodeLimits": FIRST_LIMITS}) == FIRST_OPTIONS["limits"]


def test_a_task_that_the_model_cannot_do_is_refused() -> None:
    boxes_only = TINY.model_copy(update={"keypoint": False})
    with pytest.raises(ConfigError, match="keypoint"):
        MaskRCNN(boxes_only).settings(PredictOptions(tasks=frozenset({"keypoint"})))


def test_the_settings_of_any_detector_are_in_the_label_id() -> None:
    """In any order; those that would take another fact's name, or cannot be written down, are refused."""
    one = label_id("m", {"level": 1, "tags": {"a", "b"}}, DecodeLimits())
    assert one == label_id("m", {"tags": frozenset({"b", "a"}), "level": 1.0}, DecodeLimits())
    assert one != label_id("m", {"level": 2, "tags": {"a", "b"}}, DecodeLimits())
    with pytest.raises(ConfigError, match="names are taken: limits, model_id"):
        label_id("m", {"model_id": "x", "limits": 1, "level": 1}, DecodeLimits())
    for value in (object(), float("nan")):
        with pytest.raises(ConfigError, match="model m has settings that cannot be written as JSON"):
            label_id("m", {"level": value}, DecodeLimits())


def test_a_laptop_has_a_worker_a_core() -> None:
    plan = plan_workers(laptop(2), images=500)
    assert (plan.workers, plan.cpus_each, plan.device, plan.gpus_each) == (2, 1, "cpu", 0)
    assert plan_workers(laptop(8), images=500, requested=2).cpus_each == 4
    assert plan_workers(laptop(8), images=3).workers == 1  # no core starts a model for nothing
    assert plan_workers(laptop(8), images=3).cpus_each == 8


def test_a_gpu_has_a_worker_with_two_blocks_in_hand() -> None:
    plan = plan_workers(laptop(16, gpus=2), images=5000)
    assert (plan.workers, plan.cpus_each, plan.gpus_each, plan.device, plan.concurrency) == (2, 1, 1, "cuda", 2)
    assert plan.decode_threads == 8
    assert plan_workers(laptop(16, gpus=2), images=5000, device="cpu").device == "cpu"


def test_a_cluster_keeps_cpus_for_ray_data() -> None:
    assert plan_workers(Capacity(64, 0, MEMORY), images=10**6).workers == 62


@pytest.mark.parametrize(
    ("capacity", "requested", "device", "message"),
    [
        (laptop(2), 64, "auto", "64 workers need 64 CPUs, there are 2: give --workers 2"),
        (Capacity(2, 0, MEMORY), None, "auto", "1 worker needs 1 CPU beside the 2 that Ray Data needs itself, there are 0"),
        (laptop(2), None, "cuda", "1 worker needs 1 GPU, the cluster has 0: give --device cpu"),
        (laptop(16, gpus=2), 3, "auto", "3 workers need 3 GPUs, the cluster has 2: give --workers 2"),
        (Capacity(4, 4, MEMORY), 4, "auto", "4 workers need 4 CPUs beside the 2 .* there are 2: give --workers 2"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(capacity: Capacity, requested: int | None, device: str, message: str) -> None:
    with pytest.raises(ClusterTooSmallError, match=message):
        plan_workers(capacity, 1000, requested, device)


def test_a_second_round_has_smaller_blocks() -> None:
    assert list(rounds(images=79, workers=2)) == [
        Round(rows=20, alone=False, max_lost=LOST_BLOCKS, share=0.25),
        Round(rows=RETRY_ROWS, alone=True, max_lost=79),
    ]
    assert next(rounds(10**6, workers=8)).rows == 512
    assert next(rounds(10**7, workers=8)).max_lost == 976
    assert [step.rows for step in rounds(9, workers=2)] == [3]
    assert [step.rows for step in rounds(100, workers=2, block_rows=3)] == [3]


def test_blocks_shrink_as_the_work_runs_out() -> None:
    step = next(rounds(images=2000, workers=2))
    sizes = list(step.sizes(2000))
    assert sizes[:4] == [500, 375, 282, 211]
    assert sizes[-4:] == [1, 1, 1, 1]
    assert list(Round(rows=8, alone=True, max_lost=20).sizes(20)) == [8, 8, 4]


@given(images=st.integers(1, 10**5), workers=st.integers(1, 64), block_rows=st.none() | st.integers(1, 1000))
def test_the_blocks_of_a_round_hold_every_image_once(images: int, workers: int, block_rows: int | None) -> None:
    for step in rounds(images, workers, block_rows):
        sizes = list(step.sizes(images))
        assert sum(sizes) == images
        assert 1 <= min(sizes) <= max(sizes) <= step.rows
        assert sizes == sorted(sizes, reverse=True)


def test_a_run_of_a_few_images_has_no_pass_of_ray_data() -> None:
    assert list(rounds(8, workers=2)) == []
    assert list(rounds(1, workers=1)) == []
    assert [step.rows for step in rounds(8, workers=2, block_rows=1)] == [1]
    assert [step.rows for step in rounds(9, workers=1)] == [5]


def test_a_short_run_outlives_the_loss_of_a_node() -> None:
    """A node of eight GPUs has sixteen blocks in hand; all of a short run's blocks may be lost in its first round."""
    for images in (33, 500, 4000):
        step = next(rounds(images, workers=8))
        assert step.max_lost >= min(64, -(-images // step.rows))


def test_workers_that_end_while_they_start_are_noticed() -> None:
    assert not cannot_start(starts=0, workers=2)
    assert not cannot_start(starts=6, workers=2)
    assert cannot_start(starts=7, workers=2)


def test_the_failed_share_decides() -> None:
    statuses = {"ok": 95, "missing": 3, "decode_error": 2, "crashed": 0}
    assert failed_share(statuses) == pytest.approx(0.05)
    assert failed_share({}) == 0
    check_failures(statuses, max_failed=0.05)
    check_failures({"missing": 5}, max_failed=1.0)
    with pytest.raises(TooManyFailuresError, match=r"5\.0% of the images failed \(2 decode_error, 3 missing\)"):
        check_failures(statuses, max_failed=0.04)


@pytest.mark.parametrize(
    ("asked", "device", "cluster", "gpu", "expected"),
    [
        ("auto", "auto", False, True, "bf16"),
        ("auto", "auto", False, False, "fp32"),
        ("auto", "cpu", False, True, "fp32"),
        ("auto", "cuda", False, False, "fp32"),  # a card without it
        ("auto", "cuda", True, False, "bf16"),  # the driver of a cluster needs no GPU
        ("auto", "auto", True, True, "fp32"),  # whatever the driver's machine has
        ("auto", "cpu", True, True, "fp32"),
        ("tf32", "auto", True, True, "tf32"),
        ("fp32", "cuda", False, True, "fp32"),
    ],
)
def test_the_precision_follows_from_what_was_asked_for_and_from_this_machine(
    asked: Any, device: Any, cluster: bool, gpu: bool, expected: str
) -> None:
    assert label_plan.precision(asked, device, cluster, gpu) == expected
