"""Images to canvases: resizes, normalises and pads (section 3.1), on the device that runs the network.

The canvas of an image depends on the image alone. Padding changes features by several percent, so otherwise a label would
depend on the other images in its batch: only equal canvases are batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from masklake.model.config import ModelConfig
from masklake.model.devices import constant, sent
from masklake.model.errors import ConfigError

Size = tuple[int, int]

_WEIGHT_BITS = 22  # of Pillow's fixed-point weights for bytes


@dataclass(frozen=True)
class Canvas:
    """A batch for the network.

    pixels: (B, 3, H, W), channels last, normalised, zero outside the images; blank ones may follow. sizes: float32 (B, 2),
    height and width of each image on its canvas. ratios: float32 (B, 2), original pixels per canvas pixel, vertical and
    horizontal; host_ratios: the same on the host.
    """

    pixels: Tensor
    sizes: Tensor
    ratios: Tensor
    host_ratios: Tensor

    @property
    def size(self) -> Size:
        """(H, W) of the canvas."""
        return self.pixels.shape[-2], self.pixels.shape[-1]


def check_image(image: Tensor) -> None:
    """Raises ConfigError unless `image` is uint8 (3, H, W) with at least one pixel."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ConfigError(
            f"an image must be a uint8 RGB tensor (3, H, W), not {image.dtype} {tuple(image.shape)}; convert it first"
        )


def resized_size(size: Size, min_size: int, config: ModelConfig) -> Size:
    """Returns (height, width) on the canvas: the shorter side becomes `min_size` unless the longer would then exceed
    `max_size`.
    """
    scale = min(min_size / min(size), config.max_size / max(size))
    if scale >= 1 and not config.upscale:
        return size
    if config.resize == "pil":
        return _nearest_size(size, min_size, config.max_size)
    height, width = (max(int(side * scale), 1) for side in size)  # an image thinner than a pixel keeps one
    return height, width


def _nearest_size(size: Size, min_size: int, max_size: int) -> Size:
    """Rounds to the nearest pixel; the shorter side is exact before the limit, as in Detectron2's order of arithmetic."""
    scale = min_size / min(size)
    sides = [float(min_size), scale * size[1]] if size[0] < size[1] else [scale * size[0], float(min_size)]
    shrink = min(max_size / max(sides), 1.0)
    height, width = (max(int(side * shrink + 0.5), 1) for side in sides)
    return height, width


def canvas_size(size: Size, config: ModelConfig) -> Size:
    """Returns (height, width) of the canvas for an image of `size` pixels at inference."""
    return _padded(resized_size(size, config.min_sizes[-1], config), config.canvas_divisor)


def _padded(size: Size, divisor: int) -> Size:
    height, width = (-(-side // divisor) * divisor for side in size)
    return height, width


def make_canvas(images: Sequence[Tensor], config: ModelConfig, min_size: int, device: torch.device) -> Canvas:
    """Returns a batch of images on canvases that are large enough for each of them.

    images: uint8 (3, H, W) of any sizes; they are sent to the device as bytes, in one copy. min_size: length of the shorter
    side on the canvas, in pixels.
    """
    originals = [(image.shape[-2], image.shape[-1]) for image in images]
    targets = [resized_size(size, min_size, config) for size in originals]
    height, width = _padded((max(h for h, _ in targets), max(w for _, w in targets)), config.canvas_divisor)
    pixels = torch.zeros(len(images), 3, height, width, device=device).to(memory_format=torch.channels_last)
    mean, std = (constant(values, device)[:, None, None] for values in (config.image_mean, config.image_std))
    for place, image, (h, w) in zip(pixels, _to_device(images, device), targets, strict=True):
        if config.image_channels == "bgr":
            image = image.flip(0)
        if config.resize == "pil":
            image = resize_like_pillow(image, (h, w))
        normalised = (image.float() / config.image_divisor - mean) / std
        if (h, w) != image.shape[-2:]:
            normalised = functional.interpolate(normalised[None], size=(h, w), mode="bilinear", align_corners=False)[0]
        place[:, :h, :w] = normalised
    sizes = torch.tensor(targets, dtype=torch.float32)
    ratios = torch.tensor(originals, dtype=torch.float32) / sizes
    sizes_there, ratios_there = sent(torch.stack([sizes, ratios]), device)
    return Canvas(pixels, sizes_there, ratios_there, ratios)


def filled_up(pixels: Tensor, places: int) -> Tensor:
    """Returns a batch of this many canvases: these, then blank ones. pixels: (B, 3, H, W), channels last."""
    if len(pixels) == places:
        return pixels
    batch = pixels.new_zeros(places, *pixels.shape[1:]).contiguous(memory_format=torch.channels_last)
    batch[: len(pixels)] = pixels
    return batch


def _to_device(images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Returns the images on the device; host images are packed into a single transfer of bytes.

    Decoders store the three bytes of a pixel together, and they are sent in that order: reordering them on the host takes ten
    times as long as copying them. They are packed in pinned memory, which torch keeps for the next batch; new memory would have
    to be mapped first.
    """
    if any(image.device.type != "cpu" for image in images):
        return [sent(image, device) for image in images]
    if device.type == "cpu":
        return list(images)
    by_pixel = [image.permute(1, 2, 0).is_contiguous() for image in images]
    stored = [image.permute(1, 2, 0) if pixels else image for image, pixels in zip(images, by_pixel, strict=True)]
    packed = torch.empty(sum(image.numel() for image in images), dtype=torch.uint8, pin_memory=True)
    torch.cat([image.reshape(-1) for image in stored], out=packed)
    parts = torch.split(packed.to(device, non_blocking=True), [image.numel() for image in images])
    there = [part.view(image.shape) for part, image in zip(parts, stored, strict=True)]
    return [image.permute(2, 0, 1) if pixels else image for image, pixels in zip(there, by_pixel, strict=True)]


def resize_like_pillow(image: Tensor, size: Size) -> Tensor:
    """Resizes uint8 (C, H, W) -> uint8 (C, h, w), byte for byte like Pillow's bilinear `Image.resize`, on any device.

    Pillow resizes along x, rounds to bytes, then along y; its weights are integer multiples of 2^-22. (Images a hundred times
    as tall as wide, which it shrinks along y first, differ in single bytes.)
    """
    for axis, length in ((2, size[1]), (1, size[0])):
        if image.shape[axis] == length:
            continue
        places, weights = (sent(table, image.device) for table in _pillow_taps(image.shape[axis], length))
        lines = image.movedim(axis, 0).contiguous()  # whole rows in memory: gathering single bytes takes three times as long
        total = torch.full((length, *lines.shape[1:]), 1 << (_WEIGHT_BITS - 1), dtype=torch.int32, device=image.device)
        for place, weight in zip(places, weights, strict=True):
            total.addcmul_(lines.index_select(0, place).int(), weight[:, None, None])
        image = (total >> _WEIGHT_BITS).to(torch.uint8).movedim(0, axis)
    return image


@lru_cache(maxsize=64)
def _pillow_taps(size: int, length: int) -> tuple[Tensor, Tensor]:
    """Returns which of `size` pixels each of `length` pixels sums: indices int64 and weights int32, both (taps, length).

    The filter is a triangle around the pixel's centre, two pixels of the coarser grid wide.
    """
    scale = size / length
    reach = max(scale, 1.0)
    centre = (np.arange(length) + 0.5) * scale
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + reach + 0.5).astype(np.int64), size)
    places = first + np.arange((last - first).max())[:, None]
    weights = np.maximum(1 - np.abs((places - centre + 0.5) * (1 / reach)), 0) * (places < last)
    weights = np.floor(weights / weights.sum(axis=0) * (1 << _WEIGHT_BITS) + 0.5)
    return torch.from_numpy(np.minimum(places, size - 1)), torch.from_numpy(weights.astype(np.int32))
