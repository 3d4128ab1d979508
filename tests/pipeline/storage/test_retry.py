"""A step is repeated after errors that may pass, and after no others."""

from __future__ import annotations

import pytest

from masklake.pipeline.errors import AccessDeniedError, StorageError
from masklake.pipeline.storage import retry as patience
from masklake.pipeline.storage.retry import patiently


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses taken, without taking them."""
    pauses: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", pauses.append)
    return pauses


def busy() -> StorageError:
    error = StorageError("busy")
    error.may_pass = True
    return error


def test_a_bad_minute_is_waited_out(slept: list[float]) -> None:
    answers: list[object] = [busy(), busy(), "answer"]

    def step() -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(step) == "answer"
    assert slept == [1, 2]


@pytest.mark.parametrize("error", [StorageError("no space left"), AccessDeniedError("expired"), ValueError("a bug")])
def test_what_does_not_pass_is_raised_at_once(slept: list[float], error: Exception) -> None:
    def step() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        patiently(step)
    assert raised.value is error
    assert slept == []


def test_patience_ends(slept: list[float]) -> None:
    def step() -> None:
        raise busy()

    with pytest.raises(StorageError, match="busy"):
        patiently(step)
    assert sum(slept) == 60
