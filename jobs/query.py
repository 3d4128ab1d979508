"""`masklake query`: an answer as a table for people, CSV for spreadsheets, JSON for programs."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa

from pipeline.errors import QueryError
from pipeline.query import stream
from pipeline.storage import Storage

SHOWN_ROWS = 100
"""Rows of the `table` format; CSV and JSON give all."""

SHOWN_CHARACTERS = 60  # of one cell; masks and long paths are cut


class Format(StrEnum):
    """How an answer is written."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


def run(storage: Storage, table_uri: str, sql: str, form: Format, output: str | None = None) -> int:
    """Write the answer to stdout, or whole to the file or object `output`; the number of rows. QueryError, TableError."""
    with stream(storage, table_uri, sql) as answer:
        if output is None:
            return write(answer, form, sys.stdout)
        with tempfile.TemporaryDirectory(prefix="masklake-query-") as folder:
            path = Path(folder, "answer")
            with path.open("w", encoding="utf-8", newline="") as file:
                count = write(answer, form, file)
            storage.upload(path, output)
            return count


def write(answer: pa.RecordBatchReader, form: Format, out: TextIO) -> int:
    """Write the answer, batch by batch but for `table`; the number of rows written."""
    writers: dict[Format, Callable[[pa.RecordBatchReader, TextIO], int]] = {
        Format.TABLE: write_table,
        Format.CSV: write_csv,
        Format.JSON: write_json,
    }
    return writers[form](answer, out)


def rows(answer: pa.RecordBatchReader) -> Iterator[list[Any]]:
    """The answer's rows in plain values: text, numbers, lists and objects, as JSON has them."""
    types = [field.type for field in answer.schema]
    for batch in answer:
        columns = [
            [plain(value, kind) for value in _values(column, name)]
            for column, kind, name in zip(batch.columns, types, answer.schema.names, strict=True)
        ]
        yield from (list(row) for row in zip(*columns, strict=True))


def _values(column: pa.Array, name: str) -> list[Any]:
    try:
        return list(column.to_pylist())
    except (OverflowError, ValueError) as error:  # DuckDB's dates reach 294,247 and infinity, Python's end with 9999
        raise QueryError(f"column {name!r}: holds a date or time beyond the year 9999; select {name}::VARCHAR") from error


def plain(value: Any, kind: pa.DataType) -> Any:
    """One value as JSON has it: float32 in its shortest form, NaN as null, bytes as text (COCO counts are ASCII), ISO times."""
    if value is None:
        return None
    if pa.types.is_floating(kind):
        number = float(str(np.float32(value))) if pa.types.is_float32(kind) else float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, (datetime, date)):
        return value.isoformat()
    return _plain_nested(value, kind)


def _plain_nested(value: Any, kind: pa.DataType) -> Any:
    if pa.types.is_struct(kind):
        return {field.name: plain(value[field.name], field.type) for field in kind}
    if pa.types.is_map(kind):
        return [[plain(key, kind.key_type), plain(item, kind.item_type)] for key, item in value]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [plain(item, kind.value_type) for item in value]
    return value if isinstance(value, (str, int, bool)) else str(value)


def write_json(answer: pa.RecordBatchReader, out: TextIO) -> int:
    """One JSON array of objects, a row a line."""
    names = _distinct(answer.schema.names)
    count = 0
    for row in rows(answer):
        out.write("[\n " if not count else ",\n ")
        out.write(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False))
        count += 1
    out.write("\n]\n" if count else "[]\n")
    return count


def _distinct(names: list[str]) -> list[str]:
    """The names with a number behind each repetition (`n`, `n_1`): a JSON object would keep only the last of equals."""
    given: list[str] = []
    for name in names:
        number, chosen = 0, name
        while chosen in given or (number and chosen in names):
            number += 1
            chosen = f"{name}_{number}"
        given.append(chosen)
    return given


def write_csv(answer: pa.RecordBatchReader, out: TextIO) -> int:
    """RFC 4180 with a header; null is empty, nested values are JSON."""
    writer = csv.writer(out)
    writer.writerow(answer.schema.names)
    count = 0
    for row in rows(answer):
        writer.writerow([_csv_cell(value) for value in row])
        count += 1
    return count


def _csv_cell(value: Any) -> Any:
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else value


def write_table(answer: pa.RecordBatchReader, out: TextIO) -> int:
    """Aligned columns for a terminal: the first SHOWN_ROWS rows, long cells cut, numbers to the right."""
    found = rows(answer)
    shown = [[_cell(value) for value in row] for row in islice(found, SHOWN_ROWS)]
    more = sum(1 for _ in found)
    names = answer.schema.names
    to_right = [_is_number(field.type) for field in answer.schema]
    limit = max(12, shutil.get_terminal_size((160, 50)).columns // max(1, min(len(names), 3)))
    widths = [min(limit, max([len(name), *(len(row[index]) for row in shown)])) for index, name in enumerate(names)]
    for line in [names, ["-" * width for width in widths], *shown]:
        cells = [_fit(cell, width, right) for cell, width, right in zip(line, widths, to_right, strict=True)]
        out.write("  ".join(cells).rstrip() + "\n")
    total = len(shown) + more
    cut = f", {len(shown)} shown; --format csv gives all" if more else ""
    out.write(f"({total} {'row' if total == 1 else 'rows'}{cut})\n")
    return total


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)
    return _cut(text.replace("\n", " "), SHOWN_CHARACTERS)


def _cut(text: str, width: int) -> str:
    """The text without its middle: what tells two paths apart is their end."""
    if len(text) <= width:
        return text
    tail = (width - 1) * 2 // 3
    return text[: width - 1 - tail] + "…" + text[len(text) - tail :]


def _fit(text: str, width: int, right: bool) -> str:
    cut = _cut(text, width)
    return cut.rjust(width) if right else cut.ljust(width)
