"""Drawings of labels: instances on their image, and contact sheets of many images.

Each instance has its own colour for its mask. Boxes show category and score; keypoints are dots joined by their skeleton. Small
images are enlarged so that the text can be read.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from masklake.model.coco_categories import PERSON_KEYPOINTS, PERSON_SKELETON

Colour = tuple[int, int, int]
Skeleton = Sequence[tuple[int, int]]

PALETTE: tuple[Colour, ...] = (
    (230, 57, 70),
    (29, 141, 238),
    (46, 174, 82),
    (255, 170, 0),
    (155, 81, 224),
    (0, 178, 178),
    (240, 98, 188),
    (122, 92, 60),
    (140, 198, 24),
    (84, 101, 255),
    (255, 112, 45),
    (0, 134, 97),
)
"""Twelve colours that are easy to tell apart on photographs; instances use them in turn."""

READABLE_SIDE = 960  # pixels: an image whose longer side is shorter is enlarged
MASK_OPACITY = 0.45
CROWD = 40  # number of instances above which a label is only drawn if it fits into its box


def draw_instances(
    image: NDArray[np.uint8],
    instances: Sequence[Mapping[str, Any]],
    skeletons: Mapping[str, Skeleton] | None = None,
    readable_side: int = READABLE_SIDE,
) -> Image.Image:
    """Returns the image with its instances, enlarged by an integer factor if its longer side is below `readable_side`.

    image: uint8 RGB (H, W, 3). instances: rows of the view `detections`: category, score, x1, y1, x2, y2, and optionally rle
    (COCO compressed counts) and keypoints (x, y, score each; in pixels of the image). skeletons: pairs of keypoint indices from
    0, by category; 17 keypoints without an entry are drawn as COCO's person.
    """
    height, width = image.shape[:2]
    scale = max(1, math.ceil(readable_side / max(height, width)))
    enlarged = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    pixels = np.array(enlarged)
    ordered = sorted(instances, key=_extent, reverse=True)  # the small ones on top
    colours = [PALETTE[index % len(PALETTE)] for index in range(len(ordered))]
    for row, colour in zip(ordered, colours, strict=True):
        if row.get("rle"):
            _fill_mask(pixels, _decode(row["rle"], height, width), colour, scale)
    picture = Image.fromarray(pixels)
    _draw_lines(picture, ordered, colours, scale, skeletons or {})
    _draw_labels(picture, ordered, colours, scale)
    return picture


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int = 4, cell: int = 320, margin: int = 12
) -> Image.Image:
    """Returns the images in a grid of square cells of `cell` pixels, each centred above its caption. Raises ValueError without
    images.
    """
    if not images or len(images) != len(captions) or columns < 1:
        raise ValueError(f"a sheet needs images, a caption each and columns; got {len(images)}, {len(captions)} and {columns}")
    font = _font(max(11, cell // 26))
    line = _text_size("Ag", font)[1] + 8
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    size = (margin + columns * (cell + margin), margin + rows * (cell + line + margin))
    sheet = Image.new("RGB", size, (250, 250, 250))
    pen = ImageDraw.Draw(sheet)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = margin + index % columns * (cell + margin)
        top = margin + index // columns * (cell + line + margin)
        thumbnail = image.convert("RGB")
        thumbnail.thumbnail((cell, cell), Image.Resampling.LANCZOS)
        sheet.paste(thumbnail, (left + (cell - thumbnail.width) // 2, top + (cell - thumbnail.height) // 2))
        pen.text((left + cell / 2, top + cell + line / 2), _shorten(caption, font, cell), (40, 40, 40), font, anchor="mm")
    return sheet


def _extent(row: Mapping[str, Any]) -> float:
    return float((row["x2"] - row["x1"]) * (row["y2"] - row["y1"]))


def _decode(rle: bytes | str, height: int, width: int) -> NDArray[np.bool_]:
    decoded: NDArray[np.uint8] = pycocotools.mask.decode({"size": [height, width], "counts": rle})
    return decoded.astype(bool)


def _fill_mask(pixels: NDArray[np.uint8], mask: NDArray[np.bool_], colour: Colour, scale: int) -> None:
    """Blends the mask into `pixels` (its size times `scale`) and draws its outline, within the mask's own extent only."""
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(ys):
        return
    window = np.s_[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    inside = mask[window].repeat(scale, axis=0).repeat(scale, axis=1)
    region = pixels[ys[0] * scale : (ys[-1] + 1) * scale, xs[0] * scale : (xs[-1] + 1) * scale]
    tint = np.array(colour, np.float32) * MASK_OPACITY
    region[inside] = (region[inside] * (1 - MASK_OPACITY) + tint).astype(np.uint8)
    region[_outline(inside, _line_width(pixels.shape[1], pixels.shape[0]))] = colour


def _outline(inside: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """Returns the pixels of the mask within `width` of its edge."""
    core = inside
    for _ in range(width):
        padded = np.pad(core, 1)
        core = padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~core


def _draw_lines(
    picture: Image.Image,
    rows: Sequence[Mapping[str, Any]],
    colours: Sequence[Colour],
    scale: int,
    skeletons: Mapping[str, Skeleton],
) -> None:
    pen = ImageDraw.Draw(picture)
    width = _line_width(*picture.size)
    for row, colour in zip(rows, colours, strict=True):
        pen.rectangle(_box(row, scale), outline=colour, width=width)
    for row, colour in zip(rows, colours, strict=True):
        points = [_point(keypoint, scale) for keypoint in row.get("keypoints") or ()]
        joints = skeletons.get(row["category"]) or (PERSON_SKELETON if len(points) == len(PERSON_KEYPOINTS) else ())
        for start, end in joints:
            if (first := points[start]) and (second := points[end]):
                pen.line([first, second], fill=colour, width=width + 1)
        for point in filter(None, points):
            _dot(pen, point, width * 2, colour)


def _point(keypoint: Mapping[str, Any] | None, scale: int) -> tuple[float, float] | None:
    if keypoint is None or keypoint["x"] is None or keypoint["y"] is None:
        return None
    point = float(keypoint["x"]) * scale, float(keypoint["y"]) * scale
    return point if all(map(math.isfinite, point)) else None


def _dot(pen: ImageDraw.ImageDraw, centre: tuple[float, float], radius: int, colour: Colour) -> None:
    x, y = centre
    pen.ellipse(
        (x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 255), outline=colour, width=max(1, radius // 2)
    )


def _box(row: Mapping[str, Any], scale: int) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(row[side]) * scale for side in ("x1", "y1", "x2", "y2"))
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _draw_labels(picture: Image.Image, rows: Sequence[Mapping[str, Any]], colours: Sequence[Colour], scale: int) -> None:
    """Draws category and score of each box, best score first, where they cover no other label."""
    pen = ImageDraw.Draw(picture)
    font = _font(min(26, max(13, max(picture.size) // 60)))
    taken: list[tuple[float, float, float, float]] = []
    for row, colour in sorted(zip(rows, colours, strict=True), key=lambda pair: -pair[0]["score"]):
        text = f"{row['category']} {row['score']:.2f}"
        width, height = _text_size(text, font)
        box = _box(row, scale)
        if len(rows) > CROWD and width + 8 > box[2] - box[0]:
            continue
        place = _free_place(box, (width + 8, height + 6), picture.size, taken)
        if place is None:
            continue
        taken.append(place)
        pen.rectangle(place, fill=colour)
        bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 150
        centre = (place[0] + place[2]) / 2, (place[1] + place[3]) / 2
        pen.text(centre, text, (0, 0, 0) if bright else (255, 255, 255), font, anchor="mm")


def _free_place(
    box: tuple[float, float, float, float],
    size: tuple[float, float],
    picture: tuple[int, int],
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float] | None:
    """Returns a free rectangle for a label: above the box, inside its top, below it, or inside its bottom; None if all are
    taken.
    """
    width, height = size
    for top, left in itertools.product((box[1] - height, box[1], box[3], box[3] - height), (box[0], box[2] - width)):
        left = min(max(left, 0.0), max(picture[0] - width, 0.0))
        place = left, top, left + width, top + height
        if top < 0 or place[3] > picture[1]:
            continue
        if not any(place[0] < t[2] and t[0] < place[2] and place[1] < t[3] and t[1] < place[3] for t in taken):
            return place
    return None


def _line_width(width: int, height: int) -> int:
    return max(1, round(max(width, height) / 500))


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Returns DejaVu Sans, which comes with matplotlib and covers most alphabets, else Pillow's own font."""
    found = importlib.util.find_spec("matplotlib")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder, "mpl-data", "fonts", "ttf", "DejaVuSans-Bold.ttf")
        if path.is_file():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)


def _text_size(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
    left, top, right, bottom = font.getbbox(text)
    return math.ceil(right - left), math.ceil(bottom - top)


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Returns the text, with its middle left out if it does not fit: paths mostly differ at their ends."""
    if _text_size(text, font)[0] <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        cut = f"{text[: kept // 2]}…{text[-(kept - kept // 2) :]}"
        if _text_size(cut, font)[0] <= width:
            return cut
    return "…"
