"""Non-maximum suppression within groups: the Triton kernel, the reference and torchvision's operator keep the same boxes.

In Triton's interpreter everywhere, on the GPU where there is one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchvision.ops import nms

pytest.importorskip("triton")

import masklake
from masklake.model.boxes import suppress
from masklake.model.kernels import suppression
from masklake.model.kernels.layout import warn_once
from masklake.model.kernels.suppression import choose_path, survivors
from masklake.model.kernels.suppression_reference import survivors_reference
from masklake.model.kernels.suppression_triton import TILE, survivors_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_boxes(count: int, seed: int, area: float = 60.0) -> torch.Tensor:
    """Crowded float32 (count, 4)."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * area
    return torch.cat((corners, corners + 5 + torch.rand(count, 2, generator=generator) * area / 2), dim=1)


def ends_of(lengths: list[int]) -> torch.Tensor:
    """int64 (N,) for groups of these lengths."""
    lasts = torch.tensor(lengths).cumsum(0)
    return lasts.repeat_interleave(torch.tensor(lengths))


def kernel(boxes: torch.Tensor, wanted: torch.Tensor, ends: torch.Tensor, iou: float) -> torch.Tensor:
    """The kernel's answer, on the host."""
    return survivors_triton(boxes.to(DEVICE), wanted.to(DEVICE), ends.to(DEVICE), iou).cpu()


@pytest.mark.parametrize("lengths", [[1], [TILE], [TILE + 1], [3 * TILE + 5], [2, 1, TILE, 1, 70]], ids=str)
@pytest.mark.parametrize("iou", [0.1, 0.5, 0.7])
def test_groups_keep_what_torchvision_keeps(lengths: list[int], iou: float) -> None:
    count = sum(lengths)
    boxes, wanted, ends = random_boxes(count, seed=count), torch.ones(count, dtype=torch.bool), ends_of(lengths)
    expected = []
    for part in boxes.split(lengths):
        alive = torch.zeros(len(part), dtype=torch.bool)
        alive[nms(part, torch.arange(len(part), 0.0, -1.0), iou)] = True
        expected.append(alive)
    found = kernel(boxes, wanted, ends, iou)
    assert found.tolist() == torch.cat(expected).tolist()
    assert found.tolist() == survivors_reference(boxes, wanted, ends, iou).tolist()
    assert max(lengths) == 1 or 0 < found.sum() < count


@settings(max_examples=40, deadline=None)
@given(
    corners=hnp.arrays(np.int8, (7, 4), elements=st.integers(0, 6)),
    wanted=hnp.arrays(np.bool_, (7,)),
    cut=st.integers(1, 6),
    iou=st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0]),
)
def test_equal_where_rounding_decides(corners: np.ndarray, wanted: np.ndarray, cut: int, iou: float) -> None:
    """Boxes on a coarse grid: overlaps on the threshold, empty and inverted boxes, unwanted ones."""
    boxes, chosen = torch.from_numpy(corners).float(), torch.from_numpy(wanted)
    ends = ends_of([cut, 7 - cut])
    assert kernel(boxes, chosen, ends, iou).tolist() == survivors_reference(boxes, chosen, ends, iou).tolist()


def test_a_chain_longer_than_a_tile_is_followed() -> None:
    """Each box overlaps only its neighbours: every second one survives, which takes as many rounds as a tile has boxes."""
    count = TILE + 9
    left = torch.arange(count) * 4.0
    boxes = torch.stack((left, torch.zeros(count), left + 10, torch.full((count,), 10.0)), dim=1)
    found = kernel(boxes, torch.ones(count, dtype=torch.bool), ends_of([count]), 0.4)
    assert found.tolist() == [index % 2 == 0 for index in range(count)]


def test_unwanted_boxes_of_any_value_suppress_nothing() -> None:
    boxes = torch.tensor([[torch.nan] * 4, [0, 0, 10, 10], [0, 0, 10, 10], [-torch.inf, 0, torch.inf, 9], [1, 0, 10, 10]])
    wanted = torch.tensor([False, True, False, False, True])
    assert kernel(boxes, wanted, ends_of([5]), 0.5).tolist() == [False, True, False, False, False]
    assert kernel(boxes, wanted, ends_of([2, 3]), 0.5).tolist() == [False, True, False, False, True]
    assert kernel(boxes[:0], wanted[:0], ends_of([5])[:0], 0.5).tolist() == []


@pytest.mark.parametrize("batch", [1, 3])
def test_suppression_of_a_batch_as_on_a_gpu(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of `suppress` with its sorting, beside the CPU's image by image."""
    monkeypatch.setattr(suppression, "choose_path", lambda device: "triton")
    from masklake.model import boxes as module

    count = 150
    boxes, generator = random_boxes(batch * count, seed=1), torch.Generator().manual_seed(2)
    scores = torch.rand(batch * count, generator=generator).mul(50).round() / 50  # many are equal
    groups = torch.randint(0, 3, (batch * count,), generator=generator)
    images = torch.arange(batch).repeat_interleave(count)
    wanted = torch.rand(batch * count, generator=generator) > 0.2
    table = (boxes, scores, groups, images)
    for most in (10, batch * count):
        expected = suppress(*table, 0.5, wanted, most)
        there = [tensor.to(DEVICE) for tensor in table]
        found = module._suppress_by_group(*there, 0.5, wanted.to(DEVICE), most).cpu()
        assert images[found].tolist() == images[expected].tolist()
        assert scores[found].tolist() == scores[expected].tolist()
        assert sorted(found.tolist()) == sorted(expected.tolist()) or most == 10


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(3, 4\), \(2,\) and \(3,\)"):
        survivors(torch.zeros(3, 4), torch.ones(2, dtype=torch.bool), torch.full((3,), 3), 0.5)


def test_paths() -> None:
    warn_once.cache_clear()
    assert choose_path("cuda") == "triton"
    with pytest.warns(UserWarning, match="falling back to the slow reference"):
        assert choose_path("cpu") == "reference"


def test_it_is_an_operator_of_torch() -> None:
    boxes, ends = random_boxes(20, seed=0), ends_of([12, 8])
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="falling back"):
        survivors(boxes, torch.ones(20, dtype=torch.bool), ends, 0.5)
    torch.library.opcheck(torch.ops.masklake.survivors.default, (boxes, torch.ones(20, dtype=torch.bool), ends, 0.5))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from masklake.model.kernels import suppression_triton as kernels

kernel = kernels._survivors_kernel
types = {"boxes": "*fp32", "wanted": "*i8", "ends": "*i64", "kept": "*i8", "iou": "fp32", "TILE": "constexpr"}
source = ASTSource(fn=kernel, signature={name: types[name] for name in kernel.arg_names}, constexprs={"TILE": kernels.TILE})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False, "num_warps": 8})
ptx = compiled.asm["ptx"]
assert compiled.asm["cubin"]
assert "div.rn.f32" in ptx
assert "fma.rn.f32" not in ptx, "a product and a sum of float32 were fused"
assert ".ftz" not in ptx
assert "bar.sync" in ptx
"""


@pytest.mark.slow
def test_kernel_compiles_for_an_h100_without_one_and_rounds_as_torchvision_does(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(masklake.__file__).parents[1])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
