"""The line that says why an epoch begins again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from masklake.jobs.training import restarts
from masklake.jobs.training.restarts import Restarts


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(restarts, "reported_failure", lambda messages: messages.failure)
    return []


def messages(said: list[str], failure: Exception | None = None) -> Any:
    return SimpleNamespace(say=SimpleNamespace(remote=said.append), failure=failure)


def test_each_restart_is_said_with_its_cause(said: list[str]) -> None:
    restarts = Restarts(messages(said), max_failures=2)
    restarts.after_exception(None, {1: RuntimeError("a\nconsequence"), 0: RuntimeError("a long story\nnode 10.0.0.2 is lost")})
    restarts.after_exception(None, {0: RuntimeError()})
    assert said == [
        "worker 0 ended (node 10.0.0.2 is lost); training starts again (restart 1 of 2) after the last complete epoch",
        "worker 0 ended (RuntimeError); training starts again (restart 2 of 2) after the last complete epoch",
    ]


def test_a_worker_that_does_not_answer_is_told_in_plain_words(said: list[str]) -> None:
    lost = ray.exceptions.ActorUnavailableError("RpcError: failed to connect to all addresses rpc_code: 14", b"0" * 16)
    failed = WorkerHealthCheckFailedError("A worker health check failed.", lost)
    Restarts(messages(said), max_failures=2).after_exception(None, {0: failed})
    assert said[0].startswith("worker 0 ended (it cannot be reached: its process or its node is lost); training starts again")


def test_the_last_failure_and_a_users_error_are_left_to_the_driver(said: list[str]) -> None:
    Restarts(messages(said), max_failures=0).after_exception(None, {0: RuntimeError("the end")})
    Restarts(messages(said, failure=ValueError("wrong")), max_failures=2).after_exception(None, {0: ValueError("wrong")})
    assert said == []
