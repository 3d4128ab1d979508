"""The Triton kernels equal the reference: in Triton's interpreter everywhere, on the GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor

import masklake
from masklake.model.kernels import roi_align as dispatch
from masklake.model.kernels import roi_align_triton as kernels
from masklake.model.kernels.roi_align import roi_align
from masklake.model.kernels.roi_align_cpu import roi_align_cpu_backward
from masklake.model.kernels.roi_align_reference import roi_align_reference
from masklake.model.kernels.roi_align_triton import roi_align_triton, roi_align_triton_backward

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
    for name in ("empty_pooled", "empty_gradient"):
        empty = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *arguments, empty=empty: empty(*arguments).fill_(float("nan")))


@pytest.fixture
def through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatch point as on a GPU."""
    monkeypatch.setattr(dispatch, "choose_path", lambda device, dtype, levels: "triton")


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wide_reads_and_additions_change_nothing(dtype: torch.dtype) -> None:
    """Channels last and a multiple of 16: what the model has on a GPU. The same numbers as from NCHW, bit for bit."""
    features, rois, levels = inputs(dtype, channels=16)
    last = [f.contiguous(memory_format=torch.channels_last) for f in features]
    assert kernels._is_wide(last)
    assert not kernels._is_wide(features)
    assert not kernels._is_wide([f.contiguous(memory_format=torch.channels_last) for f in inputs(channels=5)[0]])
    expected = roi_align_triton(features, rois, levels, SCALES, 3)
    assert torch.equal(roi_align_triton(last, rois, levels, SCALES, 3), expected)
    exact = roi_align_reference([f.float() for f in features], rois, levels, SCALES, 3)
    torch.testing.assert_close(expected.float(), exact, atol=torch.finfo(dtype).eps * 2, rtol=torch.finfo(dtype).eps * 2)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_every_dtype_are_summed_in_float32(dtype: torch.dtype, mode: str) -> None:
    features, rois, levels = inputs(dtype, channels=16)
    rois, levels = rois[:3], levels[:3]
    last = [f.contiguous(memory_format=torch.channels_last) for f in features]
    grad = torch.randn(3, 16, 2, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    expected = roi_align_cpu_backward(grad.float(), [f.float() for f in features], rois, levels, SCALES, 2, 2, True, mode)
    eps = torch.finfo(dtype).eps
    for level in (features, last):
        grads = roi_align_triton_backward(grad, level, rois, levels, SCALES, 2, 2, True, mode)
        for ours, exact in zip(grads, expected, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.float(), exact, atol=max(2 * eps, 1e-5), rtol=max(2 * eps, 1e-5))


@pytest.mark.usefixtures("nan_filled")
def test_images_and_levels_that_do_not_exist_give_zeros_and_no_gradient() -> None:
    """Reading them would be reading foreign memory."""
    features, _, _ = inputs()
    box = [8.0, 8, 40, 40]
    rois = torch.tensor([[2, *box], [-1, *box], [float("nan"), *box], [1e30, *box], [0, *box], [0, *box]], device=DEVICE)
    levels = torch.tensor([0, 0, 0, 0, 2, -1], device=DEVICE)
    assert not roi_align_reference(features, rois, levels, SCALES, 2).any()
    assert not roi_align_triton(features, rois, levels, SCALES, 2).any()
    grads = roi_align_triton_backward(torch.ones(6, 5, 2, 2, device=DEVICE), features, rois, levels, SCALES, 2)
    assert not any(g.any() for g in grads)


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's NumPy, at zero times infinity
@pytest.mark.usefixtures("nan_filled")
def test_features_that_are_no_numbers_show_in_both_modes() -> None:
    """The largest of samples with a NaN is NaN, for torch as for us; and the gradient goes there."""
    features, rois, levels = inputs(channels=2)
    features[0][0, 0, 5:8, 5:8] = float("nan")
    features[1][1, 1] = float("-inf")
    for mode in ("avg", "max"):
        expected = roi_align_reference(features, rois, levels, SCALES, 3, 2, False, mode)
        assert expected.isnan().any()
        pooled = roi_align_triton(features, rois, levels, SCALES, 3, mode=mode)
        torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5, equal_nan=True)
    grad = torch.ones(5, 2, 3, 3, device=DEVICE)
    arguments = (grad, features, rois, levels, SCALES, 3, 2, False, "max")
    for ours, expected in zip(roi_align_triton_backward(*arguments), roi_align_cpu_backward(*arguments), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="memory that is not touched costs nothing on the CPU alone")
@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_addresses_beyond_32_bits(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image, and an incoming gradient, more than 2 ** 31 elements behind the first one."""
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)  # it copies whole storages onto themselves
    far = 2**31 + 16
    generator = torch.Generator().manual_seed(3)
    feature = torch.empty(far + 3 * 9 * 9, dtype=torch.float16).as_strided((2, 3, 9, 9), (far, 81, 9, 1))
    feature[1] = torch.randn(3, 9, 9, generator=generator)
    grad = torch.empty(far + 12, dtype=torch.float16).as_strided((2, 3, 2, 2), (far, 4, 2, 1))
    grad[:] = torch.randn(2, 3, 2, 2, generator=generator)
    rois, levels = torch.tensor([[1.0, 1, 1, 7, 8], [1, 0, 2, 5, 5]]), torch.tensor([0, 0])
    near = feature[1:].clone().float()
    first = torch.tensor([0.0, 1, 1, 1, 1])
    expected = roi_align_reference([near], rois * (first > 0), levels, [1.0], 2, mode=mode)
    pooled = roi_align_triton([feature], rois, levels, [1.0], 2, mode=mode)
    torch.testing.assert_close(pooled.float(), expected, atol=2e-3, rtol=2e-3)
    expected = roi_align_cpu_backward(grad.float(), [near], rois * (first > 0), levels, [1.0], 2, mode=mode)[0]
    ours = roi_align_triton_backward(grad, [feature], rois, levels, [1.0], 2, mode=mode)[0]
    torch.testing.assert_close(ours[1:].float(), expected, atol=4e-3, rtol=4e-3)
    assert not ours[0].any()


@pytest.mark.usefixtures("through_triton")
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_registered_operators_pass_opcheck(mode: str) -> None:
    features, rois, levels = inputs(channels=2)
    options = (rois[:2], levels[:2], list(SCALES), 2, 2, False, mode)
    leaves = [f.requires_grad_() for f in features]
    torch.library.opcheck(torch.ops.masklake.roi_align.default, (leaves, *options))
    grad, plain = torch.ones(2, 2, 2, 2, device=DEVICE), [f.detach() for f in features]
    torch.library.opcheck(torch.ops.masklake.roi_align_backward.default, (grad, plain, *options))


@pytest.mark.usefixtures("through_triton")
def test_a_module_compiles_and_trains_through_the_kernels() -> None:
    """One graph; the gradients of the eager module and of the reference."""

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.score = torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Linear(4 * 4, 3)

        def forward(self, image: torch.Tensor, rois: torch.Tensor, levels: torch.Tensor, align: Callable[..., torch.Tensor]):
            fine = self.conv(image)
            pooled = align([fine, fine[:, :, ::2, ::2]], rois, levels, (1.0, 0.5), 2)
            return self.score(pooled.flatten(1)).square().sum()

    torch.manual_seed(0)
    head, image = Head().to(DEVICE), torch.randn(2, 2, 12, 14, device=DEVICE)
    rois = torch.tensor([[0.0, 1, 1, 9, 8], [1, 2, 0, 13, 11]], device=DEVICE)
    levels = torch.tensor([0, 1], device=DEVICE)
    gradients = []
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    for run, align in ((head, roi_align_reference), (head, roi_align), (compiled, roi_align)):
        head.zero_grad()
        run(image, rois, levels, align).backward()
        gradients.append([p.grad.clone() for p in head.parameters()])
    for ours in gradients[1:]:
        torch.testing.assert_close(ours, gradients[0], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("through_triton")
def test_determinism_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torch's switch the gradient comes from the bag, which adds in one order on every device."""
    features, rois, levels = inputs(channels=2)
    leaves = [f.requires_grad_() for f in features]
    assert dispatch.choose_backward_path("triton", deterministic=False) == "triton"
    calls = []
    monkeypatch.setattr(dispatch, "_backward", lambda path: calls.append(path) or roi_align_cpu_backward)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(roi_align(leaves, rois, levels, SCALES, 3).square().sum(), leaves) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls == ["bag", "bag"]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


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
    rois = [[0, float("nan"), 0, 9, 9], [1, 0, 0, float("inf"), 9], [1, -3e38, 0, 3e38, 9], [0, 0, 0, 9, 1e8]]
    rois, levels = torch.tensor(rois, device=DEVICE), torch.tensor([0, 1, 0, 1], device=DEVICE)
    assert not roi_align_triton(features, rois, levels, SCALES, 2, mode=mode).any()


def test_more_channels_than_one_block() -> None:
    features, rois, levels = inputs(channels=300)
    expected = roi_align_reference(features, rois[:2], levels[:2], SCALES, 2)
    torch.testing.assert_close(roi_align_triton(features, rois[:2], levels[:2], SCALES, 2), expected, atol=1e-5, rtol=1e-5)
    grad = torch.randn(2, 300, 2, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    arguments = (grad, features, rois[:2], levels[:2], SCALES, 2)
    for ours, exact in zip(roi_align_triton_backward(*arguments), roi_align_cpu_backward(*arguments), strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)


def test_no_channels() -> None:
    features, rois, levels = inputs(channels=0)
    assert roi_align_triton(features, rois, levels, SCALES, 3).shape == (5, 0, 3, 3)
    grads = roi_align_triton_backward(torch.zeros(5, 0, 3, 3, device=DEVICE), features, rois, levels, SCALES, 3)
    assert [g.shape for g in grads] == [f.shape for f in features]


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
import os, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from masklake.model.kernels import roi_align as dispatch
from masklake.model.kernels import roi_align_triton as kernels
from masklake.model.kernels.roi_align import roi_align


def machine_code(cubin):
    # Not the PTX: triton 3.6 and 3.9 write other words there, from which the same instructions are made.
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], check=True, capture_output=True, text=True).stdout


types = {"rois": "*fp32", "scales": "*fp32", "levels": "*i64", "geometry": "*i64", "gradient_geometry": "*i64"}
for kernel in (kernels._forward_kernel, kernels._backward_kernel):
    for dtype, sampling, largest in (("bf16", 2, False), ("fp32", 0, True)):
        wide = not largest
        constants = {"P": 7, "P2": 8, "SAMPLING": sampling, "ALIGNED": True, "MAX": largest, "WIDE": wide, "BLOCK_C": 128}
        if kernel is kernels._backward_kernel:
            constants["WIDE_GRADIENT"] = wide
        if wide:
            constants["out_c" if kernel is kernels._forward_kernel else "grad_c"] = 1
        # What Triton finds out about the arguments of a call: pointers and sizes are multiples of 16.
        attributes = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(kernel.arg_names)
            if name not in constants and name not in ("images", "num_levels")
        }
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
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        options = {"enable_fp_fusion": True, "num_warps": 4 if kernel is kernels._forward_kernel else 8}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.asm["cubin"]
        code = machine_code(compiled.asm["cubin"])
        if wide:  # 16 bytes at a time, and no shuffling of gradients between threads
            word = "LDG.E.128" if kernel is kernels._forward_kernel else "RED.E.ADD.F32x4"
            assert word in code.replace("REDG.", "RED."), (kernel, word)
            assert "LDG.E.U16" not in code, kernel
        if wide and kernel is kernels._backward_kernel:
            assert "BAR.SYNC" not in code, kernel
"""


@pytest.mark.slow
def test_kernels_compile_for_an_h100_without_one(tmp_path: Path) -> None:
    """The interpreter accepts more than the compiler does."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(masklake.__file__).parents[1])}
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
