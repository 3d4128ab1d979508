"""The limits of decoding, without pydantic (see `model.fields`)."""

from dataclasses import dataclass
from typing import Annotated

from masklake.model.fields import Option

MOST_PIXELS = 2**32 - 1
"""Maximum number of pixels of an image: the run lengths of its masks are 32-bit numbers."""
MOST_SIDE = 2**31 - 1
"""Maximum width and height of an image: the table stores them in 32 bits."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DecodeFields:
    """Limits of an image's size."""

    max_bytes: Annotated[int, Option("Maximum size of a compressed file, in bytes.", gt=0, le=2**40)] = 256 * 2**20
    max_pixels: Annotated[
        int,
        Option(
            "Maximum width x height in pixels. Larger images get the status too_large.", gt=1, le=MOST_PIXELS, panel="Input"
        ),
    ] = 100_000_000
    max_side: Annotated[
        int, Option("Maximum width and height, in pixels (65,535 is the most a JPEG can state).", gt=0, le=MOST_SIDE)
    ] = 65_535
