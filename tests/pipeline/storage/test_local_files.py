"""Local files appear whole, with the umask's permissions, and are synced with their folders."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from masklake.pipeline.errors import AccessDeniedError, InputNotFoundError, StorageError
from masklake.pipeline.labelling.lease import Lease
from masklake.pipeline.labelling.run_output import merge
from masklake.pipeline.storage import local_files
from masklake.pipeline.storage.storage import Storage


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """A umask that holds while the test runs."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


def test_what_the_pipeline_writes_has_the_umasks_permissions(tmp_path: Path, umask: int, write_run: Any, make_row: Any) -> None:
    folder = tmp_path / "table"
    table = write_run(
        str(folder), "night-1", [make_row(number, f"{number}.jpg") for number in range(4)], rows_per_file=2, commit=False
    )
    with Lease.acquire(Storage(), str(folder), "night-1"):
        table.commit_run("night-1", merge(table, "night-1", table.run_files("night-1")))
    source = tmp_path / "source"
    source.write_bytes(b"content")
    source.chmod(0o600)
    Storage().upload(source, str(folder / "uploaded"))
    found = modes(folder)
    assert {"uploaded", "_masklake/table.json", "_masklake/night-1/lease", "_delta_log/00000000000000000001.json"} <= set(found)
    assert {
        name: mode for name, mode in found.items() if mode != ((0o777 if (folder / name).is_dir() else 0o666) & ~umask)
    } == {}


def test_a_file_and_the_names_of_its_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def record(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(local_files.os, "fsync", record)
    local_files.write(tmp_path / "a/b/file", b"content")
    made = [os.path.relpath(path, tmp_path) for path in synced]
    assert made[:2] == [".", "a"], "the names of the new folders"
    assert made[2].startswith("a/b/.masklake-"), "the content, before it gets its name"
    assert made[3:] == ["a/b"], "the name"
    assert (tmp_path / "a/b/file").read_bytes() == b"content"


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    uri = str(tmp_path / "file")
    Storage().write_bytes(uri, b"old")
    monkeypatch.setattr(local_files.os, "fsync", full)
    with pytest.raises(StorageError, match="file: no space left on the disk; free some space"):
        Storage().write_bytes(uri, b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_a_folder_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for name in ("file/object", "file/below/object"):
        with pytest.raises(InputNotFoundError, match="is a file where a folder is needed"):
            Storage().write_bytes(str(tmp_path / name), b"")
    Storage().write_bytes(str(tmp_path / "a/b/object"), b"")
    assert (tmp_path / "a/b").is_dir()


@pytest.mark.parametrize("write", [local_files.write, lambda path, data: Storage().upload(source_of(path, data), str(path))])
def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path, write: Any) -> None:
    """Replaced by a file, root's /dev/null would be gone for everybody."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write(pipe, b"content")
        assert os.read(reader, 100) == b"content"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def source_of(path: Path, data: bytes) -> Path:
    source = path.with_name("source")
    source.write_bytes(data)
    return source


def test_the_file_of_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    link = tmp_path / "latest.csv"
    for target in ("runs/there.csv", "runs/not-yet.csv"):
        (tmp_path / "runs/there.csv").write_bytes(b"old")
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        local_files.write(link, b"new")
        assert (link.is_symlink(), (tmp_path / target).read_bytes()) == (True, b"new")


def test_whether_a_file_could_be_written_is_told_without_a_trace(tmp_path: Path) -> None:
    Storage().check_writable(str(tmp_path / "new" / "table"))
    Storage().check_writable(str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(InputNotFoundError, match=r"^\S+/file/table: is a file where a folder is needed, or lies below one"):
        Storage().check_writable(str(tmp_path / "file" / "table"))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_others_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(AccessDeniedError, match=f"^{tmp_path}/table: "):
        Storage().check_writable(str(tmp_path / "table"))


@pytest.mark.parametrize(
    ("number", "said"), [(errno.EACCES, "permission denied"), (errno.EROFS, "is read-only"), (errno.ENOSPC, "no space left")]
)
def test_what_the_system_says_of_a_folder_is_passed_on(
    tmp_path: Path, number: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(local_files.tempfile, "TemporaryFile", refused)
    with pytest.raises((AccessDeniedError, StorageError), match=f"^{tmp_path}/table: .*{said}"):
        Storage().check_writable(str(tmp_path / "table"))
