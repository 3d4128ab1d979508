"""Augmentation: image, boxes, masks and keypoints stay consistent."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pycocotools.mask
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masklake.pipeline.coco.document import to_rle
from masklake.pipeline.training.augmentation import Augmentation, choose_window, make_sample
from tests.pipeline.training.scenes import PLAIN, annotation, painted, spec


def masks_of(sample: Any) -> np.ndarray:
    height, width = sample.image.shape[1:]
    return np.stack(
        [pycocotools.mask.decode(to_rle({"size": [height, width], "counts": counts}, height, width)) for counts in sample.rles]
    )


def test_an_untouched_sample_is_the_annotation() -> None:
    rows = [annotation(3, 2, 10, 5), annotation(20, 4, 6, 9, 4, [21, 5, 2, 24, 6, 1, 0, 0, 0])]
    image = painted(20, 40, rows)
    sample = make_sample(image, rows, spec(), (0, 0, 0))
    assert torch.equal(sample.image, image)
    np.testing.assert_array_equal(sample.boxes, [[3, 2, 13, 7], [20, 4, 26, 13]])
    np.testing.assert_array_equal(sample.labels, [9, 4])
    np.testing.assert_array_equal(masks_of(sample)[1], pycocotools.mask.decode(to_rle(rows[1]["segmentation"], 20, 40)))
    np.testing.assert_array_equal(sample.keypoints[1], [[21, 5, 2], [24, 6, 1], [0, 0, 0]])
    assert not sample.keypoints[0].any()


def test_a_mirror_moves_everything_and_exchanges_left_and_right() -> None:
    rows = [annotation(20, 4, 6, 9, 4, [21, 5, 2, 24, 6, 1, 25, 12, 2])]
    mirrored = next(
        sample
        for n in range(20)
        if (sample := make_sample(painted(20, 40, rows), rows, spec(Augmentation()), (0, 0, n))).boxes[0, 0] != 20
    )
    np.testing.assert_array_equal(mirrored.boxes, [[14, 4, 20, 13]])
    np.testing.assert_array_equal(mirrored.keypoints[0], [[19, 5, 2], [15, 12, 2], [16, 6, 1]])
    np.testing.assert_array_equal(masks_of(mirrored)[0], mirrored.image[0].numpy() > 0)


def test_a_mirror_exchanges_pixels_where_keypoints_name_pixels() -> None:
    """With an offset of a half, keypoint 0 is the middle of the first pixel: a mirror makes the last one of it."""
    rows = [annotation(20, 4, 6, 9, 4, [21, 5, 2, 0, 6, 1, 39, 12, 2])]
    pixels = dataclasses.replace(spec(Augmentation()), keypoint_offset=0.5)
    mirrored = next(
        sample for n in range(20) if (sample := make_sample(painted(20, 40, rows), rows, pixels, (0, 0, n))).boxes[0, 0] != 20
    )
    np.testing.assert_array_equal(mirrored.keypoints[0], [[18, 5, 2], [0, 12, 2], [39, 6, 1]])
    still = make_sample(painted(20, 40, rows), rows, dataclasses.replace(pixels, augmentation=PLAIN), (0, 0, 0))
    np.testing.assert_array_equal(still.keypoints[0], [[21, 5, 2], [0, 6, 1], [39, 12, 2]])


def test_both_mirrors_are_half_a_turn_and_keep_left_and_right() -> None:
    rows = [annotation(20, 4, 6, 9, 4, [21, 5, 2, 24, 6, 1, 25, 12, 2])]
    both = Augmentation(flip_vertical=True)
    turned = next(
        sample
        for n in range(40)
        if tuple((sample := make_sample(painted(20, 40, rows), rows, spec(both), (0, 0, n))).boxes[0, :2]) == (14, 7)
    )
    np.testing.assert_array_equal(turned.keypoints[0], [[19, 15, 2], [16, 14, 1], [15, 8, 2]])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    crop=st.none() | st.integers(32, 70),
    scale=st.sampled_from([(1.0, 1.0), (0.5, 0.5), (0.7, 1.6), (2.0, 2.0)]),
    vertical=st.booleans(),
)
def test_image_mask_and_box_stay_together(seed: int, crop: int | None, scale: tuple[float, float], vertical: bool) -> None:
    random = np.random.default_rng(seed)
    height, width = (int(v) for v in random.integers(40, 90, 2))
    x, y = (int(v) for v in random.integers(0, 20, 2))
    rows = [annotation(x, y, int(random.integers(6, 19)), int(random.integers(6, 19)))]
    augmentation = Augmentation(crop=crop, scale=scale, flip_vertical=vertical)
    sample = make_sample(painted(height, width, rows), rows, spec(augmentation), (seed,))
    if crop:
        assert max(sample.image.shape[1:]) <= crop + 1
    if not len(sample.labels):
        return
    mask, (x1, y1, x2, y2) = masks_of(sample)[0], sample.boxes[0]
    seen = sample.image[0].numpy() > 100  # a resized edge is blurred over a pixel
    assert (mask.astype(bool) ^ seen).sum() <= 2 * (mask.shape[0] + mask.shape[1])
    inside = np.argwhere(mask)
    assert np.abs(inside.min(0) - (y1, x1)).max() <= 1.5
    assert np.abs(inside.max(0) + 1 - (y2, x2)).max() <= 1.5


def test_instances_outside_the_window_go_and_cut_ones_get_the_visible_parts_box() -> None:
    rows = [annotation(2, 2, 20, 20), annotation(150, 150, 20, 20)]
    crop = Augmentation(flip=False, crop=64)
    seen = set()
    for n in range(30):
        sample = make_sample(painted(200, 200, rows), rows, spec(crop), (0, 0, n))
        assert sample.image.shape == (3, 64, 64)
        assert len(sample.labels) <= 1
        for box, mask in zip(sample.boxes, masks_of(sample) if sample.rles else [], strict=True):
            np.testing.assert_array_equal(box, [*np.argwhere(mask).min(0)[::-1], *np.argwhere(mask).max(0)[::-1] + 1])
            seen.add(tuple(box[2:] - box[:2]))
    assert len(seen) > 1  # some were cut


def test_a_window_shows_an_instance_where_there_is_one() -> None:
    boxes = np.array([[400.0, 400, 420, 420]])
    augmentation = Augmentation(crop=200)
    windows = [choose_window((500, 500), boxes, augmentation, np.random.default_rng(n)) for n in range(50)]
    hits = [w for w in windows if w.left <= 410 <= w.left + w.width and w.top <= 410 <= w.top + w.height]
    assert len(hits) == 50
    assert len({(w.left, w.top) for w in windows}) > 25


def test_keypoints_that_leave_the_window_become_absent() -> None:
    rows = [annotation(0, 0, 100, 100, 4, [5, 5, 2, 95, 95, 2, 50, 50, 2])]
    for n in range(10):
        sample = make_sample(painted(100, 100, rows), rows, spec(Augmentation(flip=False, crop=40)), (0, 0, n))
        present = sample.keypoints[0][sample.keypoints[0][:, 2] > 0]
        assert len(present) < 3
        assert ((present[:, :2] >= 0) & (present[:, :2] <= 40)).all()
