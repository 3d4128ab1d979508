"""Labelling a folder, in this process: new, changed, broken and deadly images end as the table promises."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.dataset
import pytest
import ray
import torch

from masklake.jobs import label
from masklake.jobs.cluster.connection import connect_ray
from masklake.jobs.label import LabelOptions, LabelReport, describe
from masklake.jobs.labelling.progress import start_counter
from masklake.model import load_checkpoint
from masklake.model.errors import CheckpointError, ConfigError
from masklake.pipeline.errors import (
    ClusterTooSmallError,
    EmptyInputError,
    InputNotFoundError,
    LabellingError,
    StorageError,
    TableError,
)
from masklake.pipeline.images.decode import Decoded
from masklake.pipeline.labelling import labeller
from masklake.pipeline.labelling.labeller import Labeller, LabellingActor, LabelSpec
from masklake.pipeline.labelling.run_list import list_runs
from masklake.pipeline.storage.errors import translated
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.runs import this_user
from masklake.pipeline.table.table import open_table
from tests import second_detector
from tests.manifests import read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One embedded Ray for all runs of this file: what a caller of `label.run` in a loop has; with a detector installed."""
    with pytest.MonkeyPatch.context() as patch:
        site = str(second_detector.install(tmp_path_factory.mktemp("site")))
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", site, prepend=os.pathsep)  # of Ray's workers
        connect_ray()
        yield


def options(source: Path | str, table: Path | str, weights: Path | str, **more: Any) -> LabelOptions:
    predict = {"score_threshold": 0.0, "max_detections": 20}
    values = {"input": {"uri": str(source)}, "table": str(table), "weights": str(weights), "predict": predict}
    return label.options(**(values | {"progress": False} | more))


def globbed(table: Path) -> int:
    """What a reader counts that takes every `*.parquet` below the table for data."""
    (rows,) = duckdb.sql(f"SELECT count(*) FROM '{table}/**/*.parquet'").fetchall()[0]
    return int(rows)


def rows_of(table: Path | str, *columns: str) -> list[dict[str, Any]]:
    names = list(columns) or ["uri", "status", "error", "run", "width", "height", "instances", "rles"]
    return open_table(Storage(), str(table)).dataset().to_table(columns=names).sort_by("uri").to_pylist()


def counts(report: LabelReport) -> dict[str, int]:
    return {status: count for status, count in report.statuses.items() if count}


def test_each_image_is_labelled_once_and_again_when_it_changes(
    tmp_path: Path, tiny_checkpoint: Path, pictures: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, table = pictures(22), tmp_path / "table"
    (folder / "cut.jpg").write_bytes((folder / "000.jpg").read_bytes()[:300])
    (folder / "notes.jpg").write_text("not an image")
    job = options(folder, table, tiny_checkpoint, price_per_hour=3600)

    first = label.run(job)
    assert counts(first) == {"ok": 22, "decode_error": 2}
    assert (first.images, first.labelled_now, first.resumed) == (24, 24, False)
    assert first.failed_share == pytest.approx(2 / 24)
    rows = rows_of(table)
    assert [Path(row["uri"]).name for row in rows] == [f"{n:03d}.jpg" for n in range(22)] + ["cut.jpg", "notes.jpg"]
    scores = [instance["score"] for row in rows for instance in row["instances"]]
    assert sum(first.categories_stored.values()) == first.instances_stored == len(scores) > 22
    assert sum(first.categories.values()) == first.instances == sum(score >= 0.5 for score in scores)
    assert all(len(row["rles"]) == len(row["instances"]) for row in rows)
    assert [row["error"] is None for row in rows] == [row["status"] == "ok" for row in rows]
    assert first.model_id.startswith("tiny-")
    assert "22 ok, 2 decode_error" in describe(first)
    (noted,) = list_runs(open_table(Storage(), str(table)))
    assert (noted.run_id, noted.state, noted.images, noted.starts) == (first.run_id, "committed", 24, 1)
    assert noted.statuses == first.statuses
    assert 0 < (noted.seconds or 0) <= first.seconds
    assert (noted.model_id, noted.gpu_hours, noted.by) == (first.model_id, 0, this_user())
    assert noted.cost == pytest.approx(noted.seconds), "at 3600 an hour"

    with monkeypatch.context() as patch:  # nothing new starts no Ray, whatever was asked for
        patch.setattr(label, "connect_ray", lambda address: pytest.fail("Ray is not needed"))
        assert label.run(job.model_copy(update={"workers": 4, "device": "cuda", "address": "10.0.0.1:6379"})).run_id is None
    nothing = label.run(job)
    assert (nothing.run_id, nothing.images) == (None, 0)
    assert rows_of(table) == rows

    os.utime(folder / "003.jpg", ns=(1, 1))  # a new version by its time stamp
    pictures(2, first=50)
    later = label.run(job.model_copy(update={"retry_failed": True, "block_rows": 2}))
    assert counts(later) == {"ok": 3, "decode_error": 2}
    assert [Path(row["uri"]).name for row in rows_of(table) if row["run"] == later.run_id] == [
        "003.jpg",
        "050.jpg",
        "051.jpg",
        "cut.jpg",
        "notes.jpg",
    ]
    assert globbed(table) == 24 + 5 == pyarrow.dataset.dataset(table, partitioning="hive").count_rows()


def test_labels_do_not_depend_on_blocks_or_workers(
    tmp_path: Path, tiny_checkpoint: Path, pictures: Callable[..., Path]
) -> None:
    folder, table = pictures(12), tmp_path / "table"
    job = options(folder, table, tiny_checkpoint, block_rows=5)
    report = label.run(job)
    model = load_checkpoint(tiny_checkpoint)
    spec = LabelSpec(Storage(), model.model_id, report.label_id, job.predict)
    manifest = read_manifest(Storage(), open_table(Storage(), str(table)).manifest_uri(report.run_id or ""))
    in_one_block = Labeller(spec, model)(manifest).to_pylist()
    for found, expected in zip(rows_of(table), in_one_block, strict=True):
        assert (found["uri"], found["status"], found["rles"]) == (expected["uri"], expected["status"], expected["rles"])
        for a, b in zip(found["instances"], expected["instances"], strict=True):
            assert a["score"] == pytest.approx(b["score"], abs=1e-6)
            assert list(a["box"].values()) == pytest.approx(list(b["box"].values()), abs=1e-4)


def test_another_detector_labels_like_our_own(tmp_path: Path, pictures: Callable[..., Path]) -> None:
    """From a checkpoint of an installed package to a committed table, in Ray's workers; again there is nothing new."""
    weights = tmp_path / "second.safetensors"
    weights.write_bytes(second_detector.checkpoint())
    job = options(pictures(6), tmp_path / "table", weights)
    report = label.run(job)
    assert counts(report) == {"ok": 6}
    assert report.model_id == second_detector.load(weights.read_bytes(), torch.device("cpu")).model_id
    rows = rows_of(tmp_path / "table")
    assert [len(row["instances"]) for row in rows] == [len(row["rles"]) for row in rows] == [5] * 6
    assert set(report.categories_stored) <= {"cup", "plate"}
    assert label.run(job).run_id is None


POISON = b"this image kills its worker"


class DeadlyActor(LabellingActor):
    """A labeller whose process dies, as in a decoder's memory fault, when it meets a certain file."""

    def __init__(self, *arguments: Any) -> None:
        real = labeller.decode

        def decode(data: bytes, *rest: Any) -> Decoded:
            if data.endswith(POISON):
                os._exit(7)
            return real(data, *rest)

        labeller.decode = decode
        super().__init__(*arguments)


def test_an_image_that_kills_its_worker_is_crashed_and_no_other(
    tmp_path: Path, tiny_checkpoint: Path, pictures: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures(16)
    with (folder / "005.jpg").open("ab") as file:
        file.write(POISON)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a test's module is not importable on a worker
    monkeypatch.setattr(label, "LabellingActor", DeadlyActor)
    said: list[str] = []
    report = label.run(options(folder, tmp_path / "table", tiny_checkpoint, block_rows=8, workers=1), said.append)
    assert counts(report) == {"ok": 15, "crashed": 1}
    assert report.labelled_now == 16
    crashed = [row for row in rows_of(tmp_path / "table") if row["status"] == "crashed"]
    assert [Path(row["uri"]).name for row in crashed] == ["005.jpg"]
    assert "the worker process ended 3 times" in crashed[0]["error"]
    assert any("1 at a time" in line for line in said)

    assert label.run(options(folder, tmp_path / "table", tiny_checkpoint)).run_id is None  # final: not tried again


class FullDiskActor(LabellingActor):
    """A labeller whose disk is full after its first block."""

    def __init__(self, *arguments: Any) -> None:
        from masklake.pipeline.storage.storage import Storage

        real, written = Storage.write_bytes, []

        def write_bytes(self: Storage, uri: str, data: bytes) -> None:
            written.append(uri)
            with translated(uri):
                if len(written) > 1:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(self, uri, data)

        Storage.write_bytes = write_bytes  # type: ignore[method-assign]
        super().__init__(*arguments)


def test_a_full_disk_stops_the_run_and_blames_no_image(
    tmp_path: Path,
    tiny_checkpoint: Path,
    pictures: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, table = pictures(6), tmp_path / "table"
    job = options(folder, table, tiny_checkpoint, block_rows=2, workers=1, progress=True)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with monkeypatch.context() as patch:
        patch.setattr(label, "LabellingActor", FullDiskActor)
        with pytest.raises(StorageError, match=r"table/run=\w+/part-.*no space left on the disk"):
            label.run(job)
    assert re.findall(r"\d/6 ", capsys.readouterr().err)[-1] == "2/6 ", "what could not be written does not count"
    assert open_table(Storage(), str(table)).files() == []
    report = label.run(job)
    assert (report.resumed, report.labelled_now, counts(report)) == (True, 4, {"ok": 6})
    assert globbed(table) == 6


class StillbornActor(LabellingActor):
    """A worker whose process ends while it loads the model."""

    def __init__(self, *arguments: Any) -> None:
        ray.get(arguments[2].starting.remote("stillborn"))
        os._exit(3)


class BrokenActor(LabellingActor):
    """A worker that cannot load the model, and can say why."""

    def __init__(self, *arguments: Any) -> None:
        raise RuntimeError("CUDA out of memory")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("actor", "message"), [(StillbornActor, "ended while they loaded the model"), (BrokenActor, "CUDA out of memory")]
)
def test_workers_that_cannot_start_stop_the_run_and_blame_no_image(
    tmp_path: Path,
    tiny_checkpoint: Path,
    pictures: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    actor: type,
    message: str,
) -> None:
    folder, table = pictures(3), tmp_path / "table"
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(label, "LabellingActor", actor)
    with pytest.raises(LabellingError, match=message):
        label.run(options(folder, table, tiny_checkpoint, workers=1, block_rows=1))
    assert open_table(Storage(), str(table)).files() == []


def test_a_plan_that_does_not_fit_is_refused_before_the_start(
    tmp_path: Path, tiny_checkpoint: Path, pictures: Callable[..., Path]
) -> None:
    with pytest.raises(ClusterTooSmallError, match="64 workers need 64 CPUs"):
        label.run(options(pictures(3), tmp_path / "table", tiny_checkpoint, workers=64))
    assert not (tmp_path / "table").exists(), "what was refused leaves nothing behind"


def test_bad_input_is_refused_in_one_line(tmp_path: Path, tiny_checkpoint: Path, pictures: Callable[..., Path]) -> None:
    empty, table = tmp_path / "empty", tmp_path / "table"
    empty.mkdir()
    with pytest.raises(EmptyInputError, match="holds no image"):
        label.run(options(empty, table, tiny_checkpoint))
    with pytest.raises(InputNotFoundError, match="absent"):
        label.run(options(tmp_path / "absent", table, tiny_checkpoint))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        label.run(options(empty, table, tmp_path / "absent.safetensors"))
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"junk" * 100)
    with pytest.raises(CheckpointError, match=r"junk\.safetensors.*not a MaskLake checkpoint"):
        label.run(options(empty, table, junk))
    with pytest.raises(TableError, match="is a file"):
        label.run(options(pictures(1), junk, tiny_checkpoint))
    assert not table.exists()


def test_bad_options_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"predict\.tasks.*box"):
        label.options(input={"uri": "a"}, table="t", weights="w", predict={"tasks": ["boxes"]})
    with pytest.raises(ConfigError, match=r"workers: .*greater than 0"):
        label.options(input={"uri": "a"}, table="t", weights="w", workers=0)
    for tick in ("a/b", "", "2026.11"):
        with pytest.raises(ConfigError, match=rf"^--tick '{tick}': use 1 to 100 letters from a to z, digits, '-' and '_' "):
            label.options(input={"uri": "a"}, table="t", weights="w", tick=tick)


class Held:
    """A lease that nobody takes away."""

    def check(self) -> None:
        """It is ours."""


@pytest.mark.parametrize(("blocks", "reason"), [(2, None), (3, r"workers died twice with each of 3 blocks, .*the same")])
def test_workers_that_end_with_block_after_block_stop_the_run(blocks: int, reason: str | None) -> None:
    counter = start_counter()
    for block in [*range(blocks)] * 3:
        ray.get(counter.take.remote(block))
    watcher = label._Watcher(Held(), counter, workers=1, max_lost=2)  # type: ignore[arg-type]
    watcher._main = False
    watcher.look()
    assert (watcher.reason is None) == (reason is None)
    if reason:
        assert re.search(reason, str(watcher.reason))
    ray.kill(counter)
