"""RLE from boxed masks equals pasting them into the image and encoding that, byte for byte."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks, paste_masks_in_image

from masklake.model.config import PasteKind
from masklake.model.masks import rle


def paste(probs: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], threshold: float) -> np.ndarray:
    """torchvision's pasting, except that boxes which do not touch the image give nothing (torchvision raises there)."""
    height, width = size
    padded, scale = expand_masks(probs[:, None], padding=1)
    full = np.zeros((len(probs), height, width), dtype=np.uint8)
    for target, mask, (x0, y0, x1, y1) in zip(full, padded, expand_boxes(boxes, scale).long().tolist(), strict=True):
        left, right, top, bottom = max(x0, 0), min(x1 + 1, width), max(y0, 0), min(y1 + 1, height)
        if left < right and top < bottom:
            resized = F.interpolate(mask[None], (max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1)), mode="bilinear")[0, 0]
            target[top:bottom, left:right] = resized[top - y0 : bottom - y0, left - x0 : right - x0] > threshold
    return full


def sample(probs: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], threshold: float) -> np.ndarray:
    """Detectron2's pasting of boxes that have an area: the mask is sampled at the centre of every pixel of the image."""
    height, width = size
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    x, y = (torch.arange(sides, dtype=torch.float32) + 0.5 for sides in (width, height))
    x, y = (x - x0) / (x1 - x0) * 2 - 1, (y - y0) / (y1 - y0) * 2 - 1
    grid = torch.stack((x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), dim=3)
    full = F.grid_sample(probs[:, None], grid, align_corners=False)[:, 0] >= threshold
    full &= ((x1 > x0) & (y1 > y0))[:, :, None]
    return full.numpy().astype(np.uint8)


PASTES = {"torchvision": paste, "detectron2": sample}
conventions = pytest.mark.parametrize("convention", PASTES)


def coco_counts(bitmaps: np.ndarray) -> list[bytes]:
    return [coco_mask.encode(np.asfortranarray(bitmap))["counts"] for bitmap in bitmaps]


def blobs(count: int, side: int, seed: int) -> torch.Tensor:
    """Probabilities like a mask head's: smooth, mostly near 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 6, 6, generator=generator) * 5
    return F.interpolate(coarse, size=side, mode="bicubic")[:, 0].sigmoid()


def boxes_near(count: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    """Boxes of all sizes, many of them across the image's border."""
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([size[1], size[0]], dtype=torch.float32)
    corner = (torch.rand(count, 2, generator=generator) * 1.4 - 0.3) * extent
    return torch.cat((corner, corner + torch.rand(count, 2, generator=generator) ** 2 * extent), dim=1)


def assert_like_pasted(
    probs: torch.Tensor,
    boxes: torch.Tensor,
    size: tuple[int, int],
    threshold: float = 0.5,
    convention: PasteKind = "torchvision",
) -> None:
    pasted = PASTES[convention](probs, boxes, size, threshold)
    counts, areas = rle.encode_boxed_masks(probs, boxes, size, threshold, convention)
    assert counts == coco_counts(pasted)
    assert areas.tolist() == pasted.sum((1, 2), dtype=np.int64).tolist()


def test_equal_to_torchvision_and_pycocotools_inside_the_image() -> None:
    boxes = boxes_near(60, (200, 300), 0).clamp(min=0)
    boxes[:, 0::2].clamp_(max=298)
    boxes[:, 1::2].clamp_(max=198)
    probs = blobs(60, 28, 1)
    pasted = (paste_masks_in_image(probs[:, None], boxes, (200, 300)) > 0.5).numpy()[:, 0].astype(np.uint8)
    assert rle.encode_boxed_masks(probs, boxes, (200, 300))[0] == coco_counts(pasted)


@pytest.mark.parametrize("size", [(200, 300), (61, 1000), (900, 70), (1, 1), (1, 50), (50, 1)])
@pytest.mark.parametrize("side", [14, 28, 56])
@conventions
def test_equal_for_smooth_masks_across_borders(size: tuple[int, int], side: int, convention: PasteKind) -> None:
    assert_like_pasted(blobs(50, side, 2), boxes_near(50, size, 3), size, convention=convention)


LEVELS = [float(np.float32(level)) for level in (0.0, 0.25, 0.4999999, 0.5, 0.50000006, 0.75, 1.0)]
"""Probabilities at and beside what rounding decides, each a float32."""


@settings(max_examples=150, deadline=None)
@given(
    probs=hnp.arrays(np.float32, (3, 7, 7), elements=st.sampled_from(LEVELS)),
    corners=hnp.arrays(np.float32, (3, 4), elements=st.floats(-40, 60, width=32)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
@conventions
def test_equal_where_rounding_decides(
    probs: np.ndarray, corners: np.ndarray, size: tuple[int, int], threshold: float, convention: PasteKind
) -> None:
    """Values on the threshold, boxes of no or negative size, images of one pixel."""
    if convention == "detectron2":
        threshold = threshold or 1e-7  # at 0, where all the image would be set, only the box is
    assert_like_pasted(torch.from_numpy(probs), torch.from_numpy(corners), size, threshold, convention)


@pytest.mark.parametrize("whole_pixels", [False, True])
@conventions
def test_values_at_the_threshold_in_large_boxes(whole_pixels: bool, convention: PasteKind) -> None:
    """Plateaus at exactly one half, where only torch's own bits can decide; boxes whose cells are whole pixels."""
    generator = torch.Generator().manual_seed(4)
    probs = torch.randint(0, 3, (12, 28, 28), generator=generator) / 2.0
    boxes = boxes_near(12, (300, 420), 5)
    if whole_pixels:
        boxes = boxes.round()
        boxes[:, 2:] = boxes[:, :2] + torch.tensor([28.0 * 5, 28.0 * 8])
    assert_like_pasted(probs, boxes, (300, 420), convention=convention)


def test_few_undecided_columns_equal_whole_masks() -> None:
    generator = torch.Generator().manual_seed(6)
    for height, width in torch.randint(1, 500, (60, 2), generator=generator).tolist():
        mask = F.pad(torch.rand(28, 28, generator=generator), (1, 1, 1, 1))
        columns = torch.randint(0, width, (3,), generator=generator)
        whole = F.interpolate(mask[None, None], (height, width), mode="bilinear")[0, 0]
        assert torch.equal(rle._resized_columns(mask, height, width, columns), whole[:, columns])


def test_thin_boxes_hold_the_pixels_whose_centres_they_reach() -> None:
    """Detectron2's boxes are no whole pixels: one of a thousandth of a pixel sets the pixel around it, or none."""
    boxes = torch.tensor([[5.4995, 2, 5.5005, 8], [5.1, 2, 5.2, 8], [3, 4, 3, 9], [3, 9, 8, 4]])
    counts, areas = rle.encode_boxed_masks(torch.ones(4, 28, 28), boxes, (12, 10), convention="detectron2")
    assert areas.tolist() == [6, 0, 0, 0]
    assert counts == coco_counts(sample(torch.ones(4, 28, 28), boxes, (12, 10), 0.5))


def test_the_conventions_differ() -> None:
    probs, boxes = blobs(20, 28, 11), boxes_near(20, (200, 300), 12)
    torchvision, detectron2 = (rle.encode_boxed_masks(probs, boxes, (200, 300), convention=name)[1] for name in PASTES)
    assert (torchvision != detectron2).any()


@conventions
def test_empty_full_and_distant_masks(convention: PasteKind) -> None:
    probs = torch.stack([torch.zeros(28, 28), torch.ones(28, 28), torch.ones(28, 28), torch.ones(28, 28)])
    boxes = torch.tensor([[5.0, 5, 20, 20], [-400, -400, 400, 400], [500, 500, 600, 600], [-90, -90, -50, -50]])
    counts, areas = rle.encode_boxed_masks(probs, boxes, (40, 30), convention=convention)
    assert areas.tolist() == [0, 1200, 0, 0]
    assert counts[1] == coco_counts(np.ones((1, 40, 30), np.uint8))[0]
    assert counts[0] == counts[2] == counts[3] == coco_counts(np.zeros((1, 40, 30), np.uint8))[0]


@conventions
def test_boxes_that_are_not_finite_or_enormous_stay_in_bounds(convention: PasteKind) -> None:
    boxes = torch.tensor([[float("nan"), 0, 5, 5], [0, 0, float("inf"), 5], [-1e30, -1e30, 1e30, 1e30], [-1e8, 2, 1e8, 9]])
    _, areas = rle.encode_boxed_masks(torch.ones(4, 28, 28), boxes, (30, 20), convention=convention)
    assert areas[:3].tolist() == [0, 0, 600]
    assert 0 < areas[3] <= 600


@conventions
def test_probabilities_that_are_not_numbers_count_as_below(convention: PasteKind) -> None:
    probs = blobs(6, 28, 7)
    probs[:, 10:12, 5] = float("nan")
    assert_like_pasted(probs, boxes_near(6, (200, 300), 8), (200, 300), convention=convention)


@conventions
def test_no_masks(convention: PasteKind) -> None:
    counts, areas = rle.encode_boxed_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (10, 10), convention=convention)
    assert counts == []
    assert areas.shape == (0,)


@conventions
def test_many_wide_masks_go_through_in_parts(monkeypatch: pytest.MonkeyPatch, convention: PasteKind) -> None:
    probs, boxes = blobs(20, 28, 9), boxes_near(20, (100, 150), 10)
    whole = rle.encode_boxed_masks(probs, boxes, (100, 150), convention=convention)
    monkeypatch.setattr(rle, "MAX_COLUMNS", 64)
    parts = rle.encode_boxed_masks(probs, boxes, (100, 150), convention=convention)
    assert whole[0] == parts[0]
    assert whole[1].tolist() == parts[1].tolist()


def test_noise_on_a_large_image_needs_little_memory() -> None:
    """300 masks of noise over twelve megapixels have some twenty million edges."""
    script = (
        "import resource, torch\n"
        "from masklake.model.masks.rle import encode_boxed_masks\n"
        "masks, box = torch.rand(300, 28, 28), torch.tensor([0.0, 0.0, 4000.0, 3000.0])\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "encode_boxed_masks(masks[:2], box.repeat(2, 1) / 100, (3000, 4000))\n"
        "before = peak()\n"
        "rles, _ = encode_boxed_masks(masks, box.repeat(300, 1), (3000, 4000))\n"
        "print(sum(map(len, rles)), (peak() - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    written, mebibytes = map(int, done.stdout.split())
    assert written > 10_000_000
    assert mebibytes < 1024


@settings(max_examples=150, deadline=None)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.integers(0, 1)))
def test_bitmaps_round_trip_like_pycocotools(bitmap: np.ndarray) -> None:
    counts = rle.encode(bitmap)
    assert counts == coco_counts(bitmap[None])[0]
    assert np.array_equal(rle.decode(counts, bitmap.shape), bitmap)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=30), elements=st.integers(0, 1)), st.data())
def test_some_columns_are_those_of_the_whole_mask(bitmap: np.ndarray, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, bitmap.shape[1]))
    last = data.draw(st.integers(first, bitmap.shape[1]))
    assert np.array_equal(rle.decode_columns(rle.encode(bitmap), bitmap.shape, (first, last)), bitmap[:, first:last])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=12))
def test_long_runs_round_trip(runs: list[int]) -> None:
    packed = rle.pack_counts(np.array(runs, dtype=np.int64), np.array([len(runs)]))
    assert rle.unpack_counts(packed[0]).tolist() == runs


def test_foreign_counts_are_refused() -> None:
    for counts in (b"\x00abc", b"P", b"o" * 20 + b"0"):
        with pytest.raises(ValueError, match="not a COCO run-length string"):
            rle.unpack_counts(counts)
    with pytest.raises(ValueError, match="run lengths sum to"):
        rle.decode(rle.encode(np.ones((3, 3), np.uint8)), (4, 4))
    with pytest.raises(ValueError, match="columns 2 to 4 are not all in an image of 3"):
        rle.decode_columns(rle.encode(np.ones((3, 3), np.uint8)), (3, 3), (2, 4))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="convention"):
        rle.encode_boxed_masks(torch.zeros(1, 2, 2), torch.zeros(1, 4), (5, 5), convention="other")
    with pytest.raises(ValueError, match=r"\(N, m, m\)"):
        rle.encode_boxed_masks(torch.zeros(1, 2, 3), torch.zeros(1, 4), (5, 5))
    with pytest.raises(ValueError, match="pixels"):
        rle.encode_boxed_masks(torch.zeros(1, 2, 2), torch.zeros(1, 4), (0, 5))
