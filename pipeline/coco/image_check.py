"""Checks which images of a COCO file can be used, before a run is planned and during the run; both numbers are limited.

Before the run, every file must exist, and its header must be that of an image of the annotated size. Other faults are found
only by decoding (a truncated file, or one that was removed meanwhile). The loader then uses another image instead, so that
epochs keep their length, and reports it.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import obstore

from masklake.model.errors import MaskLakeError
from masklake.model.wording import agreeing, counted_of
from masklake.pipeline.coco.dataset import MISSING_FILE, NAMED, UNUSABLE_IMAGE, CocoDataset, without_images
from masklake.pipeline.coco.fields import MOST_UNUSABLE
from masklake.pipeline.coco.values import CocoImage
from masklake.pipeline.errors import AnnotationError, InputNotFoundError, StorageError
from masklake.pipeline.images.decode import DecodeLimits, read_upright
from masklake.pipeline.images.status import Status
from masklake.pipeline.storage.errors import translated
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import parse_uri, relative_to

HEAD_BYTES = 8192
"""Number of bytes read from a remote object: they contain the size of nearly every JPEG and PNG."""
LOOKS_AT_ONCE = 32
MISSING = "there is no such file"


def unusable_share(allow_missing: bool, most: float | None) -> float:
    """Returns the share of images that may be left out: `most` if given, else 5 % with `allow_missing` and none without."""
    return most if most is not None else (MOST_UNUSABLE if allow_missing else 0.0)


def usable_images(storage: Storage, dataset: CocoDataset, folder: str, most: float = 0.0) -> CocoDataset:
    """Returns the data set without the images that cannot be used, counted by reason.

    folder: of the images, local or s3://. most: share of images that may be left out. Raises AnnotationError that names the
    first few images and reasons if there are more, or if no image can be used; StorageError if the storage is busy or out of
    reach.
    """
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        reasons = list(pool.map(lambda image: _look(storage, relative_to(folder, image.file_name), image), dataset.images))
    found = {image.id: (image.file_name, reason) for image, reason in zip(dataset.images, reasons, strict=True) if reason}
    if not found:
        return dataset
    missing = {number for number, (_, reason) in found.items() if reason == MISSING}
    if len(missing) == len(dataset.images) or len(missing) > most * len(dataset.images):
        names = ", ".join(found[number][0] for number in list(missing)[:NAMED]) + (", ..." if len(missing) > NAMED else "")
        others = [f"{name}: {reason}" for number, (name, reason) in found.items() if number not in missing]
        also = f" {len(others):,} more cannot be used: {first_few(others)}." if others else ""
        absent = counted_of(len(missing), len(dataset.images), "image")
        raise AnnotationError(
            f"{absent} of {dataset.source} {agreeing(len(missing), 'is', 'are')} not in {folder}: {names}. Check the "
            f"image folder{'' if len(missing) == len(dataset.images) else f', or {remedy(most)}'}.{also}"
        )
    check_unusable([f"{name}: {reason}" for name, reason in found.values()], len(dataset.images), most, dataset.source)
    left = without_images(dataset, missing, MISSING_FILE)
    return without_images(left, found.keys() - missing, UNUSABLE_IMAGE)


def check_unusable(messages: Sequence[str], images: int, most: float, source: str, already: int = 0) -> None:
    """Raises AnnotationError if more than the share `most` of `images` images cannot be used, or if none can.

    messages: one per unusable image, with its reason. already: number of images that were left out and reported before.
    """
    unusable = len(messages) + already
    if messages and (unusable > most * images or unusable >= images):
        raise AnnotationError(
            f"{counted_of(unusable, images, 'image')} of {source} cannot be used: {first_few(messages, unusable)}. "
            f"Fix or remove {agreeing(unusable, 'it', 'them')}{'' if unusable >= images else f', or {remedy(most)}'}."
        )


def first_few(messages: Sequence[str], of: int | None = None) -> str:
    """Returns the first few messages in one line, and how many of them (or of `of`) are not shown."""
    more = (len(messages) if of is None else of) - len(messages[:NAMED])
    return "; ".join(messages[:NAMED]) + (f"; and {more:,} more" if more else "")


def listed_and_left_out(dataset: CocoDataset) -> tuple[int, int]:
    """Returns the number of images that the file of a data set lists, and of those that `usable_images` left out."""
    left_out = sum(dataset.dropped.get(reason, 0) for reason in (MISSING_FILE, UNUSABLE_IMAGE))
    return len(dataset.images) + left_out, left_out


def remedy(most: float) -> str:
    """Returns the remedy for more unusable images than the share `most`."""
    if most == 0:
        return f"leave such images out with --allow-missing (up to {MOST_UNUSABLE:.0%} of all; --max-unusable says how many)"
    return f"allow more than {100 * most:.3g}% of the images to be left out with --max-unusable"


def _look(storage: Storage, uri: str, image: CocoImage) -> str | None:
    """Returns why an image cannot be used, as far as its header tells, or None. Raises StorageError if the storage is busy or
    out of reach.
    """
    limits = DecodeLimits()
    try:
        with translated(uri), _opened(storage, uri) as (file, whole):
            header = read_upright(file, limits)
    except InputNotFoundError:
        return MISSING
    except MaskLakeError as error:
        if isinstance(error, StorageError) and error.may_pass:
            raise  # a store that is down says nothing about its images
        return str(error)
    if header.status is not Status.OK:  # a part of a file may say too little
        return header.error if whole or header.status is Status.TOO_LARGE else None
    return wrong_size((header.width, header.height), image, turned=not header.upright)


@contextmanager
def _opened(storage: Storage, uri: str) -> Iterator[tuple[IO[bytes], bool]]:
    """Context manager for a local file, or the first bytes of a remote one, and whether that is the whole file."""
    at = parse_uri(uri)
    if at.is_local:
        if not stat.S_ISREG(Path(at.key).stat().st_mode):
            raise InputNotFoundError(f"{uri}: not a regular file")
        with Path(at.key).open("rb") as file:
            yield file, True
        return
    if storage.literal_object(uri) is not None:  # a key that obstore cannot name: the loader judges it
        yield io.BytesIO(), False
        return
    store, key = storage.object_store(uri)
    if obstore.head(store, key)["size"] == 0:
        yield io.BytesIO(), True
        return
    part = obstore.get(store, key, options={"range": (0, HEAD_BYTES)})
    head = bytes(part.bytes())
    yield io.BytesIO(head), len(head) == part.meta["size"]


def wrong_size(size: tuple[int, int], row: CocoImage | Mapping[str, int], turned: bool = False) -> str | None:
    """Returns a message if the width and height of an upright image are not those of its row, else None. turned: whether the
    two may be swapped.
    """
    width, height = (row.width, row.height) if isinstance(row, CocoImage) else (row["width"], row["height"])
    if size == (width, height) or (turned and size == (height, width)):
        return None
    return f"the upright image is {size[0]} x {size[1]} pixels, its annotations are for {width} x {height}"
