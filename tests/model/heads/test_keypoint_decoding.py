"""Keypoint decoding equals torchvision's loop over people."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints

from masklake.model.heads import keypoint_decoding as keypoints
from masklake.model.heads.keypoint_decoding import decode_heatmaps


def peaks(people: int, joints: int, seed: int) -> torch.Tensor:
    """Heat maps like a trained head's: one high peak, lower ones beside it, noise below."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(56.0)
    maps = torch.full((people, joints, 56, 56), -4.0)
    for height in (12.0, 11.0, 6.0):
        at = torch.rand(people, joints, 2, 1, generator=generator) * 58 - 1
        gauss = torch.exp(-((axis - at) ** 2) / 12)
        maps += height * gauss[:, :, 0, :, None] * gauss[:, :, 1, None, :]
    return maps + torch.randn(maps.shape, generator=generator) * 0.3


def noise(people: int, joints: int, seed: int) -> torch.Tensor:
    return torch.randn(people, joints, 56, 56, generator=torch.Generator().manual_seed(seed))


def people_boxes(people: int, largest: float, seed: int) -> torch.Tensor:
    """Boxes of fractional sides from below a pixel up to ``largest``, some beginning outside the image."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(people, 2, generator=generator) * 300 - 20
    return torch.cat((corner, corner + torch.rand(people, 2, generator=generator) ** 2 * largest), dim=1)


def saturated(people: int, joints: int, seed: int) -> torch.Tensor:
    """Plateaus that ripple a little: of equal values rounding alone would choose."""
    return (noise(people, joints, seed) * 3).clamp(max=2) + noise(people, joints, seed + 1) * 0.02


@pytest.mark.parametrize("maps", [peaks, noise, saturated])
@pytest.mark.parametrize("largest", [3.0, 40.0, 100.0, 130.0, 700.0])
def test_equal_to_torchvision(maps, largest: float) -> None:  # type: ignore[no-untyped-def]
    logits, boxes = maps(12, 5, 0), people_boxes(12, largest, 1)
    expected, scores = heatmaps_to_keypoints(logits, boxes)
    points = decode_heatmaps(logits, boxes)
    assert points.shape == (12, 5, 3)
    assert points.dtype == torch.float32
    torch.testing.assert_close(points[..., :2], expected[..., :2], atol=0.05, rtol=0)
    torch.testing.assert_close(points[..., 2], scores, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("maps", [peaks, noise, saturated])
@pytest.mark.parametrize("shift", [-1000.0, -50.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("largest", [100.0, 700.0])
def test_a_constant_added_moves_nothing(maps, shift: float, largest: float) -> None:  # type: ignore[no-untyped-def]
    logits, boxes = maps(6, 4, 8) + shift, people_boxes(6, largest, 9)
    expected, scores = heatmaps_to_keypoints(logits, boxes)
    points = decode_heatmaps(logits, boxes)
    rounding = 4 * abs(shift) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(points[..., 2], scores, atol=1e-5 + rounding, rtol=1e-5)
    moved = (points[..., :2] - expected[..., :2]).abs().amax(2) > 0.05
    assert moved.float().mean() <= 0.05, "only rounding may choose another of nearly equal pixels"


@pytest.mark.filterwarnings("error")
def test_infinite_maps_and_boxes_disturb_nobody_and_warn_of_nothing() -> None:
    logits, boxes = peaks(4, 2, 5), people_boxes(4, 200, 6)
    alone = decode_heatmaps(logits, boxes)
    logits[1, 0, 3, 3], logits[1, 1, 3, 3] = torch.inf, -torch.inf
    boxes[2, 2], boxes[2, 3] = torch.inf, 3e38
    points = decode_heatmaps(logits, boxes)
    torch.testing.assert_close(points[[0, 3]], alone[[0, 3]])


@pytest.mark.parametrize("largest", [40.0, 700.0])
def test_a_probability_is_normalised_over_the_map_before_resizing(largest: float) -> None:
    """As Detectron2 has it, so that large boxes, whose maps have more pixels, do not score less."""
    logits, boxes = peaks(8, 3, 6), people_boxes(8, largest, 7)
    points = decode_heatmaps(logits, boxes, "probability")
    for heat, (x1, y1, x2, y2), scores in zip(logits, boxes.tolist(), points[..., 2], strict=True):
        size = [max(1, int(np.ceil(np.float32(side)))) for side in (y2 - y1, x2 - x1)]
        best = F.interpolate(heat[None], size, mode="bicubic")[0].flatten(1).amax(1)
        torch.testing.assert_close(scores, best.exp() / heat.exp().sum((1, 2)), rtol=1e-3, atol=0)
    assert torch.equal(points[..., :2], decode_heatmaps(logits, boxes)[..., :2])


def test_peaks_on_the_border() -> None:
    logits = torch.zeros(4, 1, 56, 56)
    for number, (row, column) in enumerate([(0, 0), (0, 55), (55, 0), (55, 30)]):
        logits[number, 0, row, column] = 5.0
    boxes = torch.tensor([[10.0, 20, 210, 320]]).repeat(4, 1)
    expected, scores = heatmaps_to_keypoints(logits, boxes)
    points = decode_heatmaps(logits, boxes)
    torch.testing.assert_close(points[..., :2], expected[..., :2], atol=0.05, rtol=0)
    torch.testing.assert_close(points[..., 2], scores, atol=1e-5, rtol=1e-5)


def test_other_heat_map_sides_and_half_precision() -> None:
    logits = F.interpolate(peaks(3, 2, 2), size=28, mode="bilinear")
    boxes = people_boxes(3, 300, 3)
    expected, _ = heatmaps_to_keypoints(logits.bfloat16().float(), boxes)
    torch.testing.assert_close(decode_heatmaps(logits.bfloat16(), boxes)[..., :2], expected[..., :2], atol=0.05, rtol=0)


def test_constant_maps_end_and_score_their_constant() -> None:
    points = decode_heatmaps(torch.full((1, 2, 56, 56), 3.0), torch.tensor([[5.0, 5, 205, 105]]))
    torch.testing.assert_close(points[..., 2], torch.full((1, 2), 3.0))
    assert ((points[..., 0] > 5) & (points[..., 0] < 205) & (points[..., 1] > 5) & (points[..., 1] < 105)).all()


def test_enormous_and_not_finite_boxes_stay_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    evaluate = keypoints._evaluate
    monkeypatch.setattr(keypoints, "_evaluate", lambda *a: sizes.append((v := evaluate(*a)).size) or v)
    logits = peaks(3, 1, 4)
    boxes = torch.tensor([[0.0, 0, 1e6, 2e6], [0, 0, float("nan"), 50], [3, 3, float("inf"), 50]])
    points = decode_heatmaps(logits, boxes)
    row, column = np.unravel_index(int(logits[0, 0].argmax()), (56, 56))
    assert abs(points[0, 0, 0] - (column + 0.5) / 56 * 1e6) < 1e6 / 56
    assert abs(points[0, 0, 1] - (row + 0.5) / 56 * 2e6) < 2e6 / 56
    assert max(sizes) <= keypoints.VALUES_PER_CHUNK


def test_maps_that_are_not_numbers_do_not_disturb_the_others() -> None:
    logits, boxes = peaks(3, 2, 5), people_boxes(3, 200, 6)
    alone = decode_heatmaps(logits, boxes)
    logits[1] = float("nan")
    points = decode_heatmaps(logits, boxes)
    assert torch.equal(points[[0, 2]], alone[[0, 2]])


def test_nobody() -> None:
    assert decode_heatmaps(torch.zeros(0, 17, 56, 56), torch.zeros(0, 4)).shape == (0, 17, 3)
