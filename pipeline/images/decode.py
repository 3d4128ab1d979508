"""Decodes compressed bytes of any origin to an RGB image, or to a status and a reason. Never raises, even for hostile bytes.

The rules are the same for every format. The header is checked before a pixel is decoded. Only the first frame is used. The EXIF
orientation is applied, so that boxes refer to the pixels that a viewer shows. Alpha is dropped, not blended. More than 8 bits
are scaled to 8 (`_scale_to_8_bits`). A truncated file is an error, never half an image. Colour profiles are ignored, except in
CIELAB files, which cannot be converted to RGB without one.
"""

from __future__ import annotations

import functools
import io
import warnings
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict

from masklake.pipeline.images.fields import DecodeFields
from masklake.pipeline.images.status import ERROR_LENGTH, Status

# fmt: off
FORMATS = (
    "AVIF", "BLP", "BMP", "CUR", "DDS", "DIB", "FLI", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD",
    "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP",
)
# fmt: on
"""Formats that are opened: rasters that Pillow decodes by itself (MPO, several JPEGs in one file, is read as JPEG).

EPS and WMF would start another program, and the rest have no decoder.
"""

ORIENTATION_TAG = 0x0112
# The operation that makes each EXIF orientation upright (TIFF 6.0, section 8); from 5 on, width and height are swapped.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodeLimits(BaseModel, DecodeFields, frozen=True):
    """Limits of an image's size. Each limit changes rows (`too_large`), so all of them are part of `label_id`."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Header:
    """What the header of a file says. Sizes are in pixels as stored, before the orientation, unless `upright`; 0 if unknown."""

    status: Status
    width: int = 0
    height: int = 0
    error: str | None = None
    upright: bool = False

    @property
    def pixels(self) -> int:
        """Number of pixels to decode."""
        return self.width * self.height

    def refused(self) -> Decoded:
        """Returns the result of an image whose status is not ok."""
        return Decoded(self.status, width=self.width or None, height=self.height or None, error=self.error)


@dataclass(frozen=True)
class Decoded:
    """One image: uint8 RGB (3, H, W) if the status is ok, else None and a reason.

    width and height are those of the upright image, in pixels; None if not even the header could be read.
    """

    status: Status
    image: torch.Tensor | None = None
    width: int | None = None
    height: int | None = None
    error: str | None = None


def read_header(data: bytes, limits: DecodeLimits) -> Header:
    """Returns the status of `data` by its header: ok, too_large or decode_error. Takes microseconds and allocates no pixels."""
    if len(data) > limits.max_bytes:
        return Header(Status.TOO_LARGE, error=f"{len(data)} bytes; the limit is {limits.max_bytes}")
    try:
        with _open(data, limits) as image:
            return _size_status(image.size, limits)
    except Exception as error:  # noqa: BLE001 - a parser fed hostile bytes can raise anything; the row carries the reason
        status, reason = _classify(error, limits)
        return Header(status, error=reason)


def read_upright(file: IO[bytes], limits: DecodeLimits) -> Header:
    """Same as `read_header` for a file, or for its first bytes, with the size of the upright image if the header contains the
    orientation.

    That is the case for JPEG. Other formats may store the orientation after the pixels, and `upright` is False for them.
    """
    _configure_pillow()
    _allow(limits.max_pixels)
    try:
        with Image.open(file, formats=FORMATS) as image:
            header = _size_status(image.size, limits)
            if header.status is not Status.OK or image.format not in ("JPEG", "MPO"):
                return header
            turned = _orientation(image) >= 5
            size = (header.height, header.width) if turned else (header.width, header.height)
            return Header(Status.OK, *size, upright=True)
    except Exception as error:  # noqa: BLE001 - as above
        status, reason = _classify(error, limits)
        return Header(status, error=reason)


def decode(data: bytes, limits: DecodeLimits | None = None, header: Header | None = None) -> Decoded:
    """Returns the upright RGB image in `data`, or a status and a reason. Releases the interpreter lock while decoding.

    header: the result of `read_header` for the same arguments, if it is known.
    """
    limits = limits or DecodeLimits()
    header = header or read_header(data, limits)
    if header.status is not Status.OK:
        return header.refused()
    try:
        image = _decode_pixels(data, limits)
    except Exception as error:  # noqa: BLE001 - as above
        status, reason = _classify(error, limits)
        return Decoded(status, width=header.width, height=header.height, error=reason)
    return Decoded(Status.OK, image=image, width=image.shape[2], height=image.shape[1])


@functools.cache
def _configure_pillow() -> None:
    """Silences Pillow's warnings, which its errors and our limits cover, and keeps truncated files an error."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    ImageFile.LOAD_TRUNCATED_IMAGES = False


def _open(data: bytes, limits: DecodeLimits) -> Image.Image:
    _configure_pillow()
    _allow(limits.max_pixels)
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _allow(pixels: int) -> None:
    """Lets Pillow open images of so many pixels. Its limit applies to the whole process, so it is never lowered: other code
    opens images, too, and `_size_status` checks our own limit.
    """
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, (pixels + 1) // 2)  # it refuses twice as many


class _TooLargeInside(Exception):
    """An image is larger than its container's header says, and larger than the limits."""


def _size_status(size: tuple[int, int], limits: DecodeLimits) -> Header:
    """Returns the status of an image of this (width, height) in pixels."""
    width, height = size
    if width <= 0 or height <= 0:
        return Header(Status.DECODE_ERROR, error=f"{width} x {height} pixels: nothing to see")
    if width * height > limits.max_pixels:
        return Header(Status.TOO_LARGE, width, height, f"{width} x {height} pixels; the limit is {limits.max_pixels} in all")
    if max(width, height) > limits.max_side:
        return Header(Status.TOO_LARGE, width, height, f"{width} x {height} pixels; the limit is {limits.max_side} a side")
    return Header(Status.OK, width, height)


def _classify(error: Exception, limits: DecodeLimits) -> tuple[Status, str]:
    """Returns status and reason for an exception of a decoder; the reason is the same on every run (it contains no
    addresses).
    """
    if isinstance(error, _TooLargeInside):
        return Status.TOO_LARGE, str(error)
    if isinstance(error, Image.DecompressionBombError):
        size = str(error).partition(" exceeds limit")[0]  # what follows is Pillow's limit, not the one that was set
        return Status.TOO_LARGE, f"{size}; the limit is {limits.max_pixels} in all"[:ERROR_LENGTH]
    if isinstance(error, UnidentifiedImageError):
        return Status.DECODE_ERROR, "not an image of a known format"
    return Status.DECODE_ERROR, f"{type(error).__name__}: {error}"[:ERROR_LENGTH]


def _decode_pixels(data: bytes, limits: DecodeLimits) -> torch.Tensor:
    """Returns uint8 RGB (3, H, W), upright. Raises Pillow's errors."""
    # torchvision's JPEG decoder returns the same pixels 20% faster in two threads (2.05 against 2.5 ms at 640 x 480), but its
    # import takes 4.5 s: a worker would have to decode ten thousand images to make up for it.
    with _open(data, limits) as image:
        image.load()  # TIFF turns itself upright here, and PNG may state its orientation after the pixels
        inner = _size_status(image.size, limits)  # an image in a container (ICO) may be larger than promised
        if inner.status is Status.TOO_LARGE:
            raise _TooLargeInside(inner.error)
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> torch.Tensor:
    """Returns the pixels of an image in any of Pillow's modes: uint8 RGB (3, H, W), upright. Raises Pillow's errors."""
    image.load()
    pixels = _to_rgb(image)
    # Not `ImageOps.exif_transpose`: it rewrites the metadata, too, and raises if they are hostile.
    if (turn := _TURNS.get(_orientation(image))) is not None:
        pixels = np.array(Image.fromarray(pixels).transpose(turn))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF (or XMP) orientation, 1 to 8; 1 if the metadata cannot be read, since the pixels are still good."""
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - hostile metadata, as above
        return 1
    return value if value in _TURNS else 1


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Returns uint8 (H, W, 3) for a loaded image in any of Pillow's modes."""
    if image.mode.startswith("I") or image.mode == "F":
        gray = _scale_to_8_bits(np.asarray(image))
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("La", "RGBa"):  # premultiplied: undo that first, or transparent pixels turn dark
        image = image.convert(image.mode.upper())
    if image.mode == "LAB":
        image = _lab_to_rgb(image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    """Returns a CIELAB (D50) image in sRGB; Pillow's own `convert` does not support it."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if converted is None:  # only with inPlace=True
        raise ValueError("CIELAB to RGB gave no image")
    return converted


def _scale_to_8_bits(samples: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Returns gray samples of more than 8 bits, scaled to uint8 by a rule that depends on this image alone.

    Integers: full scale is the smallest of 8, 10, 12, 14, 16 (then 24, 32) bits that holds the largest sample, because cameras
    and microscopes store 12 bits in 16. Floats: full scale is 0..1 or 0..255 if it holds all samples, else the range of the
    image. Values that are not finite become 0.
    """
    values = np.nan_to_num(samples.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = 0.0, float(values.max(initial=0.0))
    if np.issubdtype(samples.dtype, np.floating):
        low = min(0.0, float(values.min(initial=0.0)))
        high = next((scale for scale in (1.0, 255.0) if low == 0.0 and high <= scale), high)
    else:
        high = float(next(2**bits - 1 for bits in (8, 10, 12, 14, 16, 24, 64) if high < 2**bits))
    scaled = (values - low) * (255.0 / max(high - low, np.finfo(np.float64).tiny))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
