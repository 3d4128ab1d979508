"""RoIAlign on the CPU equals torchvision's operator and the reference, and differentiates like it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
import torchvision

from masklake.model.kernels.layout import warn_once
from masklake.model.kernels.roi_align import Path, choose_backward_path, choose_path, roi_align
from masklake.model.kernels.roi_align_cpu import _sum_bags
from masklake.model.kernels.roi_align_reference import roi_align_reference

SCALES = (0.25, 0.125, 0.0625)


def pyramid(dtype: torch.dtype = torch.float32, channels: int = 6, seed: int = 0) -> list[torch.Tensor]:
    """Three levels of a 160 x 240 canvas, two images."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, channels, 160 // stride, 240 // stride, generator=generator).to(dtype) for stride in (4, 8, 16)]


def scattered_rois(count: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """RoIs inside, across and far outside the canvas, some empty or turned inside out; and their levels."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([320.0, 240.0]) - 40
    size = torch.rand(count, 2, generator=generator) * 150 - 8
    image = torch.randint(0, 2, (count, 1), generator=generator).float()
    return torch.cat((image, corner, corner + size), 1), torch.randint(0, 3, (count,), generator=generator)


def torchvision_pyramid(
    features: Sequence[torch.Tensor], rois: torch.Tensor, levels: torch.Tensor, size: int, sampling: int, aligned: bool
) -> torch.Tensor:
    pooled = features[0].new_zeros((len(rois), features[0].shape[1], size, size))
    for level, (feature, scale) in enumerate(zip(features, SCALES, strict=True)):
        chosen = levels == level
        boxes = rois[chosen].to(feature.dtype)
        pooled[chosen] = torchvision.ops.roi_align(feature, boxes, size, scale, sampling, aligned)
    return pooled


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling", [0, 1, 2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equal_to_torchvision(dtype: torch.dtype, tolerance: float, sampling: int, aligned: bool) -> None:
    features, (rois, levels) = pyramid(dtype), scattered_rois(80)
    expected = torchvision_pyramid(features, rois, levels, 5, sampling, aligned)
    pooled = roi_align(features, rois.to(dtype), levels, SCALES, 5, sampling, aligned)
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_equal_to_the_reference(mode: str, sampling: int, aligned: bool) -> None:
    features, (rois, levels) = pyramid(), scattered_rois(12)
    expected = roi_align_reference(features, rois, levels, SCALES, 3, sampling, aligned, mode)
    pooled = roi_align(features, rois, levels, SCALES, 3, sampling, aligned, mode)
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=0)


def test_worked_by_hand() -> None:
    """One 4 x 4 map of its own column numbers: each bin is the mean of its samples' x, shifted by half when aligned."""
    feature = torch.arange(4.0).expand(4, 4)[None, None]
    rois, levels = torch.tensor([[0.0, 0, 0, 4, 4]]), torch.zeros(1, dtype=torch.int64)
    # Bins 0..2 and 2..4, samples at .5 1.5 2.5 3.5; the last one is held at the border's 3.
    plain = roi_align([feature], rois, levels, [1.0], 2, 2, aligned=False)
    assert plain[0, 0].tolist() == [[1.0, 2.75], [1.0, 2.75]]
    shifted = roi_align([feature], rois, levels, [1.0], 2, 2, aligned=True)
    assert shifted[0, 0].tolist() == [[0.5, 2.5], [0.5, 2.5]]
    assert roi_align([feature], rois, levels, [1.0], 2, 2, mode="max")[0, 0].tolist() == [[1.5, 3.0], [1.5, 3.0]]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_stays_close_to_float32(dtype: torch.dtype, tolerance: float) -> None:
    features, (rois, levels) = pyramid(channels=64), scattered_rois(60)
    exact = roi_align(features, rois, levels, SCALES, 7)
    pooled = roi_align([f.to(dtype) for f in features], rois, levels, SCALES, 7)
    assert pooled.dtype == dtype
    assert (pooled.float() - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_gradient_is_the_derivative(mode: str, sampling: int) -> None:
    generator = torch.Generator().manual_seed(2)
    features = [
        torch.randn(1, 2, side, side + 1, dtype=torch.float64, generator=generator, requires_grad=True) for side in (6, 3)
    ]
    rois = torch.tensor([[0, 1.0, 2, 20, 18], [0, -5, 3, 8, 40], [0, 90, 90, 99, 99], [0, 2, 2, 17, 9]])
    levels = torch.tensor([0, 1, 0, 0])
    assert torch.autograd.gradcheck(
        lambda *f: roi_align(f, rois.double(), levels, SCALES[:2], 3, sampling, True, mode), features
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradient_equals_torchvision(channels_last: bool) -> None:
    rois, levels = scattered_rois(60)
    order = torch.channels_last if channels_last else torch.contiguous_format
    ours = [f.contiguous(memory_format=order).requires_grad_() for f in pyramid(torch.float64)]
    theirs = [f.requires_grad_() for f in pyramid(torch.float64)]
    weights = torch.randn(60, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (roi_align(ours, rois.double(), levels, SCALES, 5) * weights).sum().backward()
    (torchvision_pyramid(theirs, rois, levels, 5, 2, False) * weights).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-12, rtol=0)


def test_bfloat16_gradient_is_summed_in_higher_precision() -> None:
    """Two thousand equal RoIs: sums in bfloat16 would stall at 256 times the smallest addend."""
    rois = torch.tensor([[0.0, 8, 8, 40, 40]]).repeat(2000, 1)
    levels = torch.zeros(2000, dtype=torch.int64)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        feature = pyramid(dtype)[0].requires_grad_()
        roi_align([feature], rois, levels, SCALES[:1], 4).sum().backward()
        grads.append(feature.grad.float())
    assert (grads[1] - grads[0]).norm() / grads[0].norm() < 2e-2


def test_memory_order_of_inputs_does_not_matter() -> None:
    features, (rois, levels) = pyramid(), scattered_rois(40)
    expected = roi_align(features, rois, levels, SCALES, 4)
    last = [f.contiguous(memory_format=torch.channels_last) for f in features]
    sliced = [torch.cat((f, f), dim=3)[..., : f.shape[3]] for f in features]
    turned = [f.transpose(2, 3).contiguous().transpose(2, 3) for f in features]
    for other in (last, sliced, turned):
        torch.testing.assert_close(roi_align(other, rois, levels, SCALES, 4), expected, atol=0, rtol=0)
    strided = torch.stack((rois, rois), 1)[:, 0]
    assert torch.equal(roi_align(features, strided, levels, SCALES, 4), expected)


def test_the_bag_reads_a_contiguous_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image's NCHW features can be seen as a transposed table, which torch reads ten times slower."""
    seen = []
    monkeypatch.setattr(
        "masklake.model.kernels.roi_align_cpu._sum_bags", lambda t, *rest: seen.append(t) or _sum_bags(t, *rest)
    )
    single = [f[:1].contiguous() for f in pyramid()]
    rois, levels = scattered_rois(20)
    roi_align(single, rois[rois[:, 0] == 0], levels[rois[:, 0] == 0], SCALES, 4)
    assert seen
    assert all(table.is_contiguous() for table in seen)


def test_results_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    features, (rois, levels) = pyramid(), scattered_rois(50)
    for sampling in (0, 2):
        expected = roi_align(features, rois, levels, SCALES, 4, sampling)
        monkeypatch.setattr("masklake.model.kernels.roi_align_cpu.ROWS_PER_CHUNK", 1)
        assert torch.equal(roi_align(features, rois, levels, SCALES, 4, sampling), expected)
        monkeypatch.undo()


def test_adaptive_samples_of_rois_far_larger_than_the_map_fit_in_memory() -> None:
    features = [torch.ones(1, 2, 10, 10)]
    rois = torch.tensor([[0, 0, 0, 7e5, 7e5]]).repeat(40, 1)  # a hundred thousand lines a bin
    pooled = roi_align(features, rois, torch.zeros(40, dtype=torch.int64), [1.0], 7, 0)
    assert pooled[:, :, 0, 0].flatten().tolist() == pytest.approx([1e-8] * 80, rel=0.3)
    assert not pooled[:, :, 1:].any()


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_no_rois_and_no_images(mode: str) -> None:
    features = [f.requires_grad_() for f in pyramid()]
    pooled = roi_align(features, torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), SCALES, 4, mode=mode)
    assert pooled.shape == (0, 6, 4, 4)
    pooled.sum().backward()
    assert all(f.grad is not None and not f.grad.any() for f in features)
    none = roi_align([f[:0] for f in features], torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), SCALES, 4)
    assert none.shape == (0, 6, 4, 4)


@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_rois_that_are_outside_or_not_finite_give_zeros(mode: str, sampling: int) -> None:
    nan, inf, huge = float("nan"), float("inf"), 3e38  # whose width overflows
    rois = [
        [900.0, 900, 990, 990],
        [-400, -400, -300, -300],
        [nan, 0, 9, 9],
        [0, 0, inf, 9],
        [-huge, 0, huge, 9],
        [0, 0, 1e8, 9],
    ]
    images = torch.tensor([0.0, 1, 0, 0, 1, 1])
    levels = torch.tensor([0, 1, 2, 0, 0, 2])
    pooled = roi_align(pyramid(), torch.column_stack((images, torch.tensor(rois))), levels, SCALES, 4, sampling, mode=mode)
    assert not pooled.any()


def test_other_images_do_not_leak_in() -> None:
    features, (rois, levels) = pyramid(), scattered_rois(40)
    poisoned = [torch.cat((f[:1], torch.full_like(f[1:], float("nan")))) for f in features]
    first = rois[:, 0] == 0
    pooled = roi_align(poisoned, rois[first], levels[first], SCALES, 4)
    torch.testing.assert_close(pooled, roi_align(features, rois, levels, SCALES, 4)[first])


def test_levels_that_need_no_gradient_get_none() -> None:
    features, (rois, levels) = pyramid(), scattered_rois(10)
    features[1].requires_grad_()
    roi_align(features, rois, levels, SCALES, 4).sum().backward()
    assert features[1].grad is not None
    assert features[0].grad is None


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_registered_operator_passes_opcheck(mode: str) -> None:
    features, (rois, levels) = pyramid(channels=3), scattered_rois(5)
    arguments = ([f.requires_grad_() for f in features], rois, levels, list(SCALES), 3, 2, False, mode)
    torch.library.opcheck(torch.ops.masklake.roi_align.default, arguments)
    plain = [f.detach() for f in features]
    torch.library.opcheck(torch.ops.masklake.roi_align_backward.default, (torch.ones(5, 3, 3, 3), plain, *arguments[1:]))


def test_compiles_into_one_graph() -> None:
    features, (rois, levels) = pyramid(), scattered_rois(20)
    expected = roi_align(features, rois, levels, SCALES, 4)
    compiled = torch.compile(roi_align, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, rois, levels, SCALES, 4), expected)
    leaf = [f.requires_grad_() for f in pyramid()]
    compiled(leaf, rois, levels, SCALES, 4).square().sum().backward()
    assert all(f.grad is not None and f.grad.any() for f in leaf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_casts_nothing(dtype: torch.dtype) -> None:
    """Not coordinates, which would be wrong by pixels beyond 256, nor features or gradients: the operators have a rule."""
    for name in ("roi_align", "roi_align_backward"):
        for key in ("AutocastCPU", "AutocastCUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"masklake::{name}", key)
    features, (rois, levels) = [f.requires_grad_() for f in pyramid(dtype)], scattered_rois(20)
    rois = rois + torch.tensor([0, 0.37, 0.37, 0.37, 0.37])
    pooled = roi_align(features, rois, levels, SCALES, 4)
    gradients = torch.autograd.grad(pooled.float().square().sum(), features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = roi_align(features, rois, levels, SCALES, 4)
        assert cast.dtype == dtype
        assert torch.equal(cast, pooled)
        compiled = torch.compile(roi_align, fullgraph=True, backend="aot_eager")(features, rois, levels, SCALES, 4)
        assert torch.equal(compiled, pooled)
        within = torch.autograd.grad(cast.float().square().sum(), features)
    assert all(torch.equal(left, right) for left, right in zip(within, gradients, strict=True))


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_no_channels(mode: str) -> None:
    features, (rois, levels) = [f.requires_grad_() for f in pyramid(channels=0)], scattered_rois(5)
    pooled = roi_align(features, rois, levels, SCALES, 4, mode=mode)
    assert pooled.shape == (5, 0, 4, 4)
    pooled.sum().backward()
    assert [f.grad.shape for f in features] == [f.shape for f in features]


def test_images_and_levels_that_do_not_exist_give_zeros_and_no_gradient() -> None:
    box = [8.0, 8, 40, 40]
    rois = torch.tensor([[2, *box], [-1, *box], [float("nan"), *box], [0, *box], [0, *box], [1, *box]])
    levels = torch.tensor([0, 0, 0, 3, -1, 2])
    features = [f.requires_grad_() for f in pyramid()]
    for mode in ("avg", "max"):
        pooled = roi_align(features, rois, levels, SCALES, 2, mode=mode)
        torch.testing.assert_close(pooled, roi_align_reference(features, rois, levels, SCALES, 2, mode=mode))
        assert not pooled[:5].any()
        gradients = torch.autograd.grad(pooled.sum(), features)
        assert [bool(g.any()) for g in gradients] == [False, False, True]
        assert not gradients[2][0].any()


def test_gradients_are_not_differentiable_and_say_so() -> None:
    features, (rois, levels) = [f.requires_grad_() for f in pyramid()], scattered_rois(5)
    pooled = roi_align(features, rois, levels, SCALES, 2)
    (first,) = torch.autograd.grad(pooled.square().sum(), features[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="masklake::roi_align_backward cannot be differentiated"):
        first.sum().backward()


def test_unsupported_dtype_falls_back_with_one_warning() -> None:
    features, (rois, levels) = pyramid(), scattered_rois(4)
    small = [f.to(torch.float8_e4m3fn) for f in features]
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="falling back to the slower reference"):
        pooled = roi_align(small, rois, levels, SCALES, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pooled.dtype == roi_align(small, rois, levels, SCALES, 2).dtype == torch.float8_e4m3fn
    expected = roi_align([f.float() for f in small], rois, levels, SCALES, 2)
    torch.testing.assert_close(pooled.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.filterwarnings("ignore:no fast RoIAlign")
def test_gradients_of_an_unsupported_dtype_are_those_of_float32() -> None:
    features, (rois, levels) = pyramid(), scattered_rois(4)
    small, grad = [f.to(torch.float8_e5m2) for f in features], torch.ones(4, 6, 2, 2)
    arguments = (rois, levels, list(SCALES), 2, 2, False, "avg")
    ours = torch.ops.masklake.roi_align_backward(grad.to(torch.float8_e5m2), small, *arguments)
    exact = torch.ops.masklake.roi_align_backward(grad, features, *arguments)
    for mine, other in zip(ours, exact, strict=True):
        assert mine.dtype == torch.float8_e5m2
        torch.testing.assert_close(mine.float(), other, atol=0.02, rtol=0.2)


def test_paths() -> None:
    assert choose_path("cpu", torch.bfloat16, 4) == "bag"
    assert choose_path("cuda", torch.bfloat16, 5) == "triton"


@pytest.mark.parametrize(
    ("device", "dtype", "levels", "path"),
    [
        ("cuda", torch.float64, 4, "bag"),
        ("cuda", torch.float16, 6, "bag"),
        ("cuda", torch.float8_e5m2, 4, "reference"),
        ("xpu", torch.float32, 4, "bag"),
        ("cpu", torch.float8_e5m2, 4, "reference"),
    ],
)
def test_what_no_kernel_serves_falls_back_with_one_warning(device: str, dtype: torch.dtype, levels: int, path: str) -> None:
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=rf"{dtype} on {device} \(levels: {levels}\)") as caught:
        assert choose_path(device, dtype, levels) == choose_path(device, dtype, levels) == path
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("path", "deterministic", "backward"),
    [("triton", False, "triton"), ("triton", True, "bag"), ("bag", True, "bag"), ("reference", True, "reference")],
)
def test_deterministic_gradients_come_without_atomics(path: Path, deterministic: bool, backward: Path) -> None:
    assert choose_backward_path(path, deterministic) == backward


def test_arguments_that_do_not_fit_are_refused() -> None:
    features, (rois, levels) = pyramid(), scattered_rois(4)
    with pytest.raises(ValueError, match="one scale per feature level"):
        roi_align(features, rois, levels, SCALES[:2], 4)
    with pytest.raises(ValueError, match=r"rois must be \(R, 5\)"):
        roi_align(features, rois[:, :4], levels, SCALES, 4)
    with pytest.raises(ValueError, match="equal B and C"):
        roi_align([features[0], features[1][:, :2], features[2]], rois, levels, SCALES, 4)
    with pytest.raises(ValueError, match="floating dtype"):
        roi_align([f.long() for f in features], rois, levels, SCALES, 4)
    with pytest.raises(ValueError, match="level without pixels"):
        roi_align([features[0], features[1][:, :, :0], features[2]], rois, levels, SCALES, 4)
    with pytest.raises(ValueError, match="share a device"):
        roi_align(features, rois.to("meta"), levels, SCALES, 4)
    with pytest.raises(ValueError, match="output_size"):
        roi_align(features, rois, levels, SCALES, 0)
    with pytest.raises(ValueError, match="mode"):
        roi_align(features, rois, levels, SCALES, 4, mode="sum")  # type: ignore[arg-type]
