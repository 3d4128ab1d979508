"""`masklake runs`, as people and scripts use it."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import masklake
from masklake.jobs import runs
from masklake.jobs.cli import main
from masklake.pipeline.labelling.lease import Lease
from masklake.pipeline.labelling.run_list import RunInfo
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.runs import RunRecord
from masklake.pipeline.table.schema import FILE_SCHEMA
from masklake.pipeline.table.table import Table, open_table

DAY = datetime(2026, 1, 1, 2, tzinfo=UTC)
MODEL = "maskrcnn_resnet50_fpn-0123456789ab"
START = {"by": "ann@gpu-host-17", "seconds": 3723.4, "workers": 8, "gpus": 8, "device": "cuda", "price_per_hour": 98.3}


def add(table: Table, run_id: str, number: int, commit: bool = True, **changes: Any) -> None:
    """A run of one row, whose record says that it was a long one."""
    at = DAY + timedelta(days=number)
    known = {"run_id": run_id, "label_id": "l", "input": {"uri": "s3://b/photos"}, "images": 1_234_567, "model_id": MODEL}
    known |= {"planned_at": at, "starts": [START | {"started_at": at}]}
    table.begin_run(RunRecord.model_validate(known | changes))
    row = dict.fromkeys(FILE_SCHEMA.names) | {"image_id": 0, "uri": run_id, "status": "ok", "etag": "1"}
    folder = Path(table.run_folder(run_id))
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row], schema=FILE_SCHEMA), folder / "part-0.parquet")
    if commit:
        assert table.commit_run(run_id)


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Three committed runs, one of them with failures, and an interrupted one."""
    table = open_table(Storage(), str(tmp_path / "table"))
    add(table, "2026-01-01", 0, statuses={"ok": 1_230_000, "missing": 0, "decode_error": 4_567})
    add(table, "9f86d081884c7d65", 1, starts=[], statuses=None)
    add(table, "2026-01-03", 2, statuses={"ok": 1_234_567})
    add(table, "2026-01-04", 3, commit=False)
    return table


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, in this process."""
    monkeypatch.setattr("sys.argv", ["masklake", "runs", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


def test_the_list_fits_a_terminal(table: Table, command: Any) -> None:
    code, out, err = command(table.uri)
    assert (code, err) == (0, "")
    assert out == (
        "run               state        started (UTC)        images     time  images/s  GPU hours    cost\n"
        "2026-01-01        committed    2026-01-01 02:00  1,234,567  1:02:03     331.6       8.27  101.67\n"
        "    1,230,000 ok, 4,567 decode_error\n"
        "    maskrcnn_resnet50_fpn-0123456789ab by ann@gpu-host-17\n"
        "9f86d081884c7d65  committed    2026-01-02 02:00  1,234,567\n"
        "    maskrcnn_resnet50_fpn-0123456789ab\n"
        "2026-01-03        committed    2026-01-03 02:00  1,234,567  1:02:03     331.6       8.27  101.67\n"
        "    1,234,567 ok\n"
        "    maskrcnn_resnet50_fpn-0123456789ab by ann@gpu-host-17\n"
        "2026-01-04        interrupted  2026-01-04 02:00  1,234,567  1:02:03                 8.27  101.67\n"
        "    maskrcnn_resnet50_fpn-0123456789ab by ann@gpu-host-17\n"
    )
    assert max(map(len, out.splitlines())) <= 100


def test_who_writes_a_run_and_who_dropped_one_is_said(table: Table, command: Any) -> None:
    assert command("drop", table.uri, "2026-01-03")[0] == 0
    with Lease.acquire(table.storage, table.uri, "2026-01-04"):
        out = command(table.uri)[1]
    assert f"(process {os.getpid()}), for " in out
    assert "    being written by " in out
    assert "    dropped 20" in out
    lines = [line.split()[:2] for line in out.splitlines() if not line.startswith(" ")]
    assert lines[1:] == [
        ["2026-01-01", "committed"],
        ["9f86d081884c7d65", "committed"],
        ["2026-01-03", "dropped"],
        ["2026-01-04", "running"],
    ]


def test_a_long_name_moves_its_own_line_only() -> None:
    infos = [RunInfo.model_validate({"run_id": name, "state": "committed"}) for name in ("x" * 90, "short")]
    header, long, short = runs.describe(runs.RunsReport(table="t", runs=infos)).splitlines()
    assert header.index("state") == short.index("committed") == runs.RUN_WIDTH + 2
    assert long.split() == ["x" * 90, "committed"]


def test_scripts_get_everything(table: Table, command: Any) -> None:
    code, out, _ = command("--json", table.uri)
    listed = json.loads(out)
    assert code == 0
    assert listed["table"] == table.uri
    assert [run["run_id"] for run in listed["runs"]] == ["2026-01-01", "9f86d081884c7d65", "2026-01-03", "2026-01-04"]
    first = listed["runs"][0]
    assert (first["state"], first["statuses"]["decode_error"], first["input"]) == ("committed", 4567, "s3://b/photos")
    assert first["cost"] == pytest.approx(98.3 * 3723.4 / 3600)


def test_a_run_is_dropped(table: Table, command: Any) -> None:
    uri = table.uri
    assert command("drop", uri, "2026-01-03", "--dry-run")[1] == f"{uri}: would be dropped: run 2026-01-03\n"
    assert table.is_committed("2026-01-03")
    code, out, err = command("drop", uri, "2026-01-03")
    assert (code, out, err) == (0, f"{uri}: dropped: run 2026-01-03\n", "")
    code, out, err = command("drop", uri, "2026-01-03")
    assert (code, out) == (34, "")
    assert err == f"masklake: error: run 2026-01-03 was dropped from {uri} before; see masklake runs {uri}\n"


def test_later_runs_are_rolled_back(table: Table, command: Any) -> None:
    code, out, _ = command("rollback", table.uri, "2026-01-01", "--json")
    assert (code, json.loads(out)) == (
        0,
        {"table": table.uri, "dropped": ["9f86d081884c7d65", "2026-01-03"], "dry_run": False},
    )
    code, out, _ = command("rollback", table.uri, "2026-01-01")
    assert (code, out) == (0, f"{table.uri}: no run was committed after it; nothing to remove\n")


def test_files_are_vacuumed(table: Table, command: Any) -> None:
    command("rollback", table.uri, "2026-01-01")
    dropped = ("9f86d081884c7d65", "2026-01-03")
    size = sum(Path(table.run_folder(name), "part-0.parquet").stat().st_size for name in dropped)
    both = f"2 files ({size / 1024:.1f} KiB)"
    unfinished = "1 file of unfinished runs kept"
    assert command("vacuum", table.uri)[1] == (
        f"{table.uri}: 0 files (0 B) deleted, {both} younger than --older-than kept, {unfinished}\n"
    )
    would = command("vacuum", table.uri, "--older-than", "0", "--dry-run")[1]
    assert would == f"{table.uri}: {both} would be deleted, {unfinished}\n"
    assert command("vacuum", table.uri, "--older-than", "0")[1] == f"{table.uri}: {both} deleted, {unfinished}\n"
    assert sorted(path.parent.name for path in Path(table.uri).rglob("*.parquet")) == ["run=2026-01-01", "run=2026-01-04"]


def test_a_size_has_a_unit() -> None:
    assert [runs._size(1024**power * 3 // 2) for power in range(5)] == ["1 B", "1.5 KiB", "1.5 MiB", "1.5 GiB", "1.5 TiB"]


def test_a_table_in_use_is_left_alone(table: Table, command: Any) -> None:
    with Lease.acquire(table.storage, table.uri, "2026-01-04"):
        for arguments in (("drop", table.uri, "2026-01-03"), ("vacuum", table.uri)):
            code, out, err = command(*arguments)
            assert (code, out) == (31, "")
            assert err.startswith("masklake: error: run 2026-01-04 is being written by ")
            assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [("{}",), ("drop", "{}", "r"), ("rollback", "{}", "r"), ("vacuum", "{}")])
def test_what_is_no_table_is_said(tmp_path: Path, command: Any, arguments: tuple[str, ...]) -> None:
    place = tmp_path / "folder"
    named = [argument.format(place) for argument in arguments]
    code, _, err = command(*named)
    assert (code, err) == (30, f"masklake: error: {place}: the folder does not exist; check the path\n")
    place.mkdir()
    code, _, err = command(*named)
    assert (code, err) == (30, f"masklake: error: {place}: is a folder and no table; check the path\n")
    assert list(place.iterdir()) == []


def test_a_table_without_runs_is_an_empty_list(tmp_path: Path, command: Any) -> None:
    table = open_table(Storage(), str(tmp_path / "table"))
    table.initialise()
    assert command(table.uri) == (0, f"{table.uri}: no runs\n", "")


def test_python_gets_the_same_list(table: Table) -> None:
    listed = masklake.open_table(table.uri).runs()
    assert [(run.run_id, run.state) for run in listed][2:] == [
        ("2026-01-03", masklake.RunState.COMMITTED),
        ("2026-01-04", masklake.RunState.INTERRUPTED),
    ]
    assert isinstance(listed[0], masklake.RunInfo)
