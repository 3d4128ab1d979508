"""Images alone: what a worker's death says about the image it was processing, and what it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from masklake.jobs.labelling import lost_images
from masklake.jobs.labelling.lost_images import DEATHS, LOST_NODES, Alone, Trials
from masklake.pipeline.errors import LabellingError, StorageError
from masklake.pipeline.labelling.run_output import Finished, failed, written
from masklake.pipeline.table.log import DataFile
from masklake.pipeline.table.schema import MANIFEST_SCHEMA


def run(trials: Trials, deadly: set[int], with_node: bool = False) -> list[int]:
    """Try all images in turn; the order in which they were tried."""
    order = []
    while len(trials):
        order.append(trials.next())
        if order[-1] in deadly:
            trials.died(order[-1], with_node=with_node)
    return order


def test_an_image_is_crashed_after_three_deaths_and_the_others_get_through() -> None:
    trials = Trials(range(4))
    assert run(trials, deadly={1}) == [0, 1, 2, 3, 1, 1]
    assert trials.crashed == [1]


def test_one_death_from_outside_is_no_evidence() -> None:
    trials = Trials(range(3))
    for _ in range(DEATHS - 1):
        assert trials.next() == 0
        trials.died(0, with_node=False)  # an operator's kill, while this image was in hand
        assert [trials.next(), trials.next()] == [1, 2]
        for image in (1, 2):
            trials.died(image, with_node=True)
    assert trials.crashed == []
    assert sorted(run(trials, deadly=set())) == [0, 1, 2]
    assert trials.crashed == []


def test_a_node_that_died_says_nothing_about_an_image() -> None:
    trials = Trials([7, 8])
    assert all(trials.died(trials.next(), with_node=True) for _ in range(2 * (LOST_NODES - 1)))
    assert trials.crashed == []
    assert sorted(run(trials, deadly=set())) == [7, 8]


def test_an_image_that_takes_its_node_along_is_not_tried_for_ever() -> None:
    trials = Trials([7])
    assert [trials.died(trials.next(), with_node=True) for _ in range(LOST_NODES)] == [True] * (LOST_NODES - 1) + [False]
    assert trials.crashed == [], "a node may be lost for other reasons, so nothing final is said of the image"


def test_nodes_lost_with_an_image_stop_the_run_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_images, "_living_nodes", lambda: frozenset({"head"}))
    rows = pa.table({"image_id": [4], "uri": ["s3://b/huge.jpg"]})
    alone = Alone(lambda: None, rows, 1, lambda line: None)
    gone = lost_images._Worker(None, known=frozenset({"head", "gone"}), node="gone")
    for _ in range(LOST_NODES - 1):
        alone._ended(gone, 4, RuntimeError())
    with pytest.raises(LabellingError, match=r"3 nodes .* processed s3://b/huge\.jpg alone.*same command continues"):
        alone._ended(gone, 4, RuntimeError())


def test_nothing_waits_when_all_were_tried() -> None:
    trials = Trials([])
    assert len(trials) == 0
    with pytest.raises(IndexError):
        trials.next()


class Method:
    """An actor's method: what `remote` returns is asked by the patched `ray.get`."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self._answer = answer

    def remote(self, *arguments: Any) -> Callable[[], Any]:
        return lambda: self._answer(*arguments)


class Actor:
    """A worker on node "here" that dies of the images in ``deadly`` and lives through the others."""

    def __init__(self, deadly: set[int], prove: Callable[[], Any] = lambda: "here", error: Exception | None = None) -> None:
        self.prove = Method(prove)
        self.alone = Method(self._label)
        self._deadly = deadly
        self._error = error

    def _label(self, rows: pa.Table) -> pa.Table:
        (image,) = rows["image_id"].to_pylist()
        if image in self._deadly:
            raise ray.exceptions.ActorDiedError
        if self._error is not None:
            return failed(self._error)
        return written(Finished(DataFile(f"part-{image}", 1, 1), np.array([image])))


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Ray's calls answered here; the set of nodes that live."""
    living = {"here"}
    monkeypatch.setattr(ray, "wait", lambda calls, **_: (calls[:1], calls[1:]))
    monkeypatch.setattr(ray, "get", lambda call: call())
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": node, "Alive": True} for node in living])
    return living


def tried(start: Callable[[], Actor], images: int = 4, workers: int = 2) -> tuple[list[int], list[int]]:
    """Images that were labelled, and those that are crashed."""
    rows = pa.Table.from_pylist([{"image_id": image, "uri": f"u{image}"} for image in range(images)], schema=MANIFEST_SCHEMA)
    blocks, crashed = Alone(start, rows, workers, say=pytest.fail).run()
    return sorted(image for block in blocks for image in block.image_ids.tolist()), crashed


def test_only_what_kills_worker_after_worker_is_crashed(no_cluster: set[str]) -> None:
    assert tried(lambda: Actor(deadly={1, 3})) == ([0, 2], [1, 3])


def test_two_workers_killed_from_outside_blame_nobody(no_cluster: set[str]) -> None:
    deaths = iter([{0}, {0}])
    assert tried(lambda: Actor(deadly=next(deaths, set()))) == ([0, 1, 2, 3], [])


def test_deaths_with_a_node_blame_nobody(no_cluster: set[str]) -> None:
    deaths = iter([{0}] * (LOST_NODES - 1))
    assert tried(lambda: Actor(next(deaths, set()), prove=lambda: "gone"), images=1) == ([0], [])


def test_what_cannot_be_written_is_raised_as_it_was(no_cluster: set[str]) -> None:
    with pytest.raises(StorageError, match="no space left"):
        tried(lambda: Actor(set(), error=StorageError("t/part-0: no space left on the disk")))


def test_a_node_that_dies_with_all_that_start_there_ends_no_run(no_cluster: set[str]) -> None:
    """Eight GPUs on the lost node: eight starts fail at once, each after the node was known to live."""
    no_cluster.add("lost")
    started = 0

    def start() -> Actor:
        nonlocal started
        started += 1
        return Actor(set(), prove=die) if started <= 8 else Actor(set())

    def die() -> str:
        no_cluster.discard("lost")
        raise ray.exceptions.ActorDiedError

    assert tried(start, images=8, workers=8) == (list(range(8)), [])


def test_workers_that_end_before_they_have_an_image_stop_the_run(no_cluster: set[str]) -> None:
    def die() -> None:
        raise ray.exceptions.ActorDiedError

    with pytest.raises(LabellingError, match="before they receive an image"):
        tried(lambda: Actor(set(), prove=die))
