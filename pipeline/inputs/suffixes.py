"""Which names end like an image's."""

from __future__ import annotations

import re

# fmt: off
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib",
    ".tif", ".tiff", ".gif", ".avif", ".avifs", ".jp2", ".j2k", ".jpf", ".jpx", ".jpc", ".j2c", ".pbm", ".pgm", ".ppm",
    ".pnm", ".pfm", ".tga", ".psd", ".qoi", ".sgi", ".pcx",
)
"""What a folder's listing takes for an image, in any case; a list and a pattern may name anything."""

OTHER_SUFFIXES = (
    ".ico", ".icns", ".cur", ".dds", ".blp", ".fli", ".flc", ".ras", ".rgb", ".rgba", ".bw", ".icb", ".vda", ".vst",
)
"""What the decoder reads, too, and a folder's listing leaves: icons, textures, animations, and suffixes of many meanings."""
# fmt: on

IMAGE_REGEX = f"({'|'.join(re.escape(suffix) for suffix in IMAGE_SUFFIXES)})$"
"""RE2 and Python; case does not matter."""

_ADDRESS_OR_IMAGE = re.compile(f"^[a-z][a-z0-9+.-]*://|{IMAGE_REGEX}", re.IGNORECASE)


def looks_like_image(name: str) -> bool:
    """Whether this is an address or ends like an image's name; column names do neither."""
    return _ADDRESS_OR_IMAGE.search(name.strip()) is not None
