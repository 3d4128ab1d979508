"""Pictures show the right pixels in the right colours, and survive odd rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from PIL import Image

from masklake.pipeline.results.drawing import PALETTE, contact_sheet, draw_instances


def instance(**changes: Any) -> dict[str, Any]:
    """A disk-like row in a 100 x 80 image."""
    row: dict[str, Any] = {"category": "cat", "score": 0.9, "x1": 20.0, "y1": 30.0, "x2": 60.0, "y2": 70.0, "rle": None}
    return row | {"keypoints": None} | changes


def square(x1: int, y1: int, x2: int, y2: int, height: int = 80, width: int = 100) -> bytes:
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[y1:y2, x1:x2] = 1
    return bytes(pycocotools.mask.encode(mask)["counts"])


def grey(height: int = 80, width: int = 100) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.full((height, width, 3), 128, np.uint8)


def test_a_mask_is_filled_where_it_is() -> None:
    picture = np.asarray(draw_instances(grey(), [instance(rle=square(20, 30, 60, 70))], readable_side=1))
    assert picture.shape == (80, 100, 3)
    red, green, blue = PALETTE[0]
    assert np.allclose(picture[60, 40], np.array([128, 128, 128]) * 0.55 + np.array([red, green, blue]) * 0.45, atol=2)
    assert (picture[5, 90] == 128).all(), "outside nothing changes"


def test_a_small_image_is_enlarged_with_its_instances() -> None:
    picture = draw_instances(grey(), [instance(rle=square(20, 30, 60, 70))], readable_side=400)
    assert picture.size == (400, 320)
    assert picture.getpixel((160, 240)) != (128, 128, 128)
    assert picture.getpixel((360, 20)) == (128, 128, 128)


def test_boxes_and_points_are_drawn_without_masks() -> None:
    points = [{"x": 40.0, "y": 50.0, "score": 1.0}, {"x": 80.0, "y": 50.0, "score": 1.0}]
    rows = [instance(keypoints=points, x1=10.0, x2=90.0)]
    joined = draw_instances(grey(), rows, {"cat": [(0, 1)]}, readable_side=1)
    apart = draw_instances(grey(), rows, readable_side=1)
    assert joined.getpixel((10, 50)) == PALETTE[0], "the box's left side"
    assert joined.getpixel((60, 50)) == PALETTE[0], "the bone between the points"
    assert apart.getpixel((60, 50)) == (128, 128, 128)
    assert apart.getpixel((40, 50)) == (255, 255, 255)


def test_neighbours_have_colours_of_their_own() -> None:
    rows = [instance(x1=5.0, x2=30.0, y1=40.0), instance(x1=60.0, x2=80.0, y1=40.0)]
    picture = draw_instances(grey(), rows, readable_side=1)
    assert picture.getpixel((5, 60)) != picture.getpixel((60, 60))


@pytest.mark.parametrize(
    "changes",
    [
        {"rle": square(0, 0, 0, 0)},
        {"x1": 60.0, "x2": 20.0},
        {"x1": 50.0, "x2": 50.0, "y1": 50.0, "y2": 50.0},
        {"x1": -40.0, "y1": -40.0, "x2": 500.0, "y2": 500.0},
        {
            "keypoints": [
                {"x": float("nan"), "y": float("nan"), "score": float("nan")},
                None,
                {"x": None, "y": None, "score": 0},
            ]
        },
        {"keypoints": [{"x": 1.0, "y": 1.0, "score": 1.0}] * 17, "category": "person"},
        {"category": "猫 Кошка é" * 5},
    ],
)
def test_odd_rows_are_drawn(changes: dict[str, Any]) -> None:
    assert draw_instances(grey(), [instance(**changes)]).size == (1000, 800)


def test_no_instances_and_one_pixel() -> None:
    assert draw_instances(grey(), []).size == (1000, 800)
    assert draw_instances(grey(1, 1), [instance()]).size == (960, 960)


def test_a_crowd_is_drawn() -> None:
    rows = [instance(x1=float(x), x2=x + 3.0, y1=float(y), y2=y + 3.0) for x in range(0, 95, 5) for y in range(0, 75, 5)]
    assert draw_instances(grey(), rows).size == (1000, 800)


def test_a_sheet_shows_every_image_in_order() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [Image.new("RGB", (50 * (index + 1), 60), colour) for index, colour in enumerate(colours)]
    sheet = contact_sheet(images, ["one", "two", "a very long caption " * 20], columns=2, cell=100, margin=10)
    assert sheet.width == 10 + 2 * 110
    assert sheet.getpixel((60, 60)) == (255, 0, 0)
    assert sheet.getpixel((170, 60)) == (0, 255, 0)
    assert sheet.getpixel((60, sheet.height // 2 + 60)) == (0, 0, 255)


def test_a_sheet_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="images"):
        contact_sheet([], [])
