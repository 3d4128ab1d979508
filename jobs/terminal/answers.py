"""Writes the result of a query in each format: a table for people; CSV, TSV, JSON, JSON lines and Parquet for programs.

Only a table on a terminal is truncated; files and pipes receive every row and every cell in full. No format needs the whole
result in memory. docs/query.md describes how values are written.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from masklake.model.errors import ConfigError
from masklake.model.wording import counted, printable
from masklake.pipeline.errors import QueryError

SHOWN_ROWS = 100
"""Maximum number of rows of a table on a terminal."""

SHOWN_CHARACTERS = 60
"""Maximum width of a cell on a terminal."""


class Batches(Protocol):
    """A source of record batches: `pipeline.table.query.Answer`, or pyarrow's reader."""

    @property
    def schema(self) -> pa.Schema:
        """The schema of every batch."""

    def __iter__(self) -> Iterator[pa.RecordBatch]: ...


class Format(StrEnum):
    """An output format."""

    TABLE = "table"
    CSV = "csv"
    TSV = "tsv"
    JSON = "json"
    JSONL = "jsonl"
    PARQUET = "parquet"


SUFFIXES: Mapping[str, Format] = {
    ".csv": Format.CSV,
    ".tsv": Format.TSV,
    ".json": Format.JSON,
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    ".parquet": Format.PARQUET,
    ".txt": Format.TABLE,
}
"""Formats by suffix of the output, in any case; `.gz` after that of a text format compresses it."""

GZIP = ".gz"


def format_of(output: str, given: Format | None) -> Format:
    """Returns the format of a file: `given`, else that of the suffix. Raises ConfigError if neither is known."""
    name = output.lower()
    text = name.removesuffix(GZIP)
    form = given or next((form for suffix, form in SUFFIXES.items() if text.endswith(suffix)), None)
    if form is None:
        raise ConfigError(
            f"cannot tell the format of {output} from its name: use the suffix {', '.join(SUFFIXES)} "
            f"(for text also with {GZIP} appended), or give --format"
        )
    if form is Format.PARQUET and name.endswith(GZIP):
        raise ConfigError(f"{output}: Parquet files are already compressed; name the file without {GZIP}")
    return form


def write_file(answer: Batches, form: Format, path: Path, compressed: bool = False) -> int:
    """Writes the whole result to a local file; returns the number of rows. compressed: gzip, for text formats."""
    if form is Format.PARQUET:
        return _write_parquet(answer, path)
    with (
        gzip.open(path, "wt", encoding="utf-8", newline="")
        if compressed
        else path.open("w", encoding="utf-8", newline="") as file
    ):
        return write_text(answer, form, file)


def write_text(answer: Batches, form: Format, out: TextIO) -> int:
    """Writes the whole result as text; returns the number of rows. form: any but Parquet."""
    writers: dict[Format, Callable[[Batches, TextIO], int]] = {
        Format.TABLE: write_whole_table,
        Format.CSV: write_csv,
        Format.TSV: write_tsv,
        Format.JSON: write_json,
        Format.JSONL: write_json_lines,
    }
    return writers[form](answer, out)


# -- values ------------------------------------------------------------------------------------------------------------


def rows(answer: Batches) -> Iterator[list[Any]]:
    """Yields the rows of the result as Python values."""
    for batch in answer:
        columns = [_values(column, name) for column, name in zip(batch.columns, answer.schema.names, strict=True)]
        yield from (list(row) for row in zip(*columns, strict=True))


def plain_rows(answer: Batches) -> Iterator[list[Any]]:
    """Yields the rows of the result in plain values: text, numbers, lists and objects, as in JSON."""
    types = [field.type for field in answer.schema]
    for row in rows(answer):
        yield [plain(value, kind) for value, kind in zip(row, types, strict=True)]


def _values(column: pa.Array, name: str) -> list[Any]:
    try:
        return list(column.to_pylist())
    except (OverflowError, ValueError) as error:  # DuckDB's dates reach 294,247 and infinity, Python's end with 9999
        raise QueryError(f"column {name!r}: holds a date or time beyond the year 9999; select {name}::VARCHAR") from error


def plain(value: Any, kind: pa.DataType) -> Any:
    """Returns a value as in JSON: float32 in its shortest form, NaN as null, bytes as text (COCO counts are ASCII), ISO
    times.
    """
    if value is None:
        return None
    if pa.types.is_floating(kind):
        number = _shortest(value, kind)
        return number if math.isfinite(number) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, (datetime, date)):
        return value.isoformat()
    return _plain_nested(value, kind)


def _shortest(value: float, kind: pa.DataType) -> float:
    """Returns a float32's value in its shortest form: 0.1, not 0.10000000149."""
    return float(str(np.float32(value))) if pa.types.is_float32(kind) else float(value)


def _plain_nested(value: Any, kind: pa.DataType) -> Any:
    if pa.types.is_struct(kind):
        return {field.name: plain(value[field.name], field.type) for field in kind}
    if pa.types.is_map(kind):
        return [[plain(key, kind.key_type), plain(item, kind.item_type)] for key, item in value]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [plain(item, kind.value_type) for item in value]
    return value if isinstance(value, (str, int, bool)) else str(value)


def distinct(names: list[str]) -> list[str]:
    """Returns the names with a number after each repetition (`n`, `n_1`): a JSON object would keep only the last of equal
    names.
    """
    given: list[str] = []
    for name in names:
        number, chosen = 0, name
        while chosen in given or (number and chosen in names):
            number += 1
            chosen = f"{name}_{number}"
        given.append(chosen)
    return given


# -- formats for programs ----------------------------------------------------------------------------------------------


def write_json(answer: Batches, out: TextIO) -> int:
    """Writes one JSON array of objects, one row per line."""
    count = 0
    for line in _objects(answer):
        out.write(("[\n " if not count else ",\n ") + line)
        count += 1
    out.write("\n]\n" if count else "[]\n")
    return count


def write_json_lines(answer: Batches, out: TextIO) -> int:
    """Writes one JSON object per line."""
    count = 0
    for line in _objects(answer):
        out.write(line + "\n")
        count += 1
    return count


def _objects(answer: Batches) -> Iterator[str]:
    names = distinct(answer.schema.names)
    for row in plain_rows(answer):
        yield json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, allow_nan=False)


def write_csv(answer: Batches, out: TextIO) -> int:
    """Writes RFC 4180 with a header: null is empty, the empty text is `""`, nested values are JSON, NaN is `nan`."""
    return _write_separated(answer, out, ",", "\r\n")


def write_tsv(answer: Batches, out: TextIO) -> int:
    """Writes tab-separated values, quoted as in CSV."""
    return _write_separated(answer, out, "\t", "\n")


def _write_separated(answer: Batches, out: TextIO, separator: str, end: str) -> int:
    types = [field.type for field in answer.schema]
    alone = '""' if len(types) == 1 else ""  # a row that is an empty line would be skipped by most readers
    out.write(separator.join(_quoted(name, separator) for name in answer.schema.names) + end)
    count = 0
    for row in rows(answer):
        cells = [_text_cell(value, kind) for value, kind in zip(row, types, strict=True)]
        out.write(separator.join(alone if cell is None else _quoted(cell, separator) for cell in cells) + end)
        count += 1
    return count


def _text_cell(value: Any, kind: pa.DataType) -> str | None:
    if value is None:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # nan, inf, -inf: every reader of numbers knows them, and null is something else
    if isinstance(value, Decimal):
        return str(value)
    value = plain(value, kind)
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(cell: str, separator: str) -> str:
    if cell and not any(mark in cell for mark in (separator, '"', "\n", "\r")):
        return cell
    return '"' + cell.replace('"', '""') + '"'


def _write_parquet(answer: Batches, path: Path) -> int:
    """Writes Parquet with the result's own types; columns of the same name get numbers, as in JSON."""
    schema = pa.schema(
        [field.with_name(name) for field, name in zip(answer.schema, distinct(answer.schema.names), strict=True)]
    )
    count = 0
    try:
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in answer:
                writer.write_batch(batch.rename_columns(schema.names))
                count += batch.num_rows
    except pa.ArrowNotImplementedError as error:  # unions
        raise QueryError(f"Parquet has no such type ({error}); select the column ::VARCHAR, or write CSV or JSON") from error
    return count


# -- tables for people -------------------------------------------------------------------------------------------------


def write_shown_table(answer: Batches, out: TextIO) -> int:
    """Writes aligned columns for a terminal: the first SHOWN_ROWS rows, with long cells cut. Returns the number of all rows."""
    found = plain_rows(answer)
    shown = [[_shown_cell(value) for value in row] for row in islice(found, SHOWN_ROWS)]
    more = sum(1 for _ in found)
    names = answer.schema.names
    limit = max(12, shutil.get_terminal_size((160, 50)).columns // max(1, min(len(names), 3)))
    widths = [min(limit, max([len(name), *(len(row[index]) for row in shown)])) for index, name in enumerate(names)]
    _write_lines(answer.schema, widths, shown, out)
    total = len(shown) + more
    cut = f", {len(shown)} shown; --output FILE.csv writes all" if more else ""
    out.write(f"({counted(total, 'row')}{cut})\n")
    return total


def write_whole_table(answer: Batches, out: TextIO) -> int:
    """Writes aligned columns with every row and cell in full; returns the number of rows. The rows are kept in a temporary file
    until the widths of the columns are known.
    """
    widths = [len(name) for name in answer.schema.names]
    count = 0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as waiting:
        for row in plain_rows(answer):
            cells = [_cell(value) for value in row]
            widths = [max(width, len(cell)) for width, cell in zip(widths, cells, strict=True)]
            waiting.write(json.dumps(cells) + "\n")
            count += 1
        waiting.seek(0)
        _write_lines(answer.schema, widths, map(json.loads, waiting), out)
    out.write(f"({counted(count, 'row')})\n")
    return count


def _write_lines(schema: pa.Schema, widths: list[int], cells: Any, out: TextIO) -> None:
    """Writes names, a rule and the rows. Numbers are aligned to the right; a cell longer than its column loses its middle."""
    to_right = [_is_number(field.type) for field in schema]
    for lines in ([schema.names, ["-" * width for width in widths]], cells):
        for line in lines:
            fitted = [_fit(cell, width, right) for cell, width, right in zip(line, widths, to_right, strict=True)]
            out.write("  ".join(fitted).rstrip() + "\n")


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _shown_cell(value: Any) -> str:
    return _cut(f"{value:.6g}" if isinstance(value, float) else _cell(value), SHOWN_CHARACTERS)


def _cell(value: Any) -> str:
    """Returns a value on one line, as `printable` does."""
    if value is None:
        return ""
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)
    return printable(text)


def _cut(text: str, width: int) -> str:
    """Returns the text, without its middle if it is longer than `width`: paths mostly differ at their ends."""
    if len(text) <= width:
        return text
    tail = (width - 1) * 2 // 3
    return text[: width - 1 - tail] + "…" + text[len(text) - tail :]


def _fit(text: str, width: int, right: bool) -> str:
    cut = _cut(text, width)
    return cut.rjust(width) if right else cut.ljust(width)
