"""`masklake query`, run as a user runs it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from masklake.jobs.query import show as show_answer
from masklake.jobs.terminal.answers import Format
from masklake.model.errors import ConfigError
from masklake.pipeline.errors import EmptyInputError, InputNotFoundError, QueryError, TableError
from masklake.pipeline.storage.storage import Storage
from tests.jobs.labelled import label


def test_three_ways_to_read_an_answer(place: str, masklake: Any) -> None:
    table = label(place, ["x.jpg", "y ü.jpg"])
    sql = "SELECT uri, category, score, x1, struct_pack(a := area) AS more FROM detections ORDER BY uri"
    code, out, _ = masklake("query", table, sql, "--format", "json")
    assert code == 0
    rows = json.loads(out)
    assert rows[1] == {"uri": f"{place}/y ü.jpg", "category": "cat", "score": 0.9, "x1": 10.0, "more": {"a": None}}
    code, out, _ = masklake("query", table, sql, "--format", "csv")
    assert code == 0
    assert [row["uri"] for row in csv.DictReader(io.StringIO(out))] == [row["uri"] for row in rows]
    code, out, _ = masklake("query", table, sql)
    assert code == 0
    assert out.splitlines()[0].split() == ["uri", "category", "score", "x1", "more"]
    assert out.endswith("(2 rows)\n")


def test_an_answer_can_go_to_a_file(place: str, masklake: Any) -> None:
    table = label(place, ["x.jpg"])
    code, out, _ = masklake("query", table, "SELECT 1 AS one", "--format", "csv", "--output", f"{place}/answer.csv")
    assert (code, out) == (0, f"{place}/answer.csv: 1 row\n")
    assert Storage().read_bytes(f"{place}/answer.csv") == b"one\r\n1\r\n"


def test_no_rows_are_valid_json(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["x.jpg"])
    assert json.loads(masklake("query", table, "SELECT 1 WHERE false", "--format", "json")[1]) == []
    assert masklake("query", table, "SELECT 1 AS one WHERE false")[1].endswith("(0 rows)\n")


def test_errors_have_their_exit_codes(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["x.jpg"])
    assert masklake("query", table, "SELECT nothing")[0] == QueryError.exit_code
    code, out, err = masklake("query", str(tmp_path / "none"), "SELECT 1")
    assert (code, out) == (TableError.exit_code, "")
    assert err.startswith("masklake: error: ")
    assert masklake("query", str(tmp_path / "x.jpg"), "SELECT 1")[0] == TableError.exit_code
    assert EmptyInputError.exit_code != InputNotFoundError.exit_code


def test_columns_of_one_name_stay_apart_in_json(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["a.jpg"])
    _, out, _ = masklake("query", table, "SELECT 1 AS n, 2 AS n, 3 AS n_1", "--format", "json")
    assert json.loads(out) == [{"n": 1, "n_2": 2, "n_1": 3}]


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_dates_that_python_has_not_are_refused_with_the_way_out(tmp_path: Path, form: str) -> None:
    table = label(str(tmp_path), ["a.jpg"])
    with pytest.raises(QueryError, match=r"column 'd'.*select d::VARCHAR"):
        show_answer(Storage(), table, "SELECT DATE '12000-01-01' AS d", Format(form))
    assert show_answer(Storage(), table, "SELECT (DATE '12000-01-01')::VARCHAR AS d", Format(form)) == 1


def test_a_file_holds_every_row_in_full_in_the_format_of_its_suffix(place: str, masklake: Any) -> None:
    table = label(place, ["x.jpg"])
    sql = "SELECT range AS n, repeat('m', 200) AS text FROM range(245)"
    for suffix in ("csv", "csv.gz", "tsv", "json", "jsonl", "parquet", "txt"):
        code, out, _ = masklake("query", table, sql, "-o", f"{place}/all.{suffix}")
        assert (code, out) == (0, f"{place}/all.{suffix}: 245 rows\n")
    lines = Storage().read_bytes(f"{place}/all.csv").decode().splitlines()
    assert (len(lines), lines[245]) == (246, "244," + "m" * 200)
    assert gzip.decompress(Storage().read_bytes(f"{place}/all.csv.gz")).decode().splitlines() == lines
    assert len(json.loads(Storage().read_bytes(f"{place}/all.json"))) == 245
    assert pq.read_table(pa.BufferReader(Storage().read_bytes(f"{place}/all.parquet"))).num_rows == 245
    code, out, _ = masklake("query", table, sql, "-o", f"{place}/other", "--format", "json", "--json")
    assert (code, json.loads(out)) == (0, {"output": f"{place}/other", "format": "json", "rows": 245})


def test_a_pipe_gets_the_whole_table(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["x.jpg"])
    _, out, _ = masklake("query", table, "SELECT range AS n, repeat('m', 200) AS text FROM range(245)")
    assert len(out.splitlines()) == 248
    assert "m" * 200 in out
    assert "…" not in out


def test_sql_comes_from_stdin(tmp_path: Path, masklake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = label(str(tmp_path), ["x.jpg"])
    monkeypatch.setattr("sys.stdin", io.StringIO("SELECT 1 AS one\n"))
    assert json.loads(masklake("query", table, "-", "--json")[1]) == [{"one": 1}]
    assert masklake("query", table, "SELECT 1", "--json", "--format", "csv")[0] == ConfigError.exit_code
    assert masklake("query", table, "SELECT 1", "--format", "parquet")[0] == ConfigError.exit_code


@pytest.mark.parametrize(
    ("output", "code", "said"),
    [
        ("{0}/nowhere/a.csv", 20, "there is no folder"),
        ("{0}", 12, "is a folder"),
        ("{0}/new/", 12, "is a folder"),
        ("{0}/table/a.csv", 12, "in the table's own folder"),
        ("{0}/link.csv", 12, "in the table's own folder"),
        ("{0}/a.xlsx", 12, ".parquet"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_the_query_runs(
    tmp_path: Path, masklake: Any, output: str, code: int, said: str
) -> None:
    (tmp_path / "link.csv").symlink_to("table/a.csv")
    found, out, err = masklake("query", label(str(tmp_path), ["x.jpg"]), "SELECT bad", "-o", output.format(tmp_path))
    assert (found, out) == (code, "")
    assert said in err


@pytest.mark.parametrize("output", ["-", "/dev/stdout"])
def test_an_answer_to_stdout_is_followed_by_no_report(tmp_path: Path, masklake: Any, output: str) -> None:
    table = label(str(tmp_path), ["x.jpg"])
    assert masklake("query", table, "SELECT 1 AS n", "-o", output, "--format", "csv")[:2] == (0, "n\r\n1\r\n")


def test_an_answer_that_fails_leaves_the_file_as_it_was(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["x.jpg"])
    (tmp_path / "a.csv").write_text("before")
    sql = "SELECT CASE WHEN range > 40000 THEN error('late') ELSE range END AS n FROM range(50000)"
    code, out, err = masklake("query", table, sql, "-o", str(tmp_path / "a.csv"))
    assert (code, out) == (QueryError.exit_code, "")
    assert "late" in err
    assert (tmp_path / "a.csv").read_text() == "before"
    assert [path.name for path in tmp_path.glob("*.csv")] == ["a.csv"]


@pytest.mark.slow
def test_who_stops_reading_is_no_error(tmp_path: Path, start: Any) -> None:
    command = start("query", label(str(tmp_path), ["x.jpg"]), "SELECT * FROM range(2000000)", "--format", "csv")
    assert command.process.stdout.readline() == "range\n"
    command.process.stdout.close()
    assert (command.process.stderr.read(), command.process.wait(60)) == ("", 141)


def test_sql_that_begins_with_a_comment_is_told_from_an_option(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["a.jpg"])
    code, _, err = masklake("query", table, "-- x")
    assert (code, "SQL is one argument" in err) == (2, True)
    code, _, err = masklake("query", table, "--formt")
    assert (code, "SQL is one argument" in err) == (2, False)
