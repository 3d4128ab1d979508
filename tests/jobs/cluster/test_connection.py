"""Ctrl-C while Ray starts and while Ray Train runs."""

from __future__ import annotations

import signal
import threading

import pytest

from masklake.jobs.cluster.connection import _interrupt_held_back, interruptible


def test_an_interrupt_waits_until_ray_has_started() -> None:
    before = signal.getsignal(signal.SIGINT)
    reached = False
    with pytest.raises(KeyboardInterrupt), _interrupt_held_back():  # noqa: PT012 - the block is what is tested
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)
    reached = False
    with pytest.raises(KeyboardInterrupt), _interrupt_held_back():  # noqa: PT012 - the block is what is tested
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


def test_an_exit_within_is_an_interrupt_and_the_handler_is_ours_again() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible():  # noqa: PT012 - the block is what is tested
        signal.signal(signal.SIGINT, lambda *_: None)  # as Ray Train does
        raise SystemExit(1)
    assert signal.getsignal(signal.SIGINT) is before
