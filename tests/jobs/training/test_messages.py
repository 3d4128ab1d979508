"""The training's messages and the labelling's counter: nothing waits for them after they are lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from masklake.jobs.labelling.progress import progress_bar, start_counter
from masklake.jobs.training.messages import Listener, report_failure, reported_failure, start_messages
from masklake.model.errors import ConfigError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def own_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def lost() -> Any:
    """The handle of a messages actor whose node is gone, as far as its callers can tell."""
    messages = start_messages()
    ray.get(messages.say.remote("before"))
    ray.kill(messages, no_restart=True)
    while answers(messages):  # the kill takes effect a little later
        time.sleep(0.05)
    return messages


def answers(messages: Any) -> bool:
    try:
        ray.get(messages.take.remote())
    except ray.exceptions.RayActorError:
        return False
    return True


def test_a_failure_is_kept_and_lines_are_shown() -> None:
    messages, lines = start_messages(), list[str]()
    assert report_failure(messages, ConfigError("first"))
    assert report_failure(messages, ConfigError("its consequence"))
    with Listener(messages, lines.append):
        ray.get(messages.say.remote("a line"))
    assert lines == ["a line"]
    assert str(reported_failure(messages)) == "first"


def test_a_lost_actor_is_no_failure_and_says_that_it_did_not_hear(lost: Any) -> None:
    assert reported_failure(lost) is None
    assert not report_failure(lost, ConfigError("unheard"))


def test_a_lost_actor_keeps_nobody_waiting(lost: Any) -> None:
    lines: list[str] = []
    with Listener(lost, lines.append):
        lost.say.remote("unheard")
    assert lines == []


@pytest.mark.faults
def test_an_actor_that_died_comes_back() -> None:
    messages = start_messages()
    ray.get(messages.say.remote("before"))
    ray.kill(messages, no_restart=False)
    lines: list[str] = []
    with Listener(messages, lines.append):
        while not lines:
            messages.say.remote("after")
    assert set(lines) == {"after"}


def test_a_lost_counter_stops_the_bar_and_nothing_else() -> None:
    counter = start_counter()
    looked: list[None] = []
    ray.kill(counter)
    with progress_bar(counter, 3, 0, lambda: looked.append(None), enabled=False):
        counter.add.remote(1, 0)
    assert looked
