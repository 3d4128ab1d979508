"""Reads lists of images: Parquet, CSV, text, JSON lines and JSON arrays, compressed or not.

A list gives names and optionally the version (`etag`) and size (`bytes`) of each; `pipeline.inputs.listing` interprets the
names. Text is UTF-8 or, with a byte order mark, UTF-16 or UTF-32.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import IO, Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from masklake.model.errors import ConfigError, MaskLakeError
from masklake.model.wording import counted
from masklake.pipeline.errors import StorageError
from masklake.pipeline.inputs.list_header import columns_sign, images_columns, is_headless
from masklake.pipeline.storage.errors import reason_of, translated
from masklake.pipeline.storage.left_out import LeftOut, Reason
from masklake.pipeline.storage.objects import LISTING_BATCH, unquoted
from masklake.pipeline.storage.storage import Storage

_KINDS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".txt": "text",
    ".lst": "text",
    ".list": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
}
_COMPRESSED = (".gz", ".bz2", ".xz")
_OPENERS: tuple[tuple[bytes, Callable[[Any], Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ", lzma.open),
)
_WIDE = (
    (b"\xff\xfe\0\0", "utf-32"),  # before UTF-16, whose mark it begins with
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_HEAD_BYTES = 1 << 16
_COCO = re.compile(r'"(images|annotations|categories|licenses|info)"\s*:')
_FIRST_LINE = " (the list's first line; if that is an image's already, write a line of columns' names above it)"
_AS_COLUMNS = {
    "\t": "name the file .tsv, and choose a column with --column",
    ",": "name the file .csv, and choose a column with --column",
    ";": "name the file .csv, and choose a column with --column",
    " ": "keep the names alone, or separate the columns by tabs and name the file .tsv",
}
_FIELD_LIMIT = 1 << 28  # characters; csv's own limit of 128 Ki is less than the masks that some columns hold


@dataclass(frozen=True)
class Named:
    """A row of a list. etag: without quotes. etag and bytes: None if the list does not contain them."""

    name: str
    etag: str | None = None
    bytes: int | None = None


def list_kind(uri: str) -> str | None:
    """Returns `parquet`, `csv`, `text` or `json` by the suffix of the name; None if it is not a list."""
    return _KINDS.get(_suffix(uri))


def _suffix(uri: str) -> str:
    """Returns the suffix in lower case, without that of a compression."""
    base, end = os.path.splitext(uri.lower())
    return os.path.splitext(base)[1] if end in _COMPRESSED else end


def read_list(storage: Storage, uri: str, column: str | None, left_out: LeftOut) -> Iterator[list[Named]]:
    """Yields the rows of a list, LISTING_BATCH at a time, without comments and rows that name nothing.

    column: the column with the image names; default `uri`, or the only one. Raises ConfigError if there is no such column, or
    the file is not a list of its kind.
    """
    kind = list_kind(uri)
    readers = {"parquet": _read_parquet, "csv": _read_csv, "text": _read_text, "json": _read_json}
    if kind is None:
        raise ConfigError(f"{uri}: is not a list of a known kind ({', '.join(_KINDS)})")
    with _list_errors(uri, kind):
        rows = (row for row in readers[kind](storage, uri, column, left_out) if _is_named(row, uri, left_out))
        while batch := list(islice(rows, LISTING_BATCH)):
            yield batch


def _is_named(row: Named, uri: str, left_out: LeftOut) -> bool:
    if row.name.strip():
        return True
    left_out.add(Reason.UNNAMED, "")
    return False


@contextmanager
def _list_errors(uri: str, kind: str) -> Iterator[None]:
    said = f"{uri}: cannot be read as a {kind} list"
    try:
        with translated(uri):
            yield
    except (pa.ArrowException, csv.Error, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ConfigError(f"{said} ({reason_of(error)})") from error
    except MaskLakeError as error:
        foreign = (pa.ArrowInvalid, UnicodeDecodeError, gzip.BadGzipFile)
        if isinstance(error, StorageError) and isinstance(error.__cause__, foreign):
            raise ConfigError(f"{said} ({reason_of(error.__cause__)})") from error
        raise


# -- columns -----------------------------------------------------------------------------------------------------------


def _column(uri: str, wanted: str | None, names: Sequence[str], note: str = "") -> str:
    """Returns the column that names the images. Raises ConfigError if it is not clear. note: end of that message."""
    if not names:
        raise ConfigError(f"{uri}: has no columns, so it names no images")
    usual = [name for name in names if name.strip().casefold() == "uri"]
    chosen = wanted or (usual[0] if usual else names[0] if len(names) == 1 else None)
    if chosen is None or chosen not in names:
        said = f"no column {chosen!r}" if chosen else "several columns, none of them `uri`"
        raise ConfigError(f"{uri}: {said}; name one with --column: {', '.join(names)}{note}")
    if names.count(chosen) > 1:
        raise ConfigError(f"{uri}: has {names.count(chosen)} columns named {chosen!r}; rename all but one")
    return chosen


def _etag(value: object) -> str | None:
    """Returns a version as in tables. A value of another kind is harmless: it never equals a version in a table."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) if value is not None else ""
    return unquoted(text.strip()) or None


def _size(value: object) -> int | None:
    """Returns a valid size in bytes, else None."""
    try:
        size = int(value)  # type: ignore[call-overload]  # what no int can be made of is caught below
    except (TypeError, ValueError, OverflowError):
        return None
    return size if 0 <= size < 2**63 else None


# -- Parquet -----------------------------------------------------------------------------------------------------------


def _read_parquet(storage: Storage, uri: str, wanted: str | None, left_out: LeftOut) -> Iterator[Named]:
    with storage.open_input(uri) as source, pq.ParquetFile(source) as file:
        names = file.schema_arrow.names
        column = _column(uri, wanted, names)
        kind = file.schema_arrow.field(column).type
        if not _is_text(kind.value_type if pa.types.is_dictionary(kind) else kind):
            raise ConfigError(f"{uri}: column {column!r} holds {kind} and not names; choose another with --column")
        more = [name for name in ("etag", "bytes") if names.count(name) == 1 and name != column]
        for batch in file.iter_batches(LISTING_BATCH, columns=[column, *more]):
            columns = {name: batch[name].to_pylist() for name in more}
            nothing = [None] * batch.num_rows
            etags, sizes = columns.get("etag", nothing), columns.get("bytes", nothing)
            for name, etag, size in zip(batch[column].to_pylist(), etags, sizes, strict=True):
                yield Named(name or "", _etag(etag), _size(size))


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_null(kind)


# -- text --------------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(storage: Storage, uri: str) -> Iterator[tuple[IO[bytes], bytes]]:
    """Context manager for the list's decompressed bytes, and the first of them."""
    with storage.open_input(uri) as source:
        magic = source.read(8)
        source.seek(0)
        opener = next((opener for start, opener in _OPENERS if magic.startswith(start)), None)
        with opener(source) if opener else source as stream:
            head = stream.read(_HEAD_BYTES)
            stream.seek(0)
            yield stream, head


@contextmanager
def _lines(storage: Storage, uri: str, newline: str) -> Iterator[tuple[io.TextIOWrapper, str]]:
    """Context manager for the list as text, and its beginning. Bytes that are not UTF-8 become lone surrogates, as in Python's
    file names.
    """
    with _opened(storage, uri) as (stream, head):
        wide = next((encoding for mark, encoding in _WIDE if head.startswith(mark)), None)
        if b"\0" in head and not wide:
            raise ConfigError(f"{uri}: holds zero bytes, so it is not text; save it as UTF-8")
        encoding, errors = (wide, "strict") if wide else ("utf-8-sig", "surrogateescape")
        if newline == "\n" and not wide and b"\n" not in head and b"\r" in head:
            newline = "\r"
        with io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline=newline) as lines:
            yield lines, head.decode(encoding, "ignore")  # it may end in the middle of a character


def _read_text(storage: Storage, uri: str, wanted: str | None, left_out: LeftOut) -> Iterator[Named]:
    """Yields one name per line, spaces included. A line that begins with `#` is a comment."""
    if wanted is not None:
        raise ConfigError(f"{uri}: a text list has no columns; leave out --column {wanted}")
    with _lines(storage, uri, newline="\n") as (lines, head):
        if (sign := columns_sign(head)) is not None:
            raise ConfigError(f"{uri}: has several columns in each line, and a text list one name; {_AS_COLUMNS[sign]}")
        for line in lines:
            name = line.rstrip("\r\n")
            if name.startswith("#"):
                left_out.add(Reason.COMMENTS, name)
            else:
                yield Named(name)


# -- CSV ---------------------------------------------------------------------------------------------------------------


def _read_csv(storage: Storage, uri: str, wanted: str | None, left_out: LeftOut) -> Iterator[Named]:
    """Yields the rows of a CSV list. Spaces around fields, and in the header, are ignored: people write `1, a.jpg`."""
    csv.field_size_limit(_FIELD_LIMIT)
    with _lines(storage, uri, newline="") as (lines, head):
        separator = re.match(r"sep=(.)\r?\n", head)  # written by Excel
        if separator:
            lines.readline()
            head = head[separator.end() :]
        delimiter = separator.group(1) if separator else _delimiter(uri, head, wanted)
        rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
        first = _first_row(rows)
        if not first:
            return
        second = next(filter(None, rows), [])
        names = [name.strip() for name in first]
        headless = is_headless(names, second, wanted)
        if headless:
            wanted = wanted or _only_image(uri, images_columns(names, second))
            names = [str(number) for number in range(1, len(first) + 1)]
        places = {name: names.index(name) for name in ("etag", "bytes") if names.count(name) == 1}
        column = names.index(_column(uri, wanted, names, "" if headless else _FIRST_LINE))
        for row in [first] * headless:
            yield _csv_row(row, column, places)
        for row in filter(None, chain([second], rows)):
            if len(row) != len(names):
                raise ConfigError(
                    f"{uri}: line {rows.line_num} has {counted(len(row), 'field')} and the first has {len(names)}; "
                    f"put names that hold {delimiter!r} into quotes"
                )
            yield _csv_row(row, column, places)


def _first_row(rows: Iterable[list[str]]) -> list[str]:
    """Returns the first row that is neither blank nor a comment (`# ...`); empty if there is none."""
    return next((row for row in rows if row and not re.match(r"#(\s|#|$)", row[0])), [])


def _csv_row(row: Sequence[str], column: int, places: Mapping[str, int]) -> Named:
    etag, size = places.get("etag"), places.get("bytes")
    return Named(row[column].strip(" "), None if etag is None else _etag(row[etag]), None if size is None else _size(row[size]))


def _delimiter(uri: str, head: str, wanted: str | None) -> str:
    """Returns the delimiter that fits the first row best: it yields the wanted column, then the most fields."""
    order = ",;\t|" if _suffix(uri) == ".csv" else "\t,;|"

    def fit(sign: str) -> tuple[bool, int]:
        rows = csv.reader(io.StringIO(head, newline=""), delimiter=sign, skipinitialspace=True)
        names = [name.strip() for name in _first_row(rows)]
        return (wanted or "uri") in names, len(names)

    return max(order, key=fit)


def _only_image(uri: str, numbers: Sequence[int]) -> str:
    """Returns the only column number, as a name. Raises ConfigError if several columns may contain images."""
    if len(numbers) > 1:
        found = ", ".join(map(str, numbers))
        raise ConfigError(f"{uri}: has no header, and images in columns {found}; choose with --column {numbers[0]}")
    return str(numbers[0])


# -- JSON --------------------------------------------------------------------------------------------------------------


def _read_json(storage: Storage, uri: str, wanted: str | None, left_out: LeftOut) -> Iterator[Named]:
    """Yields the rows of a JSON array, or of one JSON value per line: names, or objects that contain one."""
    with _lines(storage, uri, newline="\n") as (lines, head):
        if head.lstrip().startswith("["):
            values: Iterable[tuple[int, Any]] = enumerate(_json(uri, 1, lines.read()), 1)
        else:
            values = ((number, _json(uri, number, line)) for number, line in enumerate(lines, 1) if line.strip())
        column: str | None = None
        for number, value in values:
            if value == {}:
                yield Named("")
            elif isinstance(value, dict):
                column = column or _json_column(uri, wanted, value)
                yield _json_row(uri, number, column, value)
            else:
                yield _json_name(uri, number, value)


def _json(uri: str, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if _COCO.search(text) or text.strip() == "{":
            _refuse_coco(uri, error)
        raise ConfigError(f"{uri}: line {number} is not JSON ({reason_of(error)})") from error


def _json_column(uri: str, wanted: str | None, value: Mapping[str, Any]) -> str:
    if {"images", "annotations"} <= value.keys():
        _refuse_coco(uri, None)
    return _column(uri, wanted, list(value))


def _refuse_coco(uri: str, error: Exception | None) -> NoReturn:
    raise ConfigError(
        f"{uri}: is one JSON object (a COCO file?) and no list of names; give the folder of its images, "
        "or write an array of names, or one name per line"
    ) from error


def _json_row(uri: str, number: int, column: str, value: Mapping[str, Any]) -> Named:
    name = value.get(column)
    if isinstance(name, list):
        raise ConfigError(
            f"{uri}: entry {number} has a list as {column!r}; write the names as an array of their own, or one name per line"
        )
    if name is not None and not isinstance(name, str):
        raise ConfigError(
            f"{uri}: entry {number} has {_short(name)} as {column!r} and no name; choose the key of the names with --column"
        )
    return Named(name or "", _etag(value.get("etag")), _size(value.get("bytes")))


def _json_name(uri: str, number: int, value: object) -> Named:
    if value is not None and not isinstance(value, str):
        raise ConfigError(
            f"{uri}: entry {number} is {_short(value)} and no name; write each entry as a string, or as an object with a key "
            "that names the image"
        )
    return Named(value or "")


def _short(value: object) -> str:
    return json.dumps(value)[:60]
