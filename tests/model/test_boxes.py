"""Box arithmetic against torchvision, and the properties it must have."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms

from masklake.model.boxes import clip_boxes, decode_boxes, encode_boxes, suppress, top_per_image, wide_enough
from tests.pretend_cuda import pretend_cuda

CLAMP = math.log(1000 / 16)
WEIGHTS = (10.0, 10.0, 5.0, 5.0)

side = st.floats(1.0, 1000.0, width=32)
corner = st.floats(0.0, 2000.0, width=32)
box = st.builds(lambda x, y, w, h: [x, y, x + w, y + h], corner, corner, side, side)


def random_boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 300
    return torch.cat([low, low + torch.rand(count, 2, generator=generator) * 80 + 1], dim=1)


@given(st.lists(st.tuples(box, box), min_size=1, max_size=20))
def test_decoding_an_encoded_box_gives_it_back(pairs: list[tuple[list[float], list[float]]]) -> None:
    boxes, anchors = (torch.tensor(side) for side in zip(*pairs, strict=True))
    again = decode_boxes(encode_boxes(boxes, anchors, WEIGHTS), anchors, WEIGHTS, clamp=10.0)
    torch.testing.assert_close(again, boxes, rtol=1e-4, atol=2e-2)


def test_the_coder_is_torchvisions() -> None:
    oracle, boxes, anchors = BoxCoder(WEIGHTS), random_boxes(50, 0), random_boxes(50, 1)
    torch.testing.assert_close(encode_boxes(boxes, anchors, WEIGHTS), oracle.encode_single(boxes, anchors))
    deltas = torch.randn(50, 4, generator=torch.Generator().manual_seed(2)) * 20
    expected = oracle.decode_single(deltas, anchors)
    assert torch.equal(decode_boxes(deltas, anchors, WEIGHTS, CLAMP), expected)


def test_a_bfloat16_delta_does_not_round_the_box() -> None:
    anchor = torch.tensor([[901.0, 903.0, 1001.0, 1003.0]])
    assert torch.equal(decode_boxes(torch.zeros(1, 4, dtype=torch.bfloat16), anchor, WEIGHTS, CLAMP), anchor)


def test_a_huge_delta_is_cut_before_it_overflows() -> None:
    anchor = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    grown = decode_boxes(torch.tensor([[0.0, 0.0, 1e9, 1e9]]), anchor, WEIGHTS, CLAMP)
    torch.testing.assert_close(grown[:, 2:] - grown[:, :2], torch.tensor([[1000.0, 1000.0]]))


def test_boxes_are_cut_to_their_own_image() -> None:
    boxes = torch.tensor([[-5.0, -5, 50, 50], [-5, -5, 50, 50]])
    sizes = torch.tensor([[20.0, 30.0], [100.0, 40.0]])
    assert clip_boxes(boxes, sizes).tolist() == [[0, 0, 30, 20], [0, 0, 40, 50]]


def test_thin_and_non_finite_boxes_are_not_wide_enough() -> None:
    boxes = torch.tensor([[0.0, 0, 5, 5], [0, 0, 0, 5], [0, 0, math.nan, 5], [0, 0, math.inf, 5], [3, 3, 1, 1]])
    assert wide_enough(boxes, 1e-2).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("count", [300, 1500])  # torchvision separates classes in one way below 1000 boxes, in another above
def test_suppression_of_a_batch_equals_torchvisions_image_by_image(count: int) -> None:
    generator = torch.Generator().manual_seed(3)
    boxes, scores = random_boxes(3 * count, 4), torch.rand(3 * count, generator=generator)
    groups = torch.randint(0, 4, (3 * count,), generator=generator)
    images = torch.arange(3).repeat_interleave(count)
    expected = torch.cat(
        [
            batched_nms(boxes[rows], scores[rows], groups[rows], 0.5) + rows.start
            for rows in (slice(i * count, (i + 1) * count) for i in range(3))
        ]
    )
    assert torch.equal(suppress(boxes, scores, groups, images, 0.5), expected)


def test_suppression_of_nothing_is_nothing() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    with pretend_cuda():
        for device in ("cpu", "cuda"):
            numbers, scores = empty.to(device), torch.zeros(0, device=device)
            nothing = suppress(torch.zeros(0, 4, device=device), scores, numbers, numbers, 0.5, numbers > 0, most=5)
            assert (len(nothing), nothing.dtype) == (0, torch.int64)


def test_suppression_skips_an_image_without_boxes() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10]])
    kept = suppress(boxes, torch.tensor([0.5, 0.9, 0.1]), torch.zeros(3).long(), torch.tensor([0, 0, 2]), 0.5)
    assert kept.tolist() == [1, 2]


@pytest.mark.parametrize("most", [3, 50, 10_000])
def test_a_gpu_keeps_what_the_cpu_keeps(most: int) -> None:
    generator = torch.Generator().manual_seed(7)
    boxes, scores = (
        random_boxes(900, 5).round(),
        torch.rand(900, generator=generator),
    )  # whole pixels: no overlap is a close call
    groups, images = torch.randint(0, 3, (900,), generator=generator), torch.arange(3).repeat_interleave(300)
    wanted = torch.rand(900, generator=generator) > 0.3
    images[600:] = 5
    boxes[~wanted] = torch.tensor([math.nan, -math.inf, math.inf, 5.0])
    scores[~wanted] = math.nan
    expected = suppress(boxes, scores, groups, images, 0.5, wanted, most)
    with pretend_cuda() as log:
        arguments = [tensor.to("cuda") for tensor in (boxes, scores, groups, images)]
        wanted_there = wanted.to("cuda")
        log.clear()
        kept = suppress(*arguments, 0.5, wanted_there, most)
        assert len(list(log.syncs.elements())) == 1, log.report()
    assert kept.tolist() == expected.tolist()
    assert wanted[expected].all()


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(1, 10))
def test_the_best_of_each_image_are_its_first_entries(images: list[int], count: int) -> None:
    ordered = sorted(images)
    expected = [ordered[:place].count(image) < count for place, image in enumerate(ordered)]
    assert top_per_image(torch.tensor(ordered, dtype=torch.int64), count).tolist() == expected
