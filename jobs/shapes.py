"""Generates a data set of drawn shapes in COCO format, for the demo and the tests.

Disks, triangles and arrows of random colour, size and angle overlap on a noisy background. Each instance has the mask of its
visible part; an arrow also has four keypoints. Everything depends on the seed alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
from numpy.typing import NDArray
from PIL import Image, ImageDraw

DISK, TRIANGLE, ARROW = 1, 2, 3

CATEGORIES: list[dict[str, Any]] = [
    {"id": DISK, "name": "disk", "supercategory": "shape"},
    {"id": TRIANGLE, "name": "triangle", "supercategory": "shape"},
    {
        "id": ARROW,
        "name": "arrow",
        "supercategory": "shape",
        "keypoints": ["tip", "left_wing", "right_wing", "tail"],
        "skeleton": [[1, 2], [1, 3], [1, 4]],
    },
]

MIN_VISIBLE = 0.6
"""Minimum visible share of each overlapping shape: a sliver could not be recognised."""
CONTRAST = 70
"""Minimum distance of any two colours in an image, in grey levels of RGB."""
PLACEMENTS = 20
"""Number of attempts to place a shape without hiding another one."""

ASPECTS = ((1.0, 1.0), (1.0, 0.75), (0.75, 1.0))
"""Width and height of an image, in units of the longer side."""


@dataclass(frozen=True)
class Shape:
    """One shape before it is drawn: its outline (P, 2) and its keypoints (K, 2), both x, y in pixels."""

    category_id: int
    outline: NDArray[np.float64]
    keypoints: NDArray[np.float64] | None = None


def generate(folder: Path | str, images: int, size: int = 160, seed: int = 0) -> Path:
    """Draws `images` images whose longer side is `size` pixels into `folder`/images, and writes their annotations.

    Returns the path of the COCO file, `folder`/instances.json. The same arguments write the same bytes.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    image_rows: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, images + 1):
        random = np.random.default_rng((seed, number))
        picture, instances = draw(random, size)
        name = f"shapes-{seed}-{number:06d}.jpg"
        Image.fromarray(picture).save(folder / "images" / name, quality=92)
        height, width = picture.shape[:2]
        image_rows.append({"id": number, "file_name": name, "width": width, "height": height})
        for instance in instances:
            annotations.append({"id": len(annotations) + 1, "image_id": number, "iscrowd": 0, **instance})
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": image_rows, "annotations": annotations, "categories": CATEGORIES}))
    return path


def draw(random: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """Returns one image, uint8 RGB (H, W, 3), and its COCO annotations without ids."""
    share_x, share_y = ASPECTS[random.integers(len(ASPECTS))]
    width, height = round(size * share_x), round(size * share_y)
    canvas, ground = background(random, width, height)
    colours = [ground]
    shapes: list[Shape] = []
    visible: list[NDArray[np.bool_]] = []
    for _ in range(random.integers(3, 7)):
        shape, mask = place(random, shapes, visible, width, height)
        colours.append(contrasting_colour(random, colours))
        canvas[mask] = colours[-1]
        shapes, visible = [*shapes, shape], [*(part & ~mask for part in visible), mask]
    picture = canvas + random.normal(0, 6, canvas.shape)
    instances = [annotation(shape, part) for shape, part in zip(shapes, visible, strict=True) if part.any()]
    return np.clip(picture, 0, 255).astype(np.uint8), instances


def place(
    random: np.random.Generator, shapes: list[Shape], visible: list[NDArray[np.bool_]], width: int, height: int
) -> tuple[Shape, NDArray[np.bool_]]:
    """Returns a shape on top of the others, and its pixels, bool (H, W). After PLACEMENTS attempts it may hide more of the
    others than MIN_VISIBLE allows.
    """
    for _ in range(PLACEMENTS):
        shape = random_shape(random, width, height)
        mask = rasterise(shape, width, height)
        areas = [rasterise(other, width, height).sum() for other in shapes]
        if all((part & ~mask).sum() >= MIN_VISIBLE * area for part, area in zip(visible, areas, strict=True)):
            break
    return shape, mask


def background(random: np.random.Generator, width: int, height: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns a colour gradient from corner to corner, float64 (H, W, 3), and its mean colour (3,)."""
    start, end = random.uniform(30, 225, 3), random.uniform(-25, 25, 3)
    across = np.linspace(-0.5, 0.5, width)[None, :, None]
    down = np.linspace(-0.5, 0.5, height)[:, None, None]
    return start + end * (across + down), start


def contrasting_colour(random: np.random.Generator, others: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Returns a colour at least CONTRAST grey levels away from all others: an outline on a shape of the same colour would be
    invisible.
    """
    while True:
        colour = random.uniform(0, 255, 3)
        if all(np.linalg.norm(colour - other) > CONTRAST for other in others):
            return colour


def random_shape(random: np.random.Generator, width: int, height: int) -> Shape:
    """Returns a shape of random category, place, size (20 to 40 % of the longer side) and angle."""
    radius = max(width, height) * random.uniform(0.1, 0.2)
    centre = random.uniform((radius * 0.6,) * 2, (width - radius * 0.6, height - radius * 0.6))
    angle = random.uniform(0, 2 * math.pi)
    category_id = int(random.integers(DISK, ARROW + 1))
    if category_id == DISK:
        turn = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        return Shape(DISK, centre + radius * np.stack([np.cos(turn), np.sin(turn)], 1))
    if category_id == TRIANGLE:
        turn = angle + np.array([0, 1, 2]) * 2 * math.pi / 3
        return Shape(TRIANGLE, centre + 1.15 * radius * np.stack([np.cos(turn), np.sin(turn)], 1))
    return arrow(centre, 1.25 * radius, angle)


def arrow(centre: NDArray[np.float64], length: float, angle: float) -> Shape:
    """Returns an arrow that points along `angle` (radians); keypoints: tip, left wing, right wing, tail."""
    forward = np.array([math.cos(angle), math.sin(angle)])
    left = np.array([forward[1], -forward[0]])  # image y points down

    def at(along: float, across: float) -> NDArray[np.float64]:
        return centre + length * (along * forward + across * left)

    tip, left_wing, right_wing, tail = at(1, 0), at(0.1, 0.7), at(0.1, -0.7), at(-1, 0)
    outline = [tip, left_wing, at(0.1, 0.27), at(-1, 0.27), at(-1, -0.27), at(0.1, -0.27), right_wing]
    return Shape(ARROW, np.stack(outline), np.stack([tip, left_wing, right_wing, tail]))


def rasterise(shape: Shape, width: int, height: int) -> NDArray[np.bool_]:
    """Returns the pixels that the shape covers, bool (H, W)."""
    bitmap = Image.new("1", (width, height))
    ImageDraw.Draw(bitmap).polygon([tuple(point) for point in shape.outline], fill=1)
    return np.array(bitmap)


def annotation(shape: Shape, visible: NDArray[np.bool_]) -> dict[str, Any]:
    """Returns one COCO annotation: box, area, compressed RLE and, for arrows, keypoints (0 outside, 1 hidden, 2 visible)."""
    rle = pycocotools.mask.encode(np.asfortranarray(visible.astype(np.uint8)))
    row: dict[str, Any] = {
        "category_id": shape.category_id,
        "bbox": [float(side) for side in pycocotools.mask.toBbox(rle)],
        "area": int(visible.sum()),
        "segmentation": {"size": [int(side) for side in visible.shape], "counts": rle["counts"].decode()},
    }
    if shape.keypoints is not None:
        row["keypoints"] = [value for point in shape.keypoints for value in keypoint(point, visible)]
        row["num_keypoints"] = sum(1 for flag in row["keypoints"][2::3] if flag)
    return row


def keypoint(point: NDArray[np.float64], visible: NDArray[np.bool_]) -> tuple[float, float, int]:
    """Returns x, y and COCO's visibility flag; zeros if the point lies outside the image."""
    height, width = visible.shape
    x, y = float(point[0]), float(point[1])
    if not (0 <= x < width and 0 <= y < height):
        return 0.0, 0.0, 0
    near = visible[max(0, int(y) - 2) : int(y) + 3, max(0, int(x) - 2) : int(x) + 3]
    return round(x, 2), round(y, 2), 2 if near.any() else 1
