"""Atomic, durable writes of local files, with the permissions of the umask.

`tempfile` creates files that only their owner may read, regardless of the umask: colleagues could not query such a table.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write(path: Path, data: bytes) -> None:
    """Writes a file atomically: a reader sees the old or the new bytes, never a part. Parent folders are created. Raises
    OSError.

    The target of a link is replaced, not the link. A pipe or a device (`/dev/stdout`, `/dev/null`) is written to directly.
    """
    with _replacing(path) as file:
        file.write(data)


def copy(source: Path, path: Path) -> None:
    """Copies the content of a file to `path`, atomically as `write` does."""
    with _replacing(path) as file, source.open("rb") as content:
        shutil.copyfileobj(content, file, 1 << 20)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as device:  # a rename would replace the device itself: root may replace even /dev/null
            yield device
        return
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    make_folder(path.parent)
    temporary = path.with_name(f".masklake-{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def check_writable(folder: Path) -> None:
    """Raises OSError if no file can be created in a folder or, if it does not exist, the nearest one above. Leaves no trace."""
    while not os.path.lexists(folder):
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def make_folder(folder: Path) -> None:
    """Creates a folder and its missing parents, and syncs their directory entries to disk."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def sync(path: Path) -> None:
    """Syncs a file that another program wrote, and its directory entry, to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder may be writable but not readable
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # some file systems over a network or in user space
