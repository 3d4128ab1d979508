"""The Triton kernels equal the reference: in Triton's interpreter everywhere, on the GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import model
from model.kernels import roi_align_triton as kernels
from model.kernels.roi_align_cpu import roi_align_cpu_backward
from model.kernels.roi_align_reference import roi_align_reference
from model.kernels.roi_align_triton import roi_align_triton, roi_align_triton_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALES = (0.25, 0.125)


def inputs(dtype: torch.dtype = torch.float32, channels: int = 5) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Two levels of an 80 x 120 canvas, two images, RoIs inside, across the border, outside and inside out."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, channels, 80 // s, 120 // s, generator=generator).to(DEVICE, dtype) for s in (4, 8)]
    rois = torch.tensor(
        [[0, 10.0, 12, 60, 44], [1, -9, -5, 30, 20], [0, 70, 50, 150, 99], [1, 300, 300, 340, 360], [0, 40, 40, 30, 35]]
    )
    return features, rois.to(DEVICE), torch.tensor([0, 1, 1, 0, 1], device=DEVICE)


@pytest.fixture
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs begin as NaN, so that an element which no program writes is found."""
    empty = kernels.empty_pooled
    monkeypatch.setattr(kernels, "empty_pooled", lambda *arguments: empty(*arguments).fill_(float("nan")))


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_forward_equals_the_reference(mode: str, sampling: int, aligned: bool) -> None:
    features, rois, levels = inputs()
    expected = roi_align_reference(features, rois, levels, SCALES, 3, sampling, aligned, mode)
    pooled = roi_align_triton(features, rois, levels, SCALES, 3, sampling, aligned, mode)
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    features, rois, levels = inputs(dtype)
    exact = roi_align_reference([f.float() for f in features], rois, levels, SCALES, 3)
    pooled = roi_align_triton(features, rois, levels, SCALES, 3)
    assert pooled.dtype == dtype
    # One rounding of the result, to nearest or (in the interpreter) towards zero.
    torch.testing.assert_close(pooled.float(), exact, atol=torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps)


@pytest.mark.usefixtures("nan_filled")
def test_memory_order_of_inputs_does_not_matter() -> None:
    features, rois, levels = inputs()
    expected = roi_align_triton(features, rois, levels, SCALES, 3)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    last = roi_align_triton([f.contiguous(memory_format=torch.channels_last) for f in features], rois, levels, SCALES, 3)
    sliced = roi_align_triton([torch.cat((f, f), 3)[..., : f.shape[3]] for f in features], rois, levels, SCALES, 3)
    assert torch.equal(last, expected)
    assert torch.equal(sliced, expected)


@pytest.mark.usefixtures("nan_filled")
def test_every_level_pointer_is_used() -> None:
    features = [torch.full((1, 2, 4, 4), float(level), device=DEVICE) for level in range(5)]
    rois = torch.tensor([[0.0, 1, 1, 3, 3]], device=DEVICE).repeat(6, 1)
    levels = torch.tensor([4, 0, 3, 1, 2, 7], device=DEVICE)
    pooled = roi_align_triton(features, rois, levels, [1.0] * 5, 2)
    assert pooled[:, 0, 0, 0].tolist() == [4.0, 0.0, 3.0, 1.0, 2.0, 0.0]  # a level that does not exist gives zeros


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's NumPy, at infinity minus infinity
@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_rois_that_are_not_finite_give_zeros(mode: str) -> None:
    features, _, _ = inputs()
    rois = torch.tensor([[0, float("nan"), 0, 9, 9], [1, 0, 0, float("inf"), 9]], device=DEVICE)
    levels = torch.tensor([0, 1], device=DEVICE)
    assert not roi_align_triton(features, rois, levels, SCALES, 2, mode=mode).any()


def test_more_channels_than_one_block() -> None:
    features, rois, levels = inputs(channels=300)
    expected = roi_align_reference(features, rois[:2], levels[:2], SCALES, 2)
    torch.testing.assert_close(roi_align_triton(features, rois[:2], levels[:2], SCALES, 2), expected, atol=1e-5, rtol=1e-5)


def test_no_rois() -> None:
    features, rois, levels = inputs()
    assert roi_align_triton(features, rois[:0], levels[:0], SCALES, 3).shape == (0, 5, 3, 3)
    grads = roi_align_triton_backward(features[0].new_zeros(0, 5, 3, 3), features, rois[:0], levels[:0], SCALES, 3)
    assert [g.shape for g in grads] == [f.shape for f in features]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_backward_equals_the_bag(mode: str, sampling: int, channels_last: bool) -> None:
    features, rois, levels = inputs(channels=3)
    if channels_last:
        features = [f.contiguous(memory_format=torch.channels_last) for f in features]
    grad = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    arguments = (grad, features, rois, levels, SCALES, 3, sampling, False, mode)
    for ours, expected in zip(roi_align_triton_backward(*arguments), roi_align_cpu_backward(*arguments), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from model.kernels import roi_align_triton as kernels

types = {"rois": "*fp32", "scales": "*fp32", "levels": "*i64", "geometry": "*i64", "gradient_geometry": "*i64"}
for kernel in (kernels._forward_kernel, kernels._backward_kernel):
    for dtype, sampling, largest in (("bf16", 2, False), ("fp32", 0, True)):
        constants = {"P": 7, "P2": 8, "SAMPLING": sampling, "ALIGNED": True, "MAX": largest, "BLOCK_C": 64}
        signature = {}
        for name in kernel.arg_names:
            if name in constants:
                signature[name] = "constexpr"
            elif name in ("out", "grad", "f0", "f1", "f2", "f3", "f4"):
                signature[name] = "*" + dtype
            elif name in ("g0", "g1", "g2", "g3", "g4"):
                signature[name] = "*fp32"
            else:
                signature[name] = types.get(name, "i32")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


@pytest.mark.slow
def test_kernels_compile_for_an_h100_without_one(tmp_path: Path) -> None:
    """The interpreter accepts more than the compiler does."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(model.__file__).parents[1])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
