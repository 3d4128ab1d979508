"""A small input with awkward names, which the tests of listings and of plans share."""

from __future__ import annotations

from masklake.pipeline.storage.storage import Storage

NAMES = ["a b.jpg", "c+d.JPG", "e%20f.png", "notes.txt", "sub/ü.webp", "sub/deep/g.jpeg"]
IMAGES = [name for name in NAMES if name != "notes.txt"]


def fill(place: str, names: list[str] = NAMES) -> Storage:
    """Writes an object of each name below a folder or prefix; the storage that did."""
    storage = Storage()
    for name in names:
        storage.write_bytes(storage.join(place, name), name.encode())
    return storage
