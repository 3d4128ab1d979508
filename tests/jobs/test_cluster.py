"""Ctrl-C while Ray starts."""

from __future__ import annotations

import signal
import threading

import pytest

from jobs.cluster import _interrupt_held_back


def test_an_interrupt_waits_until_ray_has_started() -> None:
    before = signal.getsignal(signal.SIGINT)
    reached = False
    with pytest.raises(KeyboardInterrupt):
        with _interrupt_held_back():
            signal.raise_signal(signal.SIGINT)
            reached = True
        pytest.fail("it was forgotten")
    assert reached
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)
    reached = False
    with pytest.raises(KeyboardInterrupt), _interrupt_held_back():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert not reached
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_start_ray_too() -> None:
    done: list[bool] = []

    def work() -> None:
        with _interrupt_held_back():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
