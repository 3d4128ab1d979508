"""The benchmark of the kernels, small and on a CPU: what it calls on a GPU runs and agrees."""

from __future__ import annotations

import pytest
import torch

from benchmarks import kernels

SMALL = {"canvas": (96, 128), "channels": 4}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BURST", 2)


def test_roofline_table() -> None:
    base = kernels.scene(2, 20, "cpu", **SMALL)
    rows = kernels.roi_align_roofline(base, bandwidth=1e12, repeats=2)
    assert [line["wanted"] for line in rows] == [1.5, 1.5, 2.0, 2.0]
    assert all(float(line["ours_ms"]) > 0 for line in rows)
    assert len({tuple(line) for line in rows}) == 1, "the table's columns are the first row's"
    assert 0 < kernels.relative_error(base) < 2e-2
    assert kernels.table([*rows, *kernels.masks_to_host("cpu", (40, 60), 2)]).count("\n") == 6


def test_touched_bytes_are_those_of_a_scene_worked_by_hand() -> None:
    """One RoI of 28 x 28 canvas pixels, 7 x 7 of P2: samples at quarters and three quarters read pixels 2 to 9 each way."""
    features = [torch.zeros(1, 4, 96 // s, 128 // s, dtype=torch.bfloat16) for s in kernels.STRIDES]
    one = kernels.Scene(features, torch.tensor([[0.0, 8, 8, 36, 36]]), torch.tensor([0]))
    assert kernels.touched_bytes(one) == (8 * 8 + 7 * 7) * 4 * 2


def test_backward_alone_gives_what_both_give() -> None:
    inputs = kernels.scene(1, 10, "cpu", **SMALL).cast(torch.float32, True)
    assert kernels.used_levels(inputs)[0]
    kernels.backward(kernels.ours, inputs)()
    kernels.backward(kernels.peers, inputs)()


def test_copy_bandwidth() -> None:
    assert kernels.copy_bandwidth("cpu", 2, elements=1 << 16) > 1e6
