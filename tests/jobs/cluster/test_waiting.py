"""Lines that are shown while other jobs hold a cluster's CPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from masklake.jobs.cluster import waiting
from masklake.jobs.cluster.connection import EMBEDDED
from masklake.jobs.cluster.waiting import has_place, is_due, notice, said_while_waiting
from masklake.jobs.labelling.plan import WorkerPlan
from masklake.jobs.labelling.progress import Counter


def test_the_first_notice_comes_after_20_s_and_then_one_a_minute() -> None:
    assert not is_due(19.9, None)
    assert is_due(20, None)
    assert not is_due(79.9, 20)
    assert is_due(80, 20)


def test_a_notice_says_what_is_needed_and_what_is_free() -> None:
    total = {"CPU": 3.0, "memory": 1e9, "node:127.0.0.1": 1.0}
    line = notice("a worker needs 1 CPU", 20.4, {"memory": 1e9}, total)
    assert line.startswith("waiting for the cluster for 20 s: a worker needs 1 CPU; free now: 0 of 3 CPUs.")
    assert "; free now: 0.5 of 3 CPUs, 1 of 2 GPUs. " in notice("", 0, {"CPU": 0.5, "GPU": 1.0}, {**total, "GPU": 2.0})


class Cluster:
    """A cluster that another job holds; time passes by 2 s with each look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.total: dict[str, float] = {"CPU": 3.0}
        self.looks = 0
        self.queued = True
        monkeypatch.setattr(ray, "cluster_resources", lambda: self.total)
        monkeypatch.setattr(ray, "available_resources", dict)
        monkeypatch.setattr(waiting, "_queued", lambda: self.queued)
        monkeypatch.setattr(waiting, "POLL_S", 0)
        monkeypatch.setattr(waiting.time, "monotonic", lambda: 2.0 * self.looks)

    def said_until(self, last: int, each: Callable[[int], bool] = lambda look: False) -> list[str]:
        """The lines until the look ``last``, from which on it works; ``each`` says of the looks before whether it does."""
        lines: list[str] = []
        done = threading.Event()

        def working() -> bool:
            self.looks += 1
            if self.looks >= last:
                done.set()
            return bool(each(self.looks)) or done.is_set()

        with said_while_waiting("a worker needs 1 CPU", working, lines.append):
            if EMBEDDED not in self.total:
                assert done.wait(30)
        return lines


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def test_it_is_said_until_the_first_worker_has_begun(held: Cluster) -> None:
    lines = held.said_until(45)  # 90 s
    assert [line.split(": ")[0] for line in lines] == [
        "waiting for the cluster for 20 s",
        "waiting for the cluster for 80 s",
    ]


def test_workers_that_load_their_model_are_not_waited_for(held: Cluster) -> None:
    held.queued = False
    assert held.said_until(100) == []


def test_a_counter_that_does_not_answer_ends_nothing(held: Cluster) -> None:
    def lost(look: int) -> bool:
        if look < 20:
            raise ray.exceptions.GetTimeoutError
        return False

    assert len(held.said_until(30, lost)) == 1


def test_on_an_embedded_cluster_there_is_no_other_job(held: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    held.total = {"CPU": 4.0, EMBEDDED: 1.0}
    started: list[Any] = []
    monkeypatch.setattr(waiting.threading, "Thread", lambda **_: started.append(None))
    assert held.said_until(1) == []
    assert not started


def test_it_is_said_again_when_all_workers_have_lost_their_places(held: Cluster) -> None:
    assert len(held.said_until(110, lambda look: look in range(20, 60))) == 3  # after 20 s (twice) and 80 s


def test_workers_are_placed_while_one_has_a_node_or_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def actor(state: str, node: str) -> dict[str, Any]:
        return {"State": state, "Address": {"NodeID": node}}

    node, nowhere = "a" * 56, "f" * 56
    actors: dict[str, Any] = {"lost": actor("RESTARTING", nowhere), "gone": actor("DEAD", node)}
    monkeypatch.setattr("ray._private.state.actors", lambda job_id: actors)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: "01000000"))
    assert not has_place([]), "none has ever started"
    assert not has_place(["lost"])
    assert not has_place(["lost", "gone", "forgotten"])
    assert has_place(["gone", "forgotten"]), "the end of a stream"
    actors["alive"] = actor("ALIVE", node)
    assert has_place(["lost", "alive"])
    actors["lost"] = actor("RESTARTING", node)
    assert has_place(["lost"]), "it loads its model"


def test_a_block_that_two_workers_ended_with_is_begun_by_no_third() -> None:
    counter = Counter()
    assert counter.workers() == []
    counter.starting("one")
    counter.starting("one")
    assert (counter.workers(), counter.starts()) == (["one"], 2)
    counter.ready()
    assert counter.starts() == 0
    assert [counter.take(7) for _ in range(3)] == [1, 2, 0]
    assert counter.take(8)
    counter.lay_down(8)
    assert [counter.take(8) for _ in range(3)] == [1, 2, 0]


def test_what_a_labeller_needs_is_said() -> None:
    plan = WorkerPlan(workers=2, cpus_each=1, gpus_each=0, device="cpu", concurrency=1, decode_threads=1)
    assert plan.needs == "a worker needs 1 CPU"
    assert replace(plan, cpus_each=2, gpus_each=1).needs == "a worker needs 2 CPUs and 1 GPU"
