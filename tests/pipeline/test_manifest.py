"""What a run works on: the input listed, what the table holds subtracted, the rest frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from model.errors import ConfigError
from pipeline.errors import EmptyInputError, InputNotFoundError, LeaseHeldError
from pipeline.lease import Lease
from pipeline.manifest import InputSpec, Plan, glob_regex, list_inputs, plan_run, read_manifest
from pipeline.schema import MANIFEST_SCHEMA, Status
from pipeline.storage import Storage
from pipeline.table import Table, input_key, open_table

NAMES = ["a b.jpg", "c+d.JPG", "e%20f.png", "notes.txt", "sub/ü.webp", "sub/deep/g.jpeg"]
IMAGES = [name for name in NAMES if name != "notes.txt"]


def fill(place: str, names: list[str] = NAMES) -> Storage:
    storage = Storage()
    for name in names:
        storage.write_bytes(storage.join(place, name), name.encode())
    return storage


def listed(storage: Storage, uri: str, column: str | None = None) -> list[dict[str, Any]]:
    return [row for batch in list_inputs(storage, InputSpec(uri=uri, column=column)) for row in batch.to_pylist()]


def uris(rows: list[dict[str, Any]], place: str) -> list[str]:
    return [row["uri"].removeprefix(place + "/") for row in rows]


def test_a_folder_gives_its_images(place: str) -> None:
    storage = fill(place)
    rows = listed(storage, place)
    assert sorted(uris(rows, place)) == sorted(IMAGES)
    assert all(row["etag"] and row["bytes"] for row in rows)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jpg", ["a b.jpg"]),
        ("**/*.jp*g", ["a b.jpg", "sub/deep/g.jpeg"]),
        ("sub/*", ["sub/ü.webp"]),
        ("?+[a-d].JPG", ["c+d.JPG"]),
        ("[!a]*.txt", ["notes.txt"]),
        ("s**", ["sub/ü.webp", "sub/deep/g.jpeg"]),
    ],
)
def test_a_glob_gives_what_it_matches(place: str, pattern: str, names: list[str]) -> None:
    storage = fill(place)
    assert sorted(uris(listed(storage, f"{place}/{pattern}"), place)) == sorted(names)


def test_a_folder_may_have_a_name_like_a_glob(tmp_path: Path) -> None:
    storage = fill(str(tmp_path / "set[1]"), ["a.jpg"])
    assert len(listed(storage, str(tmp_path / "set[1]"))) == 1


def test_a_glob_does_not_choose_buckets() -> None:
    with pytest.raises(ConfigError, match="bucket"):
        list(list_inputs(Storage(), InputSpec(uri="s3://bucket-*/a.jpg")))


def test_a_pattern_is_literal_but_for_its_wildcards() -> None:
    assert glob_regex("/a.b/[!x]?*") == r"^(?s:/a\.b/[^x][^/][^/]*)$"


def test_one_image_is_an_input(place: str) -> None:
    storage = fill(place)
    assert uris(listed(storage, f"{place}/a b.jpg"), place) == ["a b.jpg"]


def write_list(storage: Storage, place: str, kind: str, names: list[str]) -> str:
    """The names in a list of that kind, beside the images."""
    sink = pa.BufferOutputStream()
    table = pa.table({"label": [str(index) for index in range(len(names))], "file": names})
    if kind == "parquet":
        pq.write_table(table, sink)
    elif kind == "csv":
        pyarrow.csv.write_csv(table, sink)
    else:
        sink.write("\r\n".join(names).encode())
    uri = storage.join(place, f"list.{kind}")
    storage.write_bytes(uri, sink.getvalue().to_pybytes())
    return uri


@pytest.mark.parametrize("kind", ["parquet", "csv", "txt"])
def test_a_list_names_images_beside_itself_and_elsewhere(place: str, tmp_path: Path, kind: str) -> None:
    storage = fill(place)
    fill(str(tmp_path / "elsewhere"), ["far.jpg"])
    names = [*NAMES, "absent.jpg", str(tmp_path / "elsewhere/far.jpg"), "ftp://host/x.jpg", "", "a b.jpg"]
    rows = listed(storage, write_list(storage, place, kind, names), None if kind == "txt" else "file")
    assert uris(rows, place) == [name for name in names if name]
    known = {row["uri"]: row["etag"] for row in rows}
    assert known[storage.join(place, "a b.jpg")] == storage.stat(storage.join(place, "a b.jpg")).etag
    assert known[storage.join(place, "absent.jpg")] is None
    assert known["ftp://host/x.jpg"] is None


def test_a_list_may_bring_its_etags(tmp_path: Path) -> None:
    storage = fill(str(tmp_path), ["a.jpg", "b.jpg"])
    pq.write_table(pa.table({"uri": ["a.jpg", "b.jpg"], "etag": ["mine", None], "bytes": [7, None]}), tmp_path / "list.parquet")
    rows = listed(storage, str(tmp_path / "list.parquet"))
    assert (rows[0]["etag"], rows[0]["bytes"]) == ("mine", 7)
    assert (rows[1]["etag"], rows[1]["bytes"]) == (storage.stat(str(tmp_path / "b.jpg")).etag, 5)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_column_that_is_not_there_is_told(tmp_path: Path, kind: str) -> None:
    uri = write_list(Storage(), str(tmp_path), kind, ["a.jpg"])
    with pytest.raises(ConfigError, match=r"'path'.*label, file"):
        listed(Storage(), uri, "path")
    with pytest.raises(ConfigError, match="several columns"):
        listed(Storage(), uri)


def test_a_list_that_is_not_one_is_told(tmp_path: Path) -> None:
    for name in ("list.parquet", "list.txt"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00 not text, not parquet \xff")
        with pytest.raises(ConfigError, match=name):
            listed(Storage(), str(tmp_path / name))


def test_a_column_of_no_names_is_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": [["a.jpg"], ["b.jpg"]], "raw": [b"a", b"b"]}), tmp_path / "list.parquet")
    for column, kind in (("uri", "list"), ("raw", "binary")):
        with pytest.raises(ConfigError, match=f"column '{column}' holds {kind}.*--column"):
            list(list_inputs(Storage(), InputSpec(uri=str(tmp_path / "list.parquet"), column=column)))
    (tmp_path / "list.csv").write_text("uri,uri\na.jpg,b.jpg\n")
    with pytest.raises(ConfigError, match="2 columns named 'uri'"):
        list(list_inputs(Storage(), InputSpec(uri=str(tmp_path / "list.csv"))))


def test_a_csv_with_a_byte_order_mark_and_quotes(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes('\ufeff"file","note"\n"a, b.jpg","two\nlines"\n'.encode())
    assert uris(listed(Storage(), str(tmp_path / "list.csv"), "file"), str(tmp_path)) == ["a, b.jpg"]


# -- planning ----------------------------------------------------------------------------------------------------------


def plan(table: Table, images: str, **options: Any) -> Plan | None:
    return plan_run(table.storage, table, InputSpec(uri=images), options.pop("label_id", "label-a"), **options)


def finish(table: Table, found: Plan, write_run: Any, make_row: Any, statuses: dict[str, str] | None = None) -> None:
    """Commit a run's rows as a labeller would, every image ok unless told otherwise."""
    rows = []
    for row in read_manifest(table.storage, found.manifest_uri).to_pylist():
        status = (statuses or {}).get(row["uri"].rpartition("/")[2], "ok")
        rows.append(make_row(row["image_id"], row["uri"], etag=row["etag"], status=status))
    write_run(table.uri, found.run_id, rows)


def test_a_new_run_freezes_everything(place: str) -> None:
    storage = fill(f"{place}/images")
    table = open_table(storage, f"{place}/table")
    found = plan(table, f"{place}/images", facts={"model_id": "tiny-0"})
    assert found is not None
    assert (found.images, found.listed, found.resumed) == (5, 5, False)
    manifest = read_manifest(storage, found.manifest_uri)
    assert manifest.schema.equals(MANIFEST_SCHEMA)
    assert manifest["image_id"].to_pylist() == list(range(5))
    assert manifest["uri"].to_pylist() == sorted(storage.join(place, "images", name) for name in IMAGES)
    record = table.run_record(found.run_id)
    assert record is not None
    assert (record.status, record.label_id, record.images) == ("planned", "label-a", 5)
    assert record.model_extra == {"model_id": "tiny-0", "listed": 5}


def test_an_uncommitted_run_is_continued_on_its_own_manifest(place: str, write_run: Any, make_row: Any) -> None:
    storage = fill(f"{place}/images")
    table = open_table(storage, f"{place}/table")
    first = plan(table, f"{place}/images")
    assert first is not None
    fill(f"{place}/images", ["new.jpg"])
    again = plan(table, f"{place}/images", tick="tomorrow")
    assert again is not None
    assert (again.run_id, again.images, again.resumed) == (first.run_id, 5, True)
    finish(table, again, write_run, make_row)
    after = plan(table, f"{place}/images", tick="tomorrow")
    assert after is not None
    assert (after.run_id, after.images, after.listed) == ("tomorrow", 1, 6)


def test_nothing_new_is_nothing_to_do(place: str, write_run: Any, make_row: Any) -> None:
    storage = fill(f"{place}/images")
    table = open_table(storage, f"{place}/table")
    found = plan(table, f"{place}/images", tick="2026-01-01")
    assert found is not None
    assert found.run_id == "2026-01-01"
    finish(table, found, write_run, make_row)
    assert plan(table, f"{place}/images") is None
    fill(f"{place}/images", ["new.jpg"])
    assert plan(table, f"{place}/images", tick="2026-01-01") is None, "this tick is done, whatever came since"


def test_a_changed_image_and_another_model_are_new_work(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    storage = fill(str(tmp_path / "images"), ["a.jpg", "b.jpg"])
    table = open_table(storage, str(tmp_path / "table"))
    found = plan(table, str(tmp_path / "images"))
    assert found is not None
    finish(table, found, write_run, make_row)
    storage.write_bytes(str(tmp_path / "images/b.jpg"), b"other bytes")
    changed = plan(table, str(tmp_path / "images"))
    assert changed is not None
    assert read_manifest(storage, changed.manifest_uri)["uri"].to_pylist() == [str(tmp_path / "images/b.jpg")]
    other_model = plan(table, str(tmp_path / "images"), label_id="label-b")
    assert other_model is not None
    assert other_model.images == 2
    assert len({found.run_id, changed.run_id, other_model.run_id}) == 3


def test_only_what_may_end_otherwise_is_tried_again(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    statuses = {f"{status}.jpg": str(status) for status in Status}
    storage = fill(str(tmp_path / "images"), list(statuses))
    table = open_table(storage, str(tmp_path / "table"))
    ids = []
    for _ in range(3):
        found = plan(table, str(tmp_path / "images"))
        assert found is not None
        ids.append(found.run_id)
        finish(table, found, write_run, make_row, statuses)
    tried = {Path(uri).stem for uri in read_manifest(storage, found.manifest_uri)["uri"].to_pylist()}
    assert tried == {"missing", "fetch_error", "model_error"}
    assert len(set(ids)) == 3, "trying the same images again is another run"
    everything = plan(table, str(tmp_path / "images"), retry_failed=True)
    assert everything is not None
    assert everything.images == len(Status) - 1


def test_an_image_listed_twice_is_labelled_once(tmp_path: Path) -> None:
    storage = fill(str(tmp_path), ["a.jpg", "b.jpg"])
    (tmp_path / "list.txt").write_text(f"a.jpg\n./a.jpg\n{tmp_path}/a.jpg\nb.jpg\n")
    found = plan(open_table(storage, str(tmp_path / "table")), str(tmp_path / "list.txt"))
    assert found is not None
    assert (found.listed, found.images) == (4, 2)


def test_the_same_images_give_the_same_run(tmp_path: Path) -> None:
    storage = fill(str(tmp_path / "images"), ["a.jpg", "b.jpg"])
    ids = {plan(open_table(storage, str(tmp_path / name)), str(tmp_path / "images")).run_id for name in ("t1", "t2")}  # type: ignore[union-attr]
    assert len(ids) == 1


def test_an_empty_input_makes_no_table(place: str) -> None:
    storage = fill(f"{place}/images", ["notes.txt"])
    with pytest.raises(EmptyInputError, match="images"):
        plan(open_table(storage, f"{place}/table"), f"{place}/images")
    assert not storage.exists(f"{place}/table")


def test_an_input_that_is_not_there_makes_no_table(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="nowhere"):
        plan(open_table(Storage(), str(tmp_path / "table")), str(tmp_path / "nowhere"))
    assert not (tmp_path / "table").exists()


def test_a_tick_belongs_to_one_input(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    storage = fill(str(tmp_path / "images"), ["a.jpg"])
    table = open_table(storage, str(tmp_path / "table"))
    found = plan(table, str(tmp_path / "images"), tick="2026-01-01")
    assert found is not None
    finish(table, found, write_run, make_row)
    with pytest.raises(ConfigError, match="another tick"):
        plan(table, str(tmp_path / "images"), tick="2026-01-01", label_id="label-b")
    with pytest.raises(ConfigError, match="run id"):
        plan(table, str(tmp_path / "images"), tick="2026-01-01T00:00")


def test_two_drivers_do_not_plan_the_same_input_at_once(tmp_path: Path) -> None:
    storage = fill(str(tmp_path / "images"), ["a.jpg"])
    table = open_table(storage, str(tmp_path / "table"))
    spec = InputSpec(uri=str(tmp_path / "images"))
    key = input_key("label-a", spec.model_dump())
    with Lease.acquire(storage, table.uri, f"plan-{key}"), pytest.raises(LeaseHeldError):
        plan(table, spec.uri)


def test_the_hostile_images_are_all_listed(shared_data: Path) -> None:
    rows = listed(Storage(), str(shared_data / "torture/manifest.csv"), "file")
    assert len(rows) == 689
    assert all(row["etag"] for row in rows)
