"""File name suffixes of images."""

from __future__ import annotations

import re

# fmt: off
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib",
    ".tif", ".tiff", ".gif", ".avif", ".avifs", ".jp2", ".j2k", ".jpf", ".jpx", ".jpc", ".j2c", ".pbm", ".pgm", ".ppm",
    ".pnm", ".pfm", ".tga", ".psd", ".qoi", ".sgi", ".pcx",
)
"""Suffixes of images in the listing of a folder, in any case. A list and a pattern may name any file."""

OTHER_SUFFIXES = (
    ".ico", ".icns", ".cur", ".dds", ".blp", ".fli", ".flc", ".ras", ".rgb", ".rgba", ".bw", ".icb", ".vda", ".vst",
)
"""Suffixes that the decoder reads too, but the listing of a folder skips: icons, textures, animations, and ambiguous
suffixes.
"""

UNREAD_SUFFIXES = (
    ".heic", ".heif", ".heics", ".heifs", ".hif", ".jxl", ".jxr", ".wdp", ".hdp", ".dng", ".cr2", ".cr3", ".crw", ".nef",
    ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw", ".x3f", ".iiq", ".3fr", ".exr", ".hdr", ".dcm",
    ".svg", ".svgz", ".eps", ".ai", ".emf", ".wmf",
)
"""Suffixes of images that the decoder does not read: phones' HEIC, cameras' raw files, drawings."""
# fmt: on

IMAGE_REGEX = f"({'|'.join(re.escape(suffix) for suffix in IMAGE_SUFFIXES)})$"
UNREAD_REGEX = f"({'|'.join(re.escape(suffix) for suffix in UNREAD_SUFFIXES)})$"
"""Both are valid in RE2 and Python; to be matched without regard to case."""

_ADDRESS_OR_IMAGE = re.compile(f"^[a-z][a-z0-9+.-]*://|{IMAGE_REGEX}", re.IGNORECASE)


def looks_like_image(name: str) -> bool:
    """Returns whether a text is an address or ends like the name of an image, unlike the name of a column."""
    return _ADDRESS_OR_IMAGE.search(name.strip()) is not None
