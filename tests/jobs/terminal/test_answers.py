"""Answers in each format: nothing is cut except on a terminal, and every value can be read back."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from masklake.jobs.terminal.answers import (
    Format,
    format_of,
    plain,
    write_csv,
    write_file,
    write_json,
    write_json_lines,
    write_shown_table,
    write_text,
    write_whole_table,
)
from masklake.model.errors import ConfigError
from masklake.pipeline.errors import QueryError

MASK = b'PPYd04a\\1O2N",' * 40
WHEN = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
ANSWER = pa.table(
    {
        "uri": pa.array(["a,b.jpg", "", None]),
        "n": pa.array([2**53 + 1, -1, None], pa.int64()),
        "score": pa.array([0.1, math.nan, None], pa.float32()),
        "rle": pa.array([MASK, b"", None], pa.binary()),
        "at": pa.array([WHEN, WHEN, None], pa.timestamp("us", tz="UTC")),
        "points": pa.array([[{"x": 1.5}], [], None], pa.list_(pa.struct([("x", pa.float32())]))),
        "exact": pa.array([Decimal("0.10"), Decimal(3), None], pa.decimal128(10, 2)),
    }
)


def written(form: Format, table: pa.Table = ANSWER) -> str:
    out = io.StringIO()
    assert write_text(table.to_reader(), form, out) == table.num_rows
    return out.getvalue()


def test_csv_gives_every_value_back_and_tells_null_from_empty() -> None:
    first, second, third = written(Format.CSV).splitlines()[1:]
    assert next(csv.reader([first])) == [
        "a,b.jpg",
        "9007199254740993",
        "0.1",
        MASK.decode(),
        "2026-03-01T12:30:00+00:00",
        '[{"x": 1.5}]',
        "0.10",
    ]
    assert second == '"",-1,nan,"",2026-03-01T12:30:00+00:00,[],3.00'
    assert third == ",,,,,,"


def test_tsv_is_csv_with_tabs() -> None:
    assert list(csv.reader(written(Format.TSV).splitlines(), delimiter="\t")) == list(
        csv.reader(written(Format.CSV).splitlines())
    )


def test_a_null_that_is_the_only_column_is_no_empty_line() -> None:
    assert written(Format.CSV, pa.table({"n": [1, None]})) == 'n\r\n1\r\n""\r\n'


@pytest.mark.parametrize("form", [Format.JSON, Format.JSONL])
def test_json_is_valid_and_exact(form: Format) -> None:
    text = written(form)
    rows = json.loads(text) if form is Format.JSON else [json.loads(line) for line in text.splitlines()]
    assert rows[0]["n"] == 2**53 + 1
    assert rows[0]["rle"].encode() == MASK
    assert rows[0]["points"] == [{"x": 1.5}]
    assert rows[1]["score"] is None
    assert rows[1]["uri"] == ""
    assert set(rows[2].values()) == {None}


def test_parquet_keeps_the_types_and_tells_equal_names_apart(tmp_path: Path) -> None:
    assert write_file(ANSWER.to_reader(), Format.PARQUET, tmp_path / "a") == 3
    assert pq.read_table(tmp_path / "a").drop(["score"]).equals(ANSWER.drop(["score"]))
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["n", "n"])
    write_file(twice.to_reader(), Format.PARQUET, tmp_path / "b")
    assert pq.read_table(tmp_path / "b").to_pylist() == [{"n": 1, "n_1": 2}]


def test_parquet_says_what_it_has_no_type_for(tmp_path: Path) -> None:
    months = pa.table({"step": pa.array([(1, 2, 3)], pa.month_day_nano_interval())})
    with pytest.raises(QueryError, match="::VARCHAR"):
        write_file(months.to_reader(), Format.PARQUET, tmp_path / "a")


def test_a_whole_table_has_every_row_and_every_character() -> None:
    table = pa.table({"number": range(250), "text": ["x" * 500] * 250})
    lines = written(Format.TABLE, table).splitlines()
    assert len(lines) == 253
    assert lines[2] == "     0  " + "x" * 500
    assert lines[-1] == "(250 rows)"


def test_control_characters_do_not_reach_a_terminal() -> None:
    out = io.StringIO()
    write_whole_table(pa.table({"t": ["a\x1b[2J\nü"]}).to_reader(), out)
    assert out.getvalue().splitlines()[2] == "a\\x1b[2J\\nü"


@pytest.mark.parametrize("write", [write_csv, write_json, write_json_lines])
def test_rows_are_written_as_they_come(write: object) -> None:
    out = io.StringIO()

    class Slow:
        schema = pa.schema([("n", pa.int64())])

        def __iter__(self) -> Iterator[pa.RecordBatch]:
            for number in range(3):
                assert out.getvalue().count("7") == number, "the batch before is written by now"
                yield pa.record_batch([[7]], schema=self.schema)

    assert write(Slow(), out) == 3  # type: ignore[operator]


def test_a_table_on_a_terminal_is_cut_and_says_so() -> None:
    out = io.StringIO()
    table = pa.table({"number": range(250), "text": ["x" * 500] * 250})
    assert write_shown_table(table.to_reader(), out) == 250
    lines = out.getvalue().splitlines()
    assert len(lines) == 103
    assert max(map(len, lines[:-1])) < 120
    assert lines[-1] == "(250 rows, 100 shown; --output FILE.csv writes all)"


def test_text_can_be_compressed(tmp_path: Path) -> None:
    write_file(ANSWER.to_reader(), Format.CSV, tmp_path / "a", compressed=True)
    assert gzip.decompress((tmp_path / "a").read_bytes()).decode() == written(Format.CSV)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.csv", Format.CSV),
        ("a.TSV", Format.TSV),
        ("s3://b/x.json", Format.JSON),
        ("a.ndjson", Format.JSONL),
        ("a.jsonl.gz", Format.JSONL),
        ("a.parquet", Format.PARQUET),
        ("a.txt", Format.TABLE),
    ],
)
def test_the_suffix_says_the_format(name: str, form: Format) -> None:
    assert format_of(name, None) is form
    assert format_of(name, Format.JSON) is Format.JSON, "what is said wins"


@pytest.mark.parametrize("name", ["a", "a.xlsx", "a.gz", "csv", "a.parquet.gz", "a.csv/b"])
def test_a_name_that_says_no_format_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"\.csv|without \.gz"):
        format_of(name, None)


def test_values_are_plain() -> None:
    point = pa.struct([("x", pa.float32()), ("raw", pa.binary())])
    assert plain([{"x": 0.10000000149011612, "raw": b"PP`m1"}], pa.list_(point)) == [{"x": 0.1, "raw": "PP`m1"}]
    assert plain(math.nan, pa.float64()) is None
    assert plain(b"\xff", pa.binary()) == "\\xff"
    assert plain([("a", 1)], pa.map_(pa.string(), pa.int64())) == [["a", 1]]


@pytest.mark.parametrize(("name", "form"), [(".csv", Format.CSV), ("q/.JSON.gz", Format.JSON), ("a.b.parquet", Format.PARQUET)])
def test_a_name_that_is_only_a_suffix_says_its_format(name: str, form: Format) -> None:
    assert format_of(name, None) == form
