"""The images of a run: the input is listed, what the table holds is subtracted, and the rest is frozen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from masklake.model.errors import ConfigError
from masklake.pipeline.errors import EmptyInputError, InputNotFoundError, LeaseHeldError
from masklake.pipeline.images.fetch import fetch
from masklake.pipeline.images.status import Status
from masklake.pipeline.inputs.listing import InputSpec
from masklake.pipeline.labelling.lease import Lease
from masklake.pipeline.labelling.manifest import Plan, check_apart, plan_run
from masklake.pipeline.labelling.upkeep import drop
from masklake.pipeline.storage.left_out import LeftOut
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.runs import input_key
from masklake.pipeline.table.schema import MANIFEST_SCHEMA
from masklake.pipeline.table.table import Table, open_table
from tests.manifests import read_manifest
from tests.pipeline.inputs.files import IMAGES, fill


def plan(table: Table, images: str, **options: Any) -> Plan | None:
    return plan_run(table.storage, table, InputSpec(uri=images), options.pop("label_id", "label-a"), **options)


def finish(table: Table, found: Plan, write_run: Any, make_row: Any, statuses: dict[str, str] | None = None) -> None:
    """Commit a run's rows as a labeller would, every image ok unless told otherwise."""
    rows = []
    for row in read_manifest(table.storage, found.manifest_uri).to_pylist():
        status = (statuses or {}).get(row["uri"].rpartition("/")[2], "ok")
        rows.append(make_row(row["image_id"], row["uri"], etag=row["etag"], status=status))
    write_run(table.uri, found.run_id, rows)


def label(table: Table, found: Plan, write_run: Any, make_row: Any) -> None:
    """Commit a run as a labeller would: with the version that the fetch met and not the listed one."""
    rows = read_manifest(table.storage, found.manifest_uri).to_pylist()
    answers = fetch(table.storage, [row["uri"] for row in rows], max_bytes=1000)
    made = [
        make_row(row["image_id"], row["uri"], etag=answer.etag, status=str(answer.status), labelled_at=datetime.now(UTC))
        for row, answer in zip(rows, answers, strict=True)
    ]
    write_run(table.uri, found.run_id, made)


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
    assert record.model_id == "tiny-0"
    extra = {"listed": 5}
    assert record.model_extra == extra | {"left_out": {"other_files": 1}, "left_out_names": {"other_files": "notes.txt"}}


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


def test_the_images_of_a_dropped_run_are_new_again(place: str, write_run: Any, make_row: Any) -> None:
    storage = fill(f"{place}/images", ["a.jpg"])
    table = open_table(storage, f"{place}/table")
    runs = []
    for name in ("b.jpg", "c.jpg"):
        found = plan(table, f"{place}/images")
        assert found is not None
        finish(table, found, write_run, make_row)
        runs.append(found.run_id)
        fill(f"{place}/images", [name])
    drop(table, runs[0])
    again = plan(table, f"{place}/images")
    assert again is not None
    uris = read_manifest(storage, again.manifest_uri)["uri"].to_pylist()
    assert [uri.rpartition("/")[2] for uri in uris] == ["a.jpg", "c.jpg"], "b.jpg is in the second run"
    assert again.run_id not in runs, "an id is used once"
    finish(table, again, write_run, make_row)
    assert plan(table, f"{place}/images") is None
    drop(table, again.run_id)
    once_more = plan(table, f"{place}/images")
    assert once_more is not None
    assert once_more.run_id not in (*runs, again.run_id), "the same rows, and another run"


def test_a_tick_whose_run_was_dropped_is_refused(place: str, write_run: Any, make_row: Any) -> None:
    """Its folder still holds the dropped files, whose numbers are those of another list."""
    storage = fill(f"{place}/images")
    table = open_table(storage, f"{place}/table")
    found = plan(table, f"{place}/images", tick="monday")
    assert found is not None
    finish(table, found, write_run, make_row)
    drop(table, "monday")
    with pytest.raises(ConfigError, match=r"tick monday: its run was dropped from .*, and an id is used once"):
        plan(table, f"{place}/images", tick="monday")
    again = plan(table, f"{place}/images", tick="monday-again")
    assert again is not None
    assert again.images == found.images


def test_a_run_that_is_dropped_during_a_plan_is_planned_again(place: str, write_run: Any, make_row: Any) -> None:
    storage = fill(f"{place}/images", ["a.jpg"])
    table = open_table(storage, f"{place}/table")
    found = plan(table, f"{place}/images", tick="monday")
    assert found is not None
    finish(table, found, write_run, make_row)
    fill(f"{place}/images", ["b.jpg"])
    again = plan(table, f"{place}/images", before_freeze=lambda images: drop(table, "monday"))
    assert again is not None
    assert again.images == 2


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


# -- input and table apart ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["/data", "s3://bucket"])
@pytest.mark.parametrize(
    ("source", "labels", "said"),
    [
        ("photos", "photos", "is the input's own folder"),
        ("photos/", "photos", "is the input's own folder"),
        ("photos", "photos/", "is the input's own folder"),
        ("photos", "photos/labels", "is inside the input"),
        ("photos/in/labels", "photos/in", "is inside the table"),
        ("photos/in/labels/a.jpg", "photos/in", "is inside the table"),
        ("photos/*.jpg", "photos", "is the input's own folder"),
        ("photos/**/*.jpg", "photos/labels", "is inside the input"),
        ("photos/*/*.jpg", "photos/labels", "is inside the input"),
        ("photos/in/labels/*.jpg", "photos/in", "is inside the table"),
    ],
)
def test_a_table_within_its_input_is_refused(root: str, source: str, labels: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"{said}.*; give the table a folder of its own"):
        check_apart(f"{root}/{source}", f"{root}/{labels}")


@pytest.mark.parametrize("root", ["/data", "s3://bucket"])
@pytest.mark.parametrize(
    ("source", "labels"),
    [
        ("photos", "photos2"),
        ("photos2", "photos"),
        ("photos", "labels"),
        ("photos/*.jpg", "photos/labels"),
        ("photos/x*/*.jpg", "photos/labels"),
        ("photos/list.txt", "photos/labels"),
        ("photos/a.jpg", "photos/labels"),
    ],
)
def test_a_table_beside_its_input_is_fine(root: str, source: str, labels: str) -> None:
    check_apart(f"{root}/{source}", f"{root}/{labels}")


def test_a_refused_table_is_not_begun(tmp_path: Path) -> None:
    storage = fill(str(tmp_path / "photos"), ["a.jpg"])
    for labels in ("photos/sub/../labels", "photos/labels", "photos"):
        with pytest.raises(ConfigError, match="a folder of its own"):
            plan(open_table(storage, str(tmp_path / labels)), str(tmp_path / "photos"))
    assert os.listdir(tmp_path / "photos") == ["a.jpg"]


def test_links_do_not_hide_a_table_within_its_input(tmp_path: Path) -> None:
    storage = fill(str(tmp_path / "real/photos"), ["a.jpg"])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real/photos/elsewhere").symlink_to(tmp_path)
    for source, labels in (
        ("link/photos", "real/photos/labels"),
        ("real/photos", "link/photos"),
        ("link/photos/**", "real/photos/t"),
    ):
        with pytest.raises(ConfigError, match="a folder of its own"):
            plan(open_table(storage, str(tmp_path / labels)), str(tmp_path / source))
    assert plan(open_table(storage, str(tmp_path / "real/photos/elsewhere/labels")), str(tmp_path / "real/photos")) is not None


def test_a_table_in_a_bucket_that_is_the_input_is_refused() -> None:
    for source in ("s3://bucket", "s3://bucket/", "s3a://bucket/"):
        with pytest.raises(ConfigError, match="is inside the input"):
            check_apart(source, "s3://bucket/labels")
    check_apart("s3://bucket2", "s3://bucket/labels")
    check_apart("s3://bucket//", "s3://bucket/labels")  # its keys begin with a slash
    with pytest.raises(ConfigError, match="is inside the table"):
        check_apart("s3://bucket/labels//", "s3://bucket/labels/")


# -- versions ----------------------------------------------------------------------------------------------------------

FOREIGN = {
    "numbers": pa.array([1, 2, None]),
    "floats": pa.array([1.5, float("nan"), None]),
    "an MD5": pa.array(["9e107d9d372bb6826bd81d3542a419d6", "E4D909C290D0FB1CA068FFADDF22CBD0", None]),
    "blank": pa.array(["", "  ", None]),
    "large strings": pa.array(["x", "y", None], pa.large_string()),
    "a dictionary": pa.array(["x", "y", None]).dictionary_encode(),
    "bytes": pa.array([b"\xff\xfe", b"y", None]),
    "times": pa.array([datetime(2026, 1, 1), datetime(2026, 1, 2), None]),
    "a list": pa.array([["x"], ["y"], None]),
    "nothing": pa.nulls(3),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_versions_that_are_not_the_storages_label_nothing_twice(
    tmp_path: Path, write_run: Any, make_row: Any, kind: str
) -> None:
    names = ["a.jpg", "b.jpg", "c.jpg"]
    storage = fill(str(tmp_path), names)
    pq.write_table(pa.table({"uri": names, "etag": FOREIGN[kind], "bytes": ["no", "-1", None]}), tmp_path / "list.parquet")
    table, source = open_table(storage, str(tmp_path / "table")), str(tmp_path / "list.parquet")
    first = plan(table, source)
    assert first is not None
    assert first.images == 3
    label(table, first, write_run, make_row)
    assert plan(table, source) is None
    storage.write_bytes(str(tmp_path / "b.jpg"), b"changed")
    again = plan(table, source)
    assert again is not None
    assert read_manifest(storage, again.manifest_uri)["uri"].to_pylist() == [str(tmp_path / "b.jpg")]


@pytest.mark.parametrize("spelling", ['"{}"', 'W/"{}"', "  {} ", "{}"])
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_the_storages_own_versions_in_any_spelling_spare_its_requests(
    tmp_path: Path, write_run: Any, make_row: Any, monkeypatch: pytest.MonkeyPatch, kind: str, spelling: str
) -> None:
    """boto3 gives an ETag with its quotes."""
    names = ["a.jpg", "b.jpg"]
    storage = fill(str(tmp_path), names)
    source = tmp_path / f"list.{kind}"

    def write_list() -> None:
        etags = [spelling.format(storage.stat(str(tmp_path / name)).etag) for name in names]
        rows = pa.table({"uri": names, "etag": etags})
        pq.write_table(rows, source) if kind == "parquet" else pa.csv.write_csv(rows, source)

    write_list()
    table = open_table(storage, str(tmp_path / "table"))
    first = plan(table, str(source))
    assert first is not None
    label(table, first, write_run, make_row)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "stat_many", lambda uris: pytest.fail(f"asked for {uris}"))
        assert plan(table, str(source)) is None
        storage.write_bytes(str(tmp_path / "b.jpg"), b"changed")
        assert plan(table, str(source)) is None, "the list says that nothing changed"
    write_list()
    again = plan(table, str(source))
    assert again is not None
    assert read_manifest(storage, again.manifest_uri)["uri"].to_pylist() == [str(tmp_path / "b.jpg")]


@pytest.mark.parametrize("listed", [None, "of-the-listing"])
def test_a_store_that_lists_other_versions_than_it_answers_with_labels_nothing_twice(
    tmp_path: Path, write_run: Any, make_row: Any, monkeypatch: pytest.MonkeyPatch, listed: str | None
) -> None:
    """As some gateways do."""
    storage = fill(str(tmp_path / "images"), ["a.jpg", "b.jpg"])
    real = Storage.list_objects

    def list_objects(self: Storage, uri: str, left_out: LeftOut | None = None) -> Iterator[pa.RecordBatch]:
        for batch in real(self, uri, left_out):
            yield pa.record_batch([batch["uri"], [listed] * batch.num_rows, batch["bytes"]], schema=batch.schema)

    monkeypatch.setattr(Storage, "list_objects", list_objects)
    table = open_table(storage, str(tmp_path / "table"))
    found = plan(table, str(tmp_path / "images"))
    assert found is not None
    label(table, found, write_run, make_row)
    assert plan(table, str(tmp_path / "images")) is None
    storage.write_bytes(str(tmp_path / "images/b.jpg"), b"changed")
    changed = plan(table, str(tmp_path / "images"))
    assert changed is not None
    assert changed.images == 1


def test_a_list_older_than_the_table_labels_nothing_again(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    storage = fill(str(tmp_path / "images"), ["a.jpg"])
    table, uri = open_table(storage, str(tmp_path / "table")), str(tmp_path / "images/a.jpg")
    pq.write_table(pa.table({"uri": [uri], "etag": [storage.stat(uri).etag]}), tmp_path / "old.parquet")
    storage.write_bytes(uri, b"newer")
    found = plan(table, str(tmp_path / "images"))
    assert found is not None
    label(table, found, write_run, make_row)
    assert plan(table, str(tmp_path / "old.parquet")) is None


def test_an_image_that_changes_between_listing_and_reading_is_labelled_as_read(
    place: str, write_run: Any, make_row: Any
) -> None:
    storage = fill(f"{place}/images", ["a.jpg"])
    table = open_table(storage, f"{place}/table")
    found = plan(table, f"{place}/images")
    assert found is not None
    storage.write_bytes(f"{place}/images/a.jpg", b"newer")
    label(table, found, write_run, make_row)
    assert plan(table, f"{place}/images") is None


def test_an_image_that_is_what_it_was_before_its_last_label_is_labelled_again(
    tmp_path: Path, write_run: Any, make_row: Any
) -> None:
    """Else `current_images` would go on showing the label of the version between."""
    storage = fill(str(tmp_path / "images"), ["a.jpg"])
    table, path = open_table(storage, str(tmp_path / "table")), tmp_path / "images/a.jpg"
    before = path.stat()
    for content in (b"a.jpg", b"other", b"a.jpg"):
        path.write_bytes(content)
        if content == b"a.jpg":
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        found = plan(table, str(tmp_path / "images"))
        assert found is not None
        label(table, found, write_run, make_row)
        assert plan(table, str(tmp_path / "images")) is None


ODD_KEYS = [
    "/x.jpg", "x.jpg", "//x.jpg", "a//b.jpg", "a/./b.jpg", "a/../b.jpg", "a/b.jpg", "b.jpg", "tab\t.jpg", "cr\r.jpg",
    "nul\x00.jpg", "esc\x1b.jpg", "del\x7f.jpg", "c1\x85.jpg", "100%.jpg", "%20.jpg", " .jpg", "+.jpg", "a#b.jpg",
    "q?x=1&y.jpg", "b\\c.jpg", "\xe9.jpg", "e\u0301.jpg", "\ufffd.jpg", "\U0001d11e.jpg", "\ufeff.jpg", "\u2028.jpg",
    "'\".jpg", "*[!a].jpg", "~.jpg", "-rf.jpg", "x://y.jpg", "s3://b/z.jpg", "null", "z" * 1000 + ".jpg", "C:\\x.jpg",
    "a/", "folder/", ".jpg", "#.jpg", "x ",
]  # fmt: skip


@pytest.mark.slow
def test_every_start_on_unchanged_odd_keys_ends_in_nothing_new(s3: Any, tmp_path: Path, write_run: Any, make_row: Any) -> None:
    """From the bucket through manifest, fetch and table and back: each row is the object of that very key."""
    for key in ODD_KEYS:
        s3.put(key, b"" if key == "folder/" else repr(key).encode())
    uris = {f"s3://{s3.bucket}/{key}": key for key in ODD_KEYS if key.endswith(".jpg")}
    pq.write_table(pa.table({"uri": list(uris)}), tmp_path / "list.parquet")
    folder, pattern, named = f"s3://{s3.bucket}/", f"s3://{s3.bucket}/**.jpg", str(tmp_path / "list.parquet")
    storage, left_out = Storage(), LeftOut()
    table = open_table(storage, str(tmp_path / "table"))
    found = plan(table, folder, left_out=left_out)
    assert found is not None
    assert left_out.counts() == {"slash_at_end": 1, "other_files": 2, "other_systems": 1}
    rows = read_manifest(storage, found.manifest_uri)["uri"].to_pylist()
    assert {uris[uri] for uri in rows} == set(uris.values()) - {".jpg"}
    assert [answer.data for answer in fetch(storage, rows, max_bytes=2000)] == [repr(uris[uri]).encode() for uri in rows]
    assert [storage.read_bytes(uri) for uri in rows] == [repr(uris[uri]).encode() for uri in rows]
    label(table, found, write_run, make_row)
    assert plan(table, folder) is None
    assert plan(table, pattern) is None
    hidden = plan(table, named)
    assert hidden is not None
    assert hidden.images == 1, "a list names what a folder's listing hides"
    label(table, hidden, write_run, make_row)
    for source in (folder, pattern, named):
        assert plan(table, source) is None
