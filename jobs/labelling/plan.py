"""Decisions of a labelling run, as pure functions: its identity, workers, rounds, and the meaning of its outcome."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from masklake.jobs.cluster.connection import RESERVED_CPUS, Capacity
from masklake.model.errors import ConfigError
from masklake.model.fields import Device, Precision
from masklake.model.identity import canonical_json, differing
from masklake.model.wording import agreeing, counted
from masklake.pipeline.errors import ClusterTooSmallError, TooManyFailuresError
from masklake.pipeline.images.decode import DecodeLimits
from masklake.pipeline.images.status import Status

BLOCK_ROWS = 512
"""Maximum number of images in a block. Workers write each block in parts, so that a large block does not make a death expensive
(`pipeline.labelling.labeller.PART_S`).
"""
BLOCKS_LEFT = 2
"""Number of blocks per worker among which the images that are left are divided, so that all workers finish at about the same
time.
"""
RETRY_ROWS = 8
"""Number of images in a block when lost blocks run again, before each image runs alone."""
FIRST_OPTIONS: Mapping[str, Any] = {"precision": "fp32", "limits": {}}
FIRST_LIMITS: Mapping[str, Any] = {"max_bytes": 256 * 2**20, "max_pixels": 100_000_000, "max_side": 65_535}
"""Values that are left out of a `label_id`: for each new option (or limit) the one that equals the behaviour before it, so that
nothing is labelled again where it is not used. Add to them; never change one."""
LOST_BLOCKS = 64
"""Number of blocks that may be lost in a run of any length: more than the workers of one node process at once, so that neither
the loss of a node nor a few images that kill workers end a run.
"""
PART_ROWS = 2**18
"""Number of images that pass through Ray Data at a time: the part of a manifest in the driver's memory, about 50 MB."""
STARTS = 3
"""Number of starts of a worker in a row that may fail."""


@dataclass(frozen=True)
class WorkerPlan:
    """The model replicas of a run. concurrency: number of blocks that a worker processes at once."""

    workers: int
    cpus_each: int
    gpus_each: int
    device: Literal["cpu", "cuda"]
    concurrency: int
    decode_threads: int

    @property
    def needs(self) -> str:
        """Resources of a worker, as a clause."""
        gpus = f" and {counted(self.gpus_each, 'GPU')}" if self.gpus_each else ""
        return f"a worker needs {counted(self.cpus_each, 'CPU')}{gpus}"


@dataclass(frozen=True)
class Round:
    """One pass of Ray Data over the images that are not labelled yet.

    rows: images in the largest block. alone: a worker gets one block at a time, so that a block that kills it takes no other
    along. max_lost: blocks that may be lost before the run stops. share: blocks shrink to this share of the images that are
    left; None for blocks of equal size.
    """

    rows: int
    alone: bool
    max_lost: int
    share: float | None = None

    def sizes(self, images: int) -> Iterator[int]:
        """Returns the numbers of images in the blocks of a data set of so many images."""
        while images > 0:
            size = min(images, self.rows if self.share is None else min(self.rows, math.ceil(images * self.share)))
            yield size
            images -= size


def label_id(model_id: str, settings: Mapping[str, Any], limits: DecodeLimits) -> str:
    """Returns 16 hex digits of a hash of everything that changes a row: the model, its settings (`Detector.settings`), the
    limits.

    Options that change only the speed (batch size, workers) are not included. Raises ConfigError for settings that cannot be
    written as JSON.
    """
    own = {"model_id": model_id, "limits": differing(limits, {"DecodeLimits": FIRST_LIMITS})}
    if taken := sorted(own.keys() & settings.keys()):
        raise ConfigError(f"model {model_id} has settings whose names are taken: {', '.join(taken)}")
    facts = {**settings, **own}
    used = {name: value for name, value in facts.items() if name not in FIRST_OPTIONS or value != FIRST_OPTIONS[name]}
    try:
        return hashlib.sha256(canonical_json(used)).hexdigest()[:16]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model {model_id} has settings that cannot be written as JSON: {error}") from error


def precision(requested: Precision | Literal["auto"], device: Device, cluster: bool, gpu: bool) -> Precision:
    """Returns the precision that `auto` stands for. cluster: whether the run uses a remote cluster; gpu: whether this machine
    has a GPU with bf16.

    The result is part of `label_id`, so it must not depend on which nodes happen to be up: a different answer tomorrow would
    label every image again. On a cluster it depends on `--device` alone.
    """
    if requested != "auto":
        return requested
    on_gpu = device == "cuda" if cluster else device != "cpu" and gpu
    return "bf16" if on_gpu else "fp32"


def device_of(device: Device, capacity: Capacity) -> Literal["cpu", "cuda"]:
    """Returns the device that an option means on a cluster."""
    return "cuda" if device == "cuda" or (device == "auto" and capacity.gpus >= 1) else "cpu"


def plan_workers(capacity: Capacity, images: int, requested: int | None = None, device: Device = "auto") -> WorkerPlan:
    """Returns how a cluster is divided among model replicas: one per GPU, else one per core.

    images: number of images to process; a few images need few workers. requested: number of workers; None derives it. Raises
    ClusterTooSmallError if the plan does not fit, because Ray would wait for the missing resources forever.
    """
    on_gpu = device_of(device, capacity) == "cuda"
    spare = capacity.spare_cpus
    most = int(capacity.gpus) if on_gpu else spare
    workers = requested or max(1, min(most, math.ceil(images / RETRY_ROWS)))
    # The embedded cluster's cores all go to the workers; elsewhere they may be spread over nodes of any size.
    cpus_each = max(1, spare // workers) if capacity.embedded and not on_gpu else 1
    if on_gpu and workers > most:
        remedy = f"give --workers {most}" if most else "give --device cpu"
        need = counted(workers, "worker needs", "workers need")
        raise ClusterTooSmallError(f"{need} {counted(workers, 'GPU')}, the cluster has {most}: {remedy}")
    _check_cpus(capacity, workers, cpus_each)
    return WorkerPlan(
        workers=workers,
        cpus_each=cpus_each,
        gpus_each=int(on_gpu),
        device=device_of(device, capacity),
        concurrency=2 if on_gpu else 1,  # a GPU must not wait for a block's first bytes; on a CPU they share the core anyway
        decode_threads=min(8, max(2, spare // workers)) if on_gpu else cpus_each,
    )


def _check_cpus(capacity: Capacity, workers: int, cpus_each: int) -> None:
    needed, spare = workers * cpus_each, capacity.spare_cpus
    if needed > spare:
        remedy = f"give --workers {spare // cpus_each}" if spare >= cpus_each else "take a larger machine or cluster"
        beside = "" if capacity.embedded else f" beside the {RESERVED_CPUS} that Ray Data needs itself"
        need, there = counted(workers, "worker needs", "workers need"), agreeing(spare, "is", "are")
        raise ClusterTooSmallError(f"{need} {counted(needed, 'CPU')}{beside}, there {there} {spare}: {remedy}")


def rounds(images: int, workers: int, block_rows: int | None = None) -> Iterator[Round]:
    """Returns the passes of Ray Data over a run: all images in blocks, then the lost ones in small blocks.

    Images that are missing after them are tried one by one (`jobs.labelling.lost_images`). The first round stops if more blocks
    are lost than `LOST_BLOCKS` and a twentieth of all: then the cause is not a few images that kill workers.

    A run of at most `RETRY_ROWS` images has no pass. One by one, they do not wait for Ray Data, which the driver and its worker
    would have to import.
    """
    if is_short(images, block_rows):
        return
    share = 1 / (workers * BLOCKS_LEFT)
    rows = block_rows or min(BLOCK_ROWS, math.ceil(images * share))
    max_lost = max(LOST_BLOCKS, math.ceil(images / rows) // 20)
    yield Round(rows, alone=False, max_lost=max_lost, share=share if block_rows is None else None)
    if rows > RETRY_ROWS:
        yield Round(RETRY_ROWS, alone=True, max_lost=images)


def is_short(images: int, block_rows: int | None = None) -> bool:
    """Returns whether a run is labelled without Ray Data."""
    return block_rows is None and images <= RETRY_ROWS


def lost_line(images: int, rows: int) -> str:
    """Returns the line to show when workers ended with images in progress. rows: number of them that run together now."""
    if images == 1:
        return f"1 image was lost with its worker; it runs again{', alone' if rows == 1 else ''}"
    return f"{images:,} images were lost with their workers; they run again, {rows} at a time"


def cannot_start(starts: int, workers: int) -> bool:
    """Returns whether workers end while they load their model. starts: number of starts since the last one that completed."""
    return starts > STARTS * workers


def failed_share(statuses: Mapping[str, int]) -> float:
    """Returns the share of images whose status is not ok; 0 for a run without images."""
    images = sum(statuses.values())
    return (images - statuses.get(Status.OK, 0)) / images if images else 0.0


def check_failures(statuses: Mapping[str, int], max_failed: float) -> None:
    """Raises TooManyFailuresError if the share of failed images is larger than allowed."""
    share = failed_share(statuses)
    if share > max_failed:
        failed = ", ".join(f"{count:,} {name}" for name, count in sorted(statuses.items()) if count and name != Status.OK)
        raise TooManyFailuresError(
            f"{share:.1%} of the images failed ({failed}), --max-failed allows {max_failed:.1%}; "
            "the table holds every one of them with its status and error: see the view current_images"
        )
