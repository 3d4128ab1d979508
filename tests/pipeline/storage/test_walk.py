"""Listings that survive real folders: what cannot be listed is counted, and the rest is listed."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from masklake.pipeline.errors import AccessDeniedError, InputNotFoundError, StorageError
from masklake.pipeline.storage import walk as walk_module
from masklake.pipeline.storage.left_out import LeftOut
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.walk import walk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images in two folders."""
    (tmp_path / "sub/deep").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.jpg", "sub/deep/c.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def names(folder: Path, left_out: LeftOut | None) -> list[str]:
    return [os.path.relpath(path, folder) for path, _ in walk(str(folder), left_out)]


def test_links_and_special_files_end_no_listing(folder: Path) -> None:
    (folder / "self.jpg").symlink_to("self.jpg")
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "through.jpg").symlink_to("a.jpg/below.jpg")
    (folder / "sub/up").symlink_to("..")
    (folder / "copy.jpg").symlink_to("sub/b.jpg")
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(folder / "socket.jpg"))
        left_out = LeftOut()
        assert names(folder, left_out) == ["a.jpg", "copy.jpg", "sub/b.jpg", "sub/deep/c.jpg"]
        assert left_out.counts() == {"broken_links": 3, "not_regular": 2, "linked_folders": 1}
        assert names(folder, None) == ["a.jpg", "copy.jpg", "sub/b.jpg", "sub/deep/c.jpg"]


def test_the_same_folder_is_never_walked_twice(folder: Path) -> None:
    """Two folders that link to each other."""
    (folder / "sub/to_other").symlink_to(folder / "other")
    (folder / "other").mkdir()
    (folder / "other/to_sub").symlink_to(folder / "sub")
    assert names(folder, LeftOut()) == ["a.jpg", "sub/b.jpg", "sub/deep/c.jpg"]


class _Scan:
    """`os.scandir` that fails for some folders, as it does for who may not read them (root may read all)."""

    def __init__(self, failures: dict[str, OSError]) -> None:
        self._failures, self._scandir = failures, os.scandir

    def __call__(self, path: str) -> Any:
        if path in self._failures:
            error = self._failures[path]
            error.filename = path
            raise error
        return self._scandir(path)


def test_unreadable_and_removed_folders_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "lost+found").mkdir()
    failures = {
        str(folder / "lost+found"): PermissionError(13, "Permission denied"),
        str(folder / "sub/deep"): FileNotFoundError(2, "No such file or directory"),
    }
    monkeypatch.setattr(walk_module.os, "scandir", _Scan(failures))
    left_out = LeftOut()
    assert names(folder, left_out) == ["a.jpg", "sub/b.jpg"]
    assert str(left_out) == (f"left out: 1 unreadable folder ({folder}/lost+found), 1 removed meanwhile ({folder}/sub/deep)")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_who_must_see_everything_gets_the_error_with_the_right_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    """A table's own folder: a data file that is not seen would be written again."""
    monkeypatch.setattr(walk_module.os, "scandir", _Scan({str(folder / "sub/deep"): error}))
    with pytest.raises((AccessDeniedError, StorageError), match=f"^{folder}/sub/deep: "):
        list(Storage().list_objects(str(folder)))


def test_the_folder_itself_must_be_readable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module.os, "scandir", _Scan({str(folder): PermissionError(13, "Permission denied")}))
    with pytest.raises(AccessDeniedError, match=f"^{folder}: permission denied"):
        list(Storage().list_objects(str(folder), LeftOut()))
    os.mkfifo(folder / "pipe")
    with pytest.raises(InputNotFoundError, match="is a file where a folder is needed"):
        list(Storage().list_objects(str(folder / "pipe")))


def test_names_that_are_not_utf8_are_left_out(folder: Path) -> None:
    (folder / os.fsdecode(b"b\xff.jpg")).write_bytes(b"b")
    left_out = LeftOut()
    assert names(folder, left_out) == ["a.jpg", "sub/b.jpg", "sub/deep/c.jpg"]
    assert str(left_out) == f"left out: 1 name that is not UTF-8 ({folder}/b\\udcff.jpg)"
    str(left_out).encode()


def test_a_folder_that_may_not_be_looked_at_is_not_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a folder of somebody else's, `os.path.isdir` is false for what is there and for what is not."""
    status = os.stat

    def refused(path: Any, **options: Any) -> os.stat_result:
        if str(path) == f"{folder}/sub/deep":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return status(path, **options)

    monkeypatch.setattr("masklake.pipeline.storage.storage.os.stat", refused)
    with pytest.raises(AccessDeniedError, match=r"sub/deep: permission denied"):
        next(Storage().list_objects(f"{folder}/sub/deep"))
    with pytest.raises(InputNotFoundError, match="not found"):
        next(Storage().list_objects(f"{folder}/sub/nowhere"))
    with pytest.raises(InputNotFoundError, match="is a file where a folder is needed"):
        next(Storage().list_objects(f"{folder}/a.jpg/sub"))
