"""What a run works on: list the input, subtract what the table holds, freeze the rest (design, section 3.3, step 1).

Everything streams: listings arrive as Arrow batches, go to a temporary Parquet file, and DuckDB joins and sorts them out of
core, so a bucket of millions needs disk and not memory.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from model.errors import ConfigError
from pipeline.duck import connected
from pipeline.errors import EmptyInputError, StorageError
from pipeline.lease import Lease
from pipeline.schema import FINAL_STATUSES, MANIFEST_SCHEMA, Status
from pipeline.storage import (
    IMAGE_SUFFIXES,
    LISTING_BATCH,
    OBJECT_SCHEMA,
    Storage,
    canonical,
    parent,
    parse,
    relative_to,
)
from pipeline.storage_errors import describe, translated
from pipeline.table import RunRecord, Table, input_key, valid_run_id

logger = logging.getLogger(__name__)

MEMORY_LIMIT = "2GB"
"""DuckDB's share while it plans; joins and sorts beyond it go to a temporary folder."""

_MANIFEST_SUFFIXES = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "csv", ".txt": "text", ".lst": "text"}


class InputSpec(BaseModel):
    """What to label. A run is continued by a later start with an equal specification."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str = Field(
        description="A folder or prefix (recursive), a glob (*, ?, [], **), one image, or a Parquet, CSV or text list of URIs."
    )
    column: str | None = Field(
        default=None, description="The column of a Parquet or CSV list; default: `uri`, or the only one."
    )

    def canonical(self) -> InputSpec:
        """The same input, named the same way from everywhere."""
        return self.model_copy(update={"uri": canonical(self.uri)})


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start. images: rows of its frozen manifest. listed: images in the input, null when resumed."""

    run_id: str
    manifest_uri: str
    images: int
    listed: int | None
    resumed: bool


# -- listing -----------------------------------------------------------------------------------------------------------


def list_inputs(storage: Storage, spec: InputSpec) -> Iterator[pa.RecordBatch]:
    """Every image of the input as OBJECT_SCHEMA batches; a list's names may repeat, a folder's do not.

    Folders and prefixes give names with an image suffix; a glob and a list give what they name. A list's relative names are
    below its own folder, and rows without an `etag` are asked of the storage, in parallel; etag stays null where nothing is.
    InputNotFoundError: no such folder, bucket or list. ConfigError: no such column.
    """
    spec = spec.canonical()
    if _is_glob(parse(spec.uri).bucket):
        raise ConfigError(f"{spec.uri}: a pattern cannot choose the bucket; name it")
    if storage.is_file(spec.uri):
        kind = _MANIFEST_SUFFIXES.get(os.path.splitext(spec.uri)[1].lower())
        if kind is not None:
            yield from _list_manifest(storage, spec, kind)
        else:
            yield storage.stat_many([spec.uri])
    elif _is_glob(spec.uri) and not storage.exists(spec.uri):
        yield from _list_glob(storage, spec.uri)
    else:
        yield from storage.list_images(spec.uri, IMAGE_SUFFIXES)


def _is_glob(uri: str) -> bool:
    return any(sign in uri for sign in "*?[")


def _list_glob(storage: Storage, pattern: str) -> Iterator[pa.RecordBatch]:
    fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    folder = fixed.rpartition("/")[0] or "/"
    regex = glob_regex(pattern)
    for batch in storage.list_objects(folder):
        try:
            chosen = batch.filter(pc.match_substring_regex(batch["uri"], regex))
        except pa.ArrowInvalid as error:
            raise ConfigError(f"{pattern}: not a pattern that can be matched ({error}); check its brackets") from error
        if chosen.num_rows:
            yield chosen


def glob_regex(pattern: str) -> str:
    """The RE2 expression of a shell pattern: `*` and `?` stay within a folder, `**/` is any number of folders."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "^(?s:" + "".join(wild.get(part) or _literal_or_class(part) for part in parts) + ")$"


def _literal_or_class(part: str) -> str:
    if re.fullmatch(r"\[[^\]]+\]", part):
        negated, members = part[1] == "!", part[1:-1].removeprefix("!").replace("\\", "\\\\")
        return f"[{'^' if negated else ''}{members}]"
    return re.escape(part)


def _list_manifest(storage: Storage, spec: InputSpec, kind: str) -> Iterator[pa.RecordBatch]:
    readers: dict[str, Callable[[Storage, InputSpec], Iterator[pa.RecordBatch]]] = {
        "parquet": _read_parquet,
        "csv": _read_csv,
        "text": _read_text,
    }
    base = parent(spec.uri)
    with _list_errors(spec.uri, kind):
        for batch in readers[kind](storage, spec):
            named = batch.filter(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(batch["uri"])), 0))  # null counts as blank
            if named.num_rows < batch.num_rows:
                logger.warning("%s: %d rows name nothing and are left out", spec.uri, batch.num_rows - named.num_rows)
            uris = [_name_to_uri(base, name) for name in named["uri"].to_pylist()]
            yield _with_etags(storage, uris, named)


@contextmanager
def _list_errors(uri: str, kind: str) -> Iterator[None]:
    try:
        with translated(uri):
            yield
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError, pa.ArrowKeyError) as error:
        raise ConfigError(f"{uri}: cannot be read as a {kind} list ({describe(error)})") from error
    except StorageError as error:
        if isinstance(error.__cause__, (pa.ArrowInvalid, UnicodeDecodeError)):
            raise ConfigError(f"{uri}: cannot be read as a {kind} list ({describe(error.__cause__)})") from error
        raise


def _name_to_uri(base: str, name: str) -> str:
    try:
        return relative_to(base, name)
    except ConfigError:
        return name  # a scheme we cannot read: the row stays, and the fetch says why it failed


def _with_etags(storage: Storage, uris: list[str], batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with canonical URIs; what its author left out (etag, bytes) comes from the storage."""
    etags = batch["etag"] if "etag" in batch.schema.names else pa.nulls(len(uris), pa.string())
    sizes = batch["bytes"] if "bytes" in batch.schema.names else pa.nulls(len(uris), pa.int64())
    if etags.null_count:
        unknown = [uri for uri, known in zip(uris, etags.is_valid().to_pylist(), strict=True) if not known]
        asked = iter(storage.stat_many(unknown).to_pylist())
        rows = zip(etags.to_pylist(), sizes.to_pylist(), strict=True)
        known_rows = [(etag, size) if etag is not None else _stat_columns(next(asked)) for etag, size in rows]
        etags, sizes = [etag for etag, _ in known_rows], [size for _, size in known_rows]
    return pa.record_batch([uris, etags, sizes], schema=OBJECT_SCHEMA)


def _stat_columns(row: dict[str, Any]) -> tuple[str | None, int | None]:
    return row["etag"], row["bytes"]


def _column(spec: InputSpec, names: list[str]) -> str:
    chosen = spec.column or ("uri" if "uri" in names else names[0] if len(names) == 1 else None)
    if chosen not in names:
        said = f"no column {chosen!r}" if chosen else "several columns, none of them `uri`"
        raise ConfigError(f"{spec.uri}: {said}; name one of: {', '.join(names)}")
    if names.count(chosen) > 1:
        raise ConfigError(f"{spec.uri}: has {names.count(chosen)} columns named {chosen!r}; rename all but one")
    return chosen


def _read_parquet(storage: Storage, spec: InputSpec) -> Iterator[pa.RecordBatch]:
    filesystem, path = storage.arrow(spec.uri)
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        names = file.schema_arrow.names
        column = _column(spec, names)
        kind = file.schema_arrow.field(column).type
        if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            raise ConfigError(f"{spec.uri}: column {column!r} holds {kind} and not names; choose another with --column")
        more = [name for name in ("etag", "bytes") if name in names and name != column]
        for batch in file.iter_batches(LISTING_BATCH, columns=[column, *more]):
            columns = {"uri": batch[column].cast(pa.string())}
            columns |= {name: batch[name].cast(OBJECT_SCHEMA.field(name).type) for name in more}
            yield pa.RecordBatch.from_pydict(columns)


def _read_csv(storage: Storage, spec: InputSpec) -> Iterator[pa.RecordBatch]:
    filesystem, path = storage.arrow(spec.uri)
    delimiter = "\t" if spec.uri.lower().endswith(".tsv") else ","
    with filesystem.open_input_stream(path) as stream:
        head = stream.read(1 << 16)
    if not head.strip():
        return
    parse_options = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    header = head.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0] + b"\n"
    names = pyarrow.csv.read_csv(io.BytesIO(header), parse_options=parse_options).column_names
    column = _column(spec, names)
    convert = pyarrow.csv.ConvertOptions(
        include_columns=[column], column_types={column: pa.string()}, strings_can_be_null=False, null_values=[]
    )
    with filesystem.open_input_stream(path) as stream:
        for batch in pyarrow.csv.open_csv(stream, parse_options=parse_options, convert_options=convert):
            yield batch.rename_columns(["uri"])


def _read_text(storage: Storage, spec: InputSpec) -> Iterator[pa.RecordBatch]:
    filesystem, path = storage.arrow(spec.uri)
    with filesystem.open_input_stream(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n") as lines:
        while names := [line.rstrip("\r\n") for _, line in zip(range(LISTING_BATCH), lines, strict=False)]:
            yield pa.RecordBatch.from_pydict({"uri": pa.array(names, pa.string())})


# -- planning ----------------------------------------------------------------------------------------------------------


def plan_run(
    storage: Storage,
    table: Table,
    spec: InputSpec,
    label_id: str,
    *,
    tick: str | None = None,
    retry_failed: bool = False,
    facts: dict[str, Any] | None = None,
) -> Plan | None:
    """The run to work on now: an uncommitted one of the same input and label_id, else a new one; None: nothing to do.

    tick: the new run's id, for schedulers; a tick whose run is committed is nothing to do. facts: kept in the run's record.
    EmptyInputError when the input holds no image (no table is made then). LeaseHeldError while another driver plans the same.
    """
    spec = spec.canonical()
    key = input_key(label_id, spec.model_dump())
    if tick is not None:
        _check_tick(table, tick, label_id, spec)
    open_run = table.find_open_run(label_id, spec.model_dump())
    if open_run is not None:
        return Plan(open_run.run_id, table.manifest_uri(open_run.run_id), open_run.images, None, resumed=True)
    if tick is not None and table.is_committed(tick):
        return None
    with tempfile.TemporaryDirectory(prefix="masklake-plan-") as folder:
        listing = Path(folder, "listing.parquet")
        _spill(list_inputs(storage, spec), listing)
        listed = pq.read_metadata(listing).num_rows
        if not listed:
            raise EmptyInputError(f"{spec.uri}: holds no image; check the path ({', '.join(IMAGE_SUFFIXES)} are looked for)")
        # Two drivers that plan at the same time could freeze two manifests of the same images.
        with Lease.acquire(storage, table.uri, f"plan-{key}"):
            return _freeze_new(table, spec, label_id, listing, listed, tick, retry_failed, facts or {})


def _check_tick(table: Table, tick: str, label_id: str, spec: InputSpec) -> None:
    record = table.run_record(valid_run_id(tick))
    if record is not None and (record.label_id, record.input) != (label_id, spec.model_dump()):
        raise ConfigError(f"tick {tick}: was used for another input or model in {table.uri}; choose another tick")


def _freeze_new(
    table: Table,
    spec: InputSpec,
    label_id: str,
    listing: Path,
    listed: int,
    tick: str | None,
    retry_failed: bool,
    facts: dict[str, Any],
) -> Plan | None:
    raced = table.find_open_run(label_id, spec.model_dump())
    if raced is not None:
        return Plan(raced.run_id, table.manifest_uri(raced.run_id), raced.images, None, resumed=True)
    frozen = listing.with_name("manifest.parquet")
    images = plan_manifest(table, listing, frozen, label_id, retry_failed)
    if not images:
        return None
    run_id = valid_run_id(tick) if tick is not None else content_run_id(frozen, label_id, spec, table.version())
    table.initialise()
    table.storage.upload(frozen, table.manifest_uri(run_id))
    record = {"run_id": run_id, "label_id": label_id, "input": spec.model_dump(), "images": images, "listed": listed}
    table.begin_run(RunRecord.model_validate(facts | record | {"planned_at": datetime.now(UTC)}))
    return Plan(run_id, table.manifest_uri(run_id), images, listed, resumed=False)


def _spill(batches: Iterable[pa.RecordBatch], path: Path) -> None:
    with pq.ParquetWriter(path, OBJECT_SCHEMA, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)


def plan_manifest(table: Table, listing: Path, frozen: Path, label_id: str, retry_failed: bool = False) -> int:
    """Write the listed images that the table does not hold yet to `frozen` (MANIFEST_SCHEMA, by uri); their number.

    Held means: same uri, etag and label_id with a final status (`schema.FINAL_STATUSES`; with retry_failed only `ok`).
    A uri listed twice is taken once.
    """
    with connected() as connection:
        connection.execute("SET memory_limit = $limit", {"limit": MEMORY_LIMIT})
        connection.execute("SET temp_directory = $folder", {"folder": str(frozen.parent / "spill")})
        connection.read_parquet(str(listing)).create_view("listed")
        _register_held(connection, table, label_id, [Status.OK] if retry_failed else sorted(FINAL_STATUSES))
        # image_id counts from 0 in uri order: the same input gives the same manifest, byte for byte.
        connection.sql(
            """
            SELECT row_number() OVER (ORDER BY uri) - 1 AS image_id, uri, etag, bytes
            FROM (SELECT uri, any_value(etag) AS etag, any_value(bytes) AS bytes FROM listed GROUP BY uri) AS once
            WHERE NOT EXISTS (SELECT 1 FROM held WHERE held.uri = once.uri AND held.etag = once.etag)
            ORDER BY uri
            """
        ).write_parquet(str(frozen), compression="zstd", row_group_size=20_480)
    return int(pq.read_metadata(frozen).num_rows)


def _register_held(connection: duckdb.DuckDBPyConnection, table: Table, label_id: str, statuses: list[str]) -> None:
    """A view `held` (uri, etag) of what needs no work. Null etags hold nothing: such an image was never read."""
    if table.version() < 0 or not table.files():
        connection.execute("CREATE VIEW held AS SELECT NULL::VARCHAR AS uri, NULL::VARCHAR AS etag WHERE false")
        return
    field = pc.field
    chosen = table.dataset().scanner(
        columns=["uri", "etag"], filter=(field("label_id") == label_id) & field("status").isin([str(name) for name in statuses])
    )
    connection.register("held", chosen.to_reader())


def content_run_id(manifest: Path, label_id: str, spec: InputSpec, table_version: int) -> str:
    """A run's id where no tick names it: 16 hex digits over its frozen rows and what shall be done with them.

    The table's version is part of it: what failed and is tried again is another run of the same rows.
    """
    digest = hashlib.sha256(f"{label_id}\n{spec.model_dump_json()}\n{table_version}\n".encode())
    with pq.ParquetFile(manifest) as file:
        for batch in file.iter_batches(LISTING_BATCH, columns=["uri", "etag"]):
            for uri, etag in zip(batch["uri"].to_pylist(), batch["etag"].to_pylist(), strict=True):
                digest.update(f"{uri}\0{etag}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def read_manifest(storage: Storage, uri: str) -> pa.Table:
    """A frozen manifest as a table of MANIFEST_SCHEMA, whole in memory; InputNotFoundError where there is none."""
    filesystem, path = storage.arrow(uri)
    with translated(uri):
        return pq.read_table(path, filesystem=filesystem).cast(MANIFEST_SCHEMA)
