"""A mistyped path of a table is reported with the table that may be meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from masklake.pipeline.errors import TableError
from masklake.pipeline.storage.nearby import first_missing, folder_within, similar_folder
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.query import query
from masklake.pipeline.table.table import open_table


def why(uri: str) -> str:
    with pytest.raises(TableError) as told:
        query(Storage(), uri, "SELECT 1")
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_mistyped_table_is_named_as_missing_with_the_one_beside_it(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    place = str(tmp_path)
    write_run(f"{place}/out/labels", "run-a", [make_row(0, "a.jpg")])
    Storage().write_bytes(f"{place}/out/lables.old/x", b"no table, and a closer name")
    assert why(f"{place}/out/lables") == f"{place}/out/lables: the folder does not exist; did you mean {place}/out/labels?"
    assert why(f"{place}/ot/labels") == (
        f"{place}/ot/labels: the folder {place}/ot does not exist; did you mean {place}/out/labels?"
    )
    assert why(f"{place}/out/zzz") == f"{place}/out/zzz: the folder does not exist; check the path"
    assert why(f"{place}/out") == f"{place}/out: is a folder and no table; did you mean {place}/out/labels?"
    assert why(f"{place}/out/lables.old") == f"{place}/out/lables.old: is a folder and no table; check the path"


@pytest.mark.slow
def test_prefixes_of_a_bucket_are_its_folders(s3: Any) -> None:
    for key in ("out/labels/_masklake/table.json", "out/lables.old/x", "/odd/x", "x.jpg"):
        s3.put(key, b"1")
    storage, wanted = Storage(), s3.uri("ot/lables")
    missing = first_missing(storage, wanted)
    assert missing == s3.uri("ot")
    assert similar_folder(storage, missing, s3.uri("ot/labels"), lambda uri: True) == s3.uri("out/labels")
    assert folder_within(storage, s3.uri("out"), lambda uri: uri.endswith("labels")) == s3.uri("out/labels")
    assert sorted(storage.folders(s3.uri())) == ["", "out"]


def test_a_near_folder_is_named_although_it_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "Labels").mkdir()
    assert why(str(tmp_path / "labels")).endswith(f"does not exist; did you mean {tmp_path}/Labels?")


def test_a_table_without_a_run_is_another_case(tmp_path: Path) -> None:
    open_table(Storage(), str(tmp_path / "labels")).initialise()
    assert re.search("labels: holds no committed run yet", why(str(tmp_path / "labels")))


def test_a_folder_that_cannot_be_listed_costs_the_hint_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("masklake.pipeline.storage.storage.os.scandir", refuse)
    assert why(str(tmp_path / "labels")).endswith("does not exist; check the path")
