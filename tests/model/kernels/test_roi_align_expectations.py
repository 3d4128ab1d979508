"""What torchvision's own tests expect of RoIAlign, asked of ours: the bag, and the Triton kernel interpreted or on a GPU.

The oracle is arithmetic on Python floats, one sample at a time, written from the operator's definition alone. Where our
interface differs, `like_torchvision` bridges: ours takes several levels, square outputs only, and RoIs as one (R, 5) tensor
(lists of boxes belong to `model.rois.features`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torchvision

pytest.importorskip("triton")

from masklake.model.kernels import roi_align as dispatch
from masklake.model.kernels.roi_align import roi_align

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
ROIS = [[0, 0, 0, 9, 9], [0, 0, 5, 4, 9], [0, 5, 5, 9, 9], [1, 0, 0, 9, 9]]


@pytest.fixture(params=["bag", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations; float64 is the bag's on every device."""
    choose = dispatch.choose_path
    if request.param == "triton":
        monkeypatch.setattr(dispatch, "choose_path", lambda _, *rest: "bag" if rest[0] == torch.float64 else "triton")
    else:
        monkeypatch.setattr(dispatch, "choose_path", lambda _, *rest: choose("cpu", *rest))
    return request.param


def like_torchvision(
    feature: torch.Tensor,
    boxes: torch.Tensor | Sequence[torch.Tensor],
    output_size: int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> torch.Tensor:
    """Our operator with the arguments of `torchvision.ops.roi_align`."""
    if not isinstance(boxes, torch.Tensor):
        images = [torch.full((len(each), 1), float(image), device=each.device) for image, each in enumerate(boxes)]
        boxes = torch.cat([torch.cat((image, each), dim=1) for image, each in zip(images, boxes, strict=True)])
    levels = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    return roi_align([feature], boxes, levels, [spatial_scale], output_size, sampling_ratio, aligned)


def value_at(image: list[list[float]], y: float, x: float) -> float:
    """One channel at one point: nothing beyond a pixel outside, the border's value up to there, else four neighbours' mean."""
    height, width = len(image), len(image[0])
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    total = 0.0
    for row, weight_y in ((math.floor(y), 1 - (y - math.floor(y))), (math.floor(y) + 1, y - math.floor(y))):
        for column, weight_x in ((math.floor(x), 1 - (x - math.floor(x))), (math.floor(x) + 1, x - math.floor(x))):
            if row < height and column < width:
                total += weight_y * weight_x * image[row][column]
    return total


def expected(feature: torch.Tensor, rois: torch.Tensor, bins: int, scale: float, sampling: int, aligned: bool) -> torch.Tensor:
    """Every bin's mean over its samples, float64 (R, C, bins, bins)."""
    pooled = torch.zeros(len(rois), feature.shape[1], bins, bins, dtype=torch.float64)
    shift = 0.5 if aligned else 0.0
    for number, (image, *box) in enumerate(rois.double().tolist()):
        x1, y1, x2, y2 = (edge * scale - shift for edge in box)
        extent_y, extent_x = (y2 - y1, x2 - x1) if aligned else (max(y2 - y1, 1.0), max(x2 - x1, 1.0))
        bin_y, bin_x = extent_y / bins, extent_x / bins
        lines_y, lines_x = (sampling, sampling) if sampling > 0 else (math.ceil(bin_y), math.ceil(bin_x))
        for channel, plane in enumerate(feature[int(image)].double().tolist()):
            for i in range(bins):
                for j in range(bins):
                    rows = [y1 + i * bin_y + (line + 0.5) * bin_y / lines_y for line in range(lines_y)]
                    columns = [x1 + j * bin_x + (line + 0.5) * bin_x / lines_x for line in range(lines_x)]
                    samples = [value_at(plane, y, x) for y in rows for x in columns]
                    pooled[number, channel, i, j] = sum(samples) / len(samples) if samples else 0.0
    return pooled


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_forward(dtype: torch.dtype, contiguous: bool, aligned: bool, path: str) -> None:
    """RoIs in the features' own dtype, adaptive sampling, axes exchanged in memory."""
    feature = torch.rand(2, 5, 10, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    feature = feature if contiguous else feature.permute(0, 1, 3, 2)
    rois = torch.tensor(ROIS, dtype=dtype)
    pooled = like_torchvision(feature.to(DEVICE), rois.to(DEVICE), 5, aligned=aligned)
    assert pooled.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        pooled.double().cpu(), expected(feature, rois, 5, 1.0, -1, aligned), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("aligned", [True, False])
def test_large_boxes_at_a_scale(aligned: bool, path: str) -> None:
    """Half a pixel of the feature map is many of the canvas: boxes over the whole canvas and beyond it, and one inside out."""
    feature = torch.rand(1, 2, 9, 12, generator=torch.Generator().manual_seed(1))
    rois = torch.tensor([[0, 0, 0, 383, 287], [0, -60, -40, 420, 330], [0, 100.3, 50.7, 101, 51.2], [0, 90, 80, 60, 40]])
    for sampling in (-1, 1, 2):
        pooled = like_torchvision(feature.to(DEVICE), rois.to(DEVICE), 3, 1 / 32, sampling, aligned)
        exact = expected(feature, rois, 3, 1 / 32, sampling, aligned)
        torch.testing.assert_close(pooled.double().cpu(), exact, atol=1e-5, rtol=1e-5)
        theirs = torchvision.ops.roi_align(feature, rois, 3, 1 / 32, sampling, aligned)
        torch.testing.assert_close(pooled.cpu(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_backward(seed: int, contiguous: bool) -> None:
    feature = torch.rand(1, 8, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    rois = torch.tensor([[0, 0, 0, 4, 4], [0, 0, 2, 3, 4], [0, 2, 2, 4, 4]], dtype=torch.float64)
    turn: Callable[[torch.Tensor], torch.Tensor] = (lambda f: f) if contiguous else (lambda f: f.permute(0, 1, 3, 2))
    assert torch.autograd.gradcheck(lambda f: like_torchvision(turn(f), rois, 2, 1.0, 1), (feature,), atol=1e-5)


@pytest.mark.parametrize("feature_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rois_dtype", [torch.float32, torch.float16])
def test_autocast(feature_dtype: torch.dtype, rois_dtype: torch.dtype, path: str) -> None:
    """Dtypes may differ; the result has the features'."""
    feature = torch.rand(2, 3, 10, 10, generator=torch.Generator().manual_seed(2)).to(feature_dtype)
    rois = torch.tensor(ROIS, dtype=rois_dtype)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        pooled = like_torchvision(feature.to(DEVICE), rois.to(DEVICE), 5)
    assert pooled.dtype == feature_dtype
    tolerance = TOLERANCE[feature_dtype]
    torch.testing.assert_close(
        pooled.double().cpu(), expected(feature, rois, 5, 1.0, -1, False), atol=tolerance, rtol=tolerance
    )


def test_boxes_as_a_list_and_as_a_tensor(path: str) -> None:
    feature = torch.rand(2, 3, 10, 10, device=DEVICE)
    rois = torch.tensor(ROIS, dtype=torch.float32, device=DEVICE)
    listed = [rois[rois[:, 0] == image, 1:] for image in range(2)]
    assert torch.equal(like_torchvision(feature, listed, 3), like_torchvision(feature, rois, 3))


def test_boxes_of_another_shape_are_refused() -> None:
    feature = torch.rand(1, 1, 8, 8)
    for boxes in (torch.zeros(1, 4), torch.zeros(1, 6), torch.zeros(5)):
        with pytest.raises(ValueError, match="rois must be"):
            like_torchvision(feature, boxes, 2)


def test_one_pixel_larger_maps_give_neighbouring_values(path: str) -> None:
    """A ramp is sampled where it says: aligned RoIs read pixel centres, so a RoI shifted by a pixel reads one more."""
    ramp = torch.arange(12.0, device=DEVICE).expand(1, 1, 12, 12)
    rois = torch.tensor([[0.0, 2, 2, 6, 6], [0, 3, 2, 7, 6]], device=DEVICE)
    first, second = like_torchvision(ramp, rois, 4, 1.0, 1, aligned=True)[:, 0, 0].tolist()
    assert first == [2.0, 3.0, 4.0, 5.0]
    assert second == [3.0, 4.0, 5.0, 6.0]
