"""Lists the files below a local folder. An entry that fails does not end the listing: it is left out and counted."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator

from masklake.pipeline.storage.left_out import LeftOut, Reason

Enters = Callable[[str], bool]


def walk(folder: str, left_out: LeftOut | None, enters: Enters = lambda folder: True) -> Iterator[tuple[str, os.stat_result]]:
    """Yields (path, stat) of every regular file below `folder`, by name. Raises OSError if the folder itself cannot be read.

    enters: returns whether to list a subfolder. left_out: counts entries that cannot be listed. Without it, a folder or file
    that cannot be read raises its OSError, for callers that must see everything.

    Links to files are followed, links to folders are not (they may loop). Files removed meanwhile, broken links, files that are
    not regular and names that are not UTF-8 are never listed.
    """
    pending = [folder]
    while pending:
        current = pending.pop()
        try:
            with os.scandir(current) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if left_out is None or current == folder:
                raise
            left_out.add(_folder_reason(error), current)
            continue
        pending += [entry.path for entry in reversed(found) if _is_folder(entry) and enters(entry.path)]
        for entry in found:
            if not _is_folder(entry) and (status := _file_stat(entry, left_out)) is not None:
                yield entry.path, status


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:  # some file systems need a stat for this; that of the entry itself gives the reason
        return False


def _file_stat(entry: os.DirEntry[str], left_out: LeftOut | None) -> os.stat_result | None:
    """Returns the stat of a regular file with a usable name, or None."""
    status: os.stat_result | None = None
    try:
        status = entry.stat()
        reason = _unusable(entry.path, status)
    except OSError as error:
        reason = _file_reason(error, entry)
        if left_out is None and reason is Reason.UNREADABLE_FILES:
            raise
    if reason is not None and left_out is not None:
        left_out.add(reason, entry.path)
    return status if reason is None else None


def _unusable(path: str, status: os.stat_result) -> Reason | None:
    if stat.S_ISDIR(status.st_mode):  # only links to folders reach this point
        return Reason.LINKED_FOLDERS
    if not stat.S_ISREG(status.st_mode):
        return Reason.NOT_REGULAR
    return None if is_utf8(path) else Reason.NOT_UTF8


def _folder_reason(error: OSError) -> Reason:
    return Reason.GONE if error.errno in (errno.ENOENT, errno.ENOTDIR) else Reason.UNREADABLE_FOLDERS


def _file_reason(error: OSError, entry: os.DirEntry[str]) -> Reason:
    if error.errno == errno.ELOOP:
        return Reason.BROKEN_LINKS
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return Reason.BROKEN_LINKS if entry.is_symlink() else Reason.GONE
    return Reason.UNREADABLE_FILES


def is_utf8(name: str) -> bool:
    """Returns whether a table can store this name. Python represents other bytes of a file name as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
