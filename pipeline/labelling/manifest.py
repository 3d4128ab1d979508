"""Plans a run: lists the input, subtracts what the table holds, and freezes the rest (design, section 3.3, step 1).

Everything is streamed: listings arrive as Arrow batches and go to a temporary Parquet file, and DuckDB joins and sorts them out
of core. A bucket with millions of images needs disk space, not memory.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from masklake.model.errors import ConfigError
from masklake.pipeline.errors import EmptyInputError
from masklake.pipeline.images.status import FINAL_STATUSES, Status
from masklake.pipeline.inputs.listing import InputSpec, fixed_folder, is_glob, list_inputs, nothing_found, reaches
from masklake.pipeline.labelling.lease import Lease
from masklake.pipeline.storage.left_out import LeftOut
from masklake.pipeline.storage.objects import LISTING_BATCH, OBJECT_SCHEMA
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import below, canonical, real_place
from masklake.pipeline.table.duckdb_connection import connected
from masklake.pipeline.table.log import DROPPED
from masklake.pipeline.table.runs import RunRecord, input_key, valid_run_id
from masklake.pipeline.table.schema import RUN_COLUMN
from masklake.pipeline.table.table import Table

MEMORY_LIMIT = "2GB"
"""Memory limit of DuckDB during planning; larger joins and sorts use a temporary folder."""


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start. images: rows of its frozen manifest. listed: images in the input; None if resumed."""

    run_id: str
    manifest_uri: str
    images: int
    listed: int | None
    resumed: bool


def plan_run(
    storage: Storage,
    table: Table,
    spec: InputSpec,
    label_id: str,
    *,
    tick: str | None = None,
    retry_failed: bool = False,
    facts: dict[str, Any] | None = None,
    left_out: LeftOut | None = None,
    before_freeze: Callable[[int], None] = lambda images: None,
) -> Plan | None:
    """Returns the run to work on: an uncommitted one of the same input and label_id, else a new one; None if there is nothing
    to do.

    tick: id of the new run, for schedulers; if its run is committed, there is nothing to do. facts: additional entries of the
    run's record. left_out: counts entries of the input that are not images, also if an earlier start listed them.
    before_freeze: called with the number of images of a new run before anything is written; if it raises, nothing is written.
    Raises EmptyInputError if the input contains no image (no table is created then), ConfigError if input and table overlap,
    and LeaseHeldError while another driver plans the same run.
    """
    left_out = LeftOut() if left_out is None else left_out
    spec = spec.resolved(storage)
    check_apart(spec.uri, table.uri)
    key = input_key(label_id, spec.model_dump())
    if tick is not None:
        _check_tick(table, tick, label_id, spec)
    open_run = table.find_open_run(label_id, spec.model_dump())
    if open_run is not None:
        return _continued(table, open_run, left_out)
    if tick is not None and table.is_committed(tick):
        return None
    with tempfile.TemporaryDirectory(prefix="masklake-plan-") as folder:
        listing = Path(folder, "listing.parquet")
        _spill(list_inputs(storage, spec, left_out), listing)
        listed = pq.read_metadata(listing).num_rows
        if not listed:
            said = nothing_found(storage, spec.uri)
            raise EmptyInputError(f"{spec.uri}: {said}{f' ({left_out})' if str(left_out) else ''}")
        frozen = Path(folder, "manifest.parquet")
        version = table.version()
        images = plan_manifest(table, listing, frozen, label_id, retry_failed)
        if not images:
            return None
        before_freeze(images)
        # Two drivers that plan at the same time could freeze two manifests of the same images.
        with Lease.acquire(storage, table.uri, f"plan-{key}"):
            if table.version() != version:  # another run was committed since: it may have labelled some of these images
                images = plan_manifest(table, listing, frozen, label_id, retry_failed)
            facts = (facts or {}) | {"left_out": left_out.counts(), "left_out_names": left_out.names()}
            return _freeze_new(table, spec, label_id, frozen, images, listed, tick, facts) if images else None


def _continued(table: Table, record: RunRecord, left_out: LeftOut) -> Plan:
    """Returns the plan of a run that an earlier start began."""
    known = record.model_extra or {}
    left_out.restore(known.get("left_out", {}), known.get("left_out_names", {}))
    return Plan(record.run_id, table.find_manifest(record.run_id), record.images, None, resumed=True)


def check_apart(source: str, table: str) -> None:
    """Raises ConfigError if the table is the input's folder or inside it, or the input is inside the table; links are followed.

    A later start would otherwise list the table's files, and label the file of a query or a drawing there.
    """
    pattern = is_glob(source) and not os.path.lexists(source)
    inside = real_place(fixed_folder(source) if pattern else source)
    place = real_place(table)
    remedy = "give the table a folder of its own, beside the input"
    if place == inside:
        raise ConfigError(f"{table}: is the input's own folder; {remedy}")
    if inside.startswith(below(place)):
        raise ConfigError(f"{source}: is inside the table {table}; {remedy}")
    if place.startswith(below(inside)) and (not pattern or reaches(source, canonical(table))):
        raise ConfigError(f"{table}: is inside the input {source}; {remedy}")


def _check_tick(table: Table, tick: str, label_id: str, spec: InputSpec) -> None:
    """Raises ConfigError if the tick names a run of another input or model, or one that was dropped and may have files."""
    record = table.run_record(valid_run_id(tick))
    if record is not None and table.state(tick) == DROPPED:
        raise ConfigError(f"tick {tick}: its run was dropped from {table.uri}, and an id is used once; choose another tick")
    if record is not None and (record.label_id, record.input) != (label_id, spec.model_dump()):
        raise ConfigError(f"tick {tick}: was used for another input or model in {table.uri}; choose another tick")


def _freeze_new(
    table: Table,
    spec: InputSpec,
    label_id: str,
    frozen: Path,
    images: int,
    listed: int,
    tick: str | None,
    facts: dict[str, Any],
) -> Plan:
    raced = table.find_open_run(label_id, spec.model_dump())
    if raced is not None:
        return _continued(table, raced, LeftOut())
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
    """Writes the listed images that the table does not hold yet to `frozen` (MANIFEST_SCHEMA, by uri); returns their number.

    The table holds an image if the newest row of its uri and this label_id has a final status (`FINAL_STATUSES`; with
    retry_failed only `ok`) and the same etag. If the etag differs, the storage is asked: a listing may be older than the row,
    or a list may use its own kind of version, so only the storage's current answer counts as a change. A uri that is listed
    twice counts once.
    """
    folder = frozen.parent
    with connected() as connection:
        connection.execute("SET memory_limit = $limit", {"limit": MEMORY_LIMIT})
        connection.execute("SET temp_directory = $folder", {"folder": str(folder / "spill")})
        connection.read_parquet(str(listing)).create_view("listed")
        _register_held(connection, table, label_id, [Status.OK] if retry_failed else sorted(FINAL_STATUSES))
        connection.sql(
            """
            SELECT uri, min(listed.etag) AS etag, min(bytes) AS bytes, any_value(held.etag) AS held
            FROM listed LEFT JOIN held USING (uri)
            WHERE held.etag IS NULL OR listed.etag IS DISTINCT FROM held.etag
            GROUP BY uri
            """
        ).write_parquet(str(folder / "candidates.parquet"), compression="zstd")
        _spill(_asked_again(table.storage, folder / "candidates.parquet"), folder / "asked.parquet")
        connection.read_parquet(str(folder / "candidates.parquet")).create_view("candidates")
        connection.read_parquet(str(folder / "asked.parquet")).create_view("asked")
        # image_id counts from 0 in uri order: the same input gives the same manifest, byte for byte.
        connection.sql(
            """
            SELECT row_number() OVER (ORDER BY uri) - 1 AS image_id, uri,
                   coalesce(asked.etag, once.etag) AS etag, coalesce(asked.bytes, once.bytes) AS bytes
            FROM candidates AS once LEFT JOIN asked USING (uri)
            WHERE asked.etag IS NULL OR asked.etag <> held
            ORDER BY uri
            """
        ).write_parquet(str(frozen), compression="zstd", row_group_size=20_480)
    return int(pq.read_metadata(frozen).num_rows)


def _asked_again(storage: Storage, candidates: Path) -> Iterable[pa.RecordBatch]:
    """Yields OBJECT_SCHEMA rows with the current version of each candidate that the table holds in another one."""
    with pq.ParquetFile(candidates) as file:
        for batch in file.iter_batches(LISTING_BATCH, columns=["uri", "held"]):
            changed = batch.filter(pc.is_valid(batch["held"]))
            if changed.num_rows:
                yield storage.stat_many(changed["uri"].to_pylist())


def _register_held(connection: duckdb.DuckDBPyConnection, table: Table, label_id: str, statuses: list[str]) -> None:
    """Creates a table `held` (uri, etag): the newest row of each image that need not be labelled. etag: null if nothing was
    read.
    """
    connection.execute("CREATE TEMP TABLE held (uri VARCHAR, etag VARCHAR)")
    if table.version() < 0 or not table.files():
        return
    field = pc.field
    chosen = table.dataset().scanner(
        columns=["uri", "etag", "labelled_at", RUN_COLUMN],
        filter=(field("label_id") == label_id) & field("status").isin([str(name) for name in statuses]),
    )
    connection.register("rows", chosen.to_reader())
    newest = f"max_by(etag, (labelled_at, {RUN_COLUMN}))"
    connection.execute(f"INSERT INTO held SELECT uri, {newest} FROM rows GROUP BY uri")  # noqa: S608 - constants of this program


def content_run_id(manifest: Path, label_id: str, spec: InputSpec, table_version: int) -> str:
    """Returns the id of a run without a tick: 16 hex digits of a hash of its frozen rows, its input and its label_id.

    The table's version is included: a retry of failed images is another run of the same rows.
    """
    digest = hashlib.sha256(f"{label_id}\n{spec.model_dump_json()}\n{table_version}\n".encode())
    with pq.ParquetFile(manifest) as file:
        for batch in file.iter_batches(LISTING_BATCH, columns=["uri", "etag"]):
            for uri, etag in zip(batch["uri"].to_pylist(), batch["etag"].to_pylist(), strict=True):
                digest.update(f"{uri}\0{etag}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
