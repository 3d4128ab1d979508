"""The benchmark of a borrowed GPU, tried without one: every section on the pretended device, and failures of its worker."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import gpu, gpu_sections
from benchmarks.gpu import Event, Worker, markdown, measure
from benchmarks.gpu_sections import SECTIONS, SMALL, Bench, Row, Section
from masklake.model.instances import Instances
from masklake.model.masks.rle import encode

CHEAP = [name for name in SECTIONS if name != "tests"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(SMALL, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a real device is there")
def test_every_section_runs_to_its_end_on_the_pretended_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--pretend", "--output", str(tmp_path), "--sections", *CHEAP]) == 0
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: entry["status"] for name, entry in document["sections"].items()} == dict.fromkeys(CHEAP, "ok")
    assert all(entry["rows"] for entry in document["sections"].values())
    page = (tmp_path / "gpu.md").read_text()
    assert page in capsys.readouterr().out
    assert "not how fast a GPU is" in page
    compared = document["sections"]["correctness"]["rows"]
    exact = [row for row in compared if "fp32 on the GPU against" in row["comparison"]]
    assert [row["matched"] for row in exact] == [int(row["detections"].split()[0]) for row in exact]
    waits = document["sections"]["synchronisations"]["rows"]
    assert any(row.get("place", "").startswith("model/") for row in waits), "a wait has its line of ours"


@pytest.mark.faults
def test_the_section_of_tests_reports_what_pytest_says(bench: Bench) -> None:
    (row,) = list(gpu_sections.gpu_tests(bench))
    assert row["exit_code"] == 0
    assert "passed" in row["summary"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real device is there")
def test_without_a_device_it_says_what_to_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--pretend" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--pretend"])
    assert "--output" in capsys.readouterr().err


def one_row(bench: Bench) -> Iterator[Row]:
    yield {"value": 1}


def breaks(bench: Bench) -> Iterator[Row]:
    yield {"value": 2}
    raise ValueError("a kernel failed")


def hangs(bench: Bench) -> Iterator[Row]:
    yield {"value": 3}
    time.sleep(600)


def dies(bench: Bench) -> Iterator[Row]:
    yield {"value": 4}
    os._exit(3)


FAKES = {name: Section(name, name, run, 100.0) for name, run in (("one", one_row), ("breaks", breaks), ("dies", dies))}
FAKES |= {"hangs": Section("hangs", "hangs", hangs, 2.0), "again": Section("again", "again", one_row, 100.0)}


def serve_fakes(orders: Connection, bench: Bench) -> None:
    gpu.SECTIONS = FAKES  # in the worker's process alone
    gpu._serve(orders, bench)


def test_a_worker_that_ended_between_two_sections_is_replaced(bench: Bench) -> None:
    worker = Worker(bench, serve_fakes, method="fork")
    try:
        for _ in range(2):
            assert [event.kind for event in worker(FAKES["one"], bench, 100.0)] == ["row", "ok"]
            worker._process.kill()
            worker._process.join()
    finally:
        worker.close()


def test_a_section_that_fails_dies_or_hangs_costs_nothing_but_itself(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[str] = []
    monkeypatch.setattr(gpu, "LEAST_S", 1.0)

    def save(document: dict[str, Any]) -> None:
        saved.append(json.dumps(document))

    worker = Worker(bench, serve_fakes, method="fork")  # spawned ones import torch, for seconds
    try:
        document = measure(list(FAKES.values()), bench, worker, 300.0, save)
    finally:
        worker.close()
    entries = document["sections"]
    assert {name: (entry["status"], len(entry["rows"])) for name, entry in entries.items()} == {
        "one": ("ok", 1),
        "breaks": ("failed", 1),
        "dies": ("failed", 1),
        "hangs": ("out of time", 1),
        "again": ("ok", 1),
    }
    assert "a kernel failed" in entries["breaks"]["error"]
    assert "exit code 3" in entries["dies"]["error"]
    assert any('"value": 3' in text and '"again"' not in text for text in saved), "rows are saved as they come"


def test_sections_share_the_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LEAST_S", 1.5)

    def runs(section: Section, bench: Bench, limit_s: float) -> Iterator[Event]:
        limits.append(limit_s)
        yield Event("ok")

    limits: list[float] = []
    document = measure([FAKES["one"], FAKES["hangs"]], bench, runs, 20.0, lambda _: None)
    assert limits[0] <= 20.0
    assert limits[1] <= 2.0
    none_left = measure([FAKES["one"]], bench, runs, 1.0, lambda _: None)
    assert none_left["sections"]["one"]["status"].startswith("not begun")
    assert "not begun" in markdown(none_left)
    assert "## one" in markdown(document)


def instances(boxes: list[list[float]], labels: list[int]) -> Instances:
    """Whose masks fill their boxes."""
    rles = []
    for x1, y1, x2, y2 in np.array(boxes, dtype=int).reshape(-1, 4):
        bitmap = np.zeros((20, 30), np.uint8)
        bitmap[y1:y2, x1:x2] = 1
        rles.append(encode(bitmap))
    scores = np.linspace(0.9, 0.5, len(boxes), dtype=np.float32)
    return Instances((20, 30), np.array(boxes, np.float32).reshape(-1, 4), scores, np.array(labels, np.int64), rles)


def test_agreement_of_detections_worked_by_hand() -> None:
    one = instances([[0, 0, 10, 10], [12, 0, 22, 10], [0, 12, 8, 18]], [1, 2, 1])
    other = instances([[0, 0, 10, 8], [12, 0, 22, 10]], [1, 3])  # another class in the second place
    row = gpu_sections.agreement([one], [other])
    assert (row["detections"], row["matched"], row["images_equal_bit_by_bit"]) == ("3 and 2", 1, "0 of 1")
    assert row["mask_iou_mean"] == pytest.approx(0.8)
    assert row["box_px_most"] == 2.0
    same = gpu_sections.agreement([one], [one])
    assert (same["matched"], same["images_equal_bit_by_bit"], same["mask_iou_least"]) == (3, "1 of 1", 1.0)
    nothing = instances([], [])
    assert gpu_sections.agreement([nothing], [one])["matched"] == 0


def test_a_gpu_that_finds_nonsense_fails_the_section(monkeypatch: pytest.MonkeyPatch) -> None:
    good = instances([[0, 0, 10, 10], [12, 0, 22, 10]], [1, 2])
    row = gpu_sections.agreement([good], [good])
    half = gpu_sections.agreement([good], [instances([[0, 0, 10, 10], [12, 12, 22, 19]], [1, 2])])
    thin = gpu_sections.agreement([good], [instances([[0, 0, 10, 8], [12, 0, 22, 8]], [1, 2])])
    nothing = gpu_sections.agreement([instances([], [])], [instances([], [])])
    assert gpu_sections.fault({"comparison": "tiny: fp32", **row}) == []
    assert gpu_sections.fault({"comparison": "tiny: bf16", **half}) == ["tiny: bf16: 1 of 2 detections match"]
    assert gpu_sections.fault({"comparison": "tiny: bf16", **thin}) == ["tiny: bf16: the masks' mean IoU is 0.8"]
    assert gpu_sections.fault({"comparison": "tiny: fp32", **nothing}) == ["tiny: fp32: nothing was found"]
    assert gpu_sections.fault({"comparison": "the last one short", **thin}) == ["the last one short: 0 of 1 images are equal"]
    with_peer = gpu_sections.fault({"comparison": "tiny: bf16", **thin}, {"comparison": "tiny: torchvision", **thin})
    assert with_peer == [], "random weights: torchvision's autocast is as far off"
    rows = [{"comparison": "tiny: fp32", **half}, {"comparison": "tiny: fp32", **row}]
    monkeypatch.setattr(gpu_sections, "_comparisons", lambda bench: iter(rows))
    section = gpu_sections.correctness(None)  # type: ignore[arg-type]
    assert [next(section), next(section)] == rows, "the rows are kept"
    with pytest.raises(AssertionError, match="1 of 2 detections match"):
        next(section)


def test_busy_time_and_pauses_worked_by_hand() -> None:
    spans = [(0.0, 10.0, "a"), (5.0, 8.0, "b"), (20.0, 30.0, "a"), (31.0, 32.0, "c")]
    assert gpu_sections.busy_time(spans) == 21.0
    assert [row["pause_us"] for row in gpu_sections.pauses(spans)] == [10.0, 1.0]
    head, *rest = gpu_sections.busiest(spans, "device")
    assert (head["busy"], head["launches"]) == ("66%", 4)
    assert [(row["kernel"], row["calls"], row["us"]) for row in rest] == [("a", 2, 20.0), ("b", 1, 3.0), ("c", 1, 1.0)]


def test_photographs_are_used_where_they_are(tmp_path: Path, bench: Bench, draw: Callable[[Path], None]) -> None:
    draw(tmp_path / "photographs" / "a.JPG")
    with_photographs = Bench(SMALL, tmp_path, tmp_path / "photographs")
    first, second = with_photographs.pictures([(20, 30), (30, 20)])
    assert first.shape == (3, 20, 30)
    assert second.shape == (3, 30, 20)
    drawn, _ = bench.pictures([(20, 30), (30, 20)])
    assert not torch.equal(first, drawn)


@pytest.fixture
def draw() -> Callable[[Path], None]:
    def save(path: Path) -> None:
        from PIL import Image

        path.parent.mkdir()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path, format="JPEG")

    return save


def test_what_a_command_said_before_its_time_was_over_is_kept() -> None:
    program = "import sys, time; print('one PASSED'); print('late', file=sys.stderr); sys.stdout.flush(); time.sleep(60)"
    code, output, errors = gpu_sections.run_within([sys.executable, "-c", program], 3.0)
    assert (code, output, errors) == ("out of time", "one PASSED\n", "late\n")
    assert gpu_sections.run_within([sys.executable, "-c", "print(1)"], 60.0) == (0, "1\n", "")


def test_a_failure_names_no_path_of_the_machine(bench: Bench) -> None:
    (failure,) = [
        event for event in gpu.run_here(Section("one", "one", breaks_here, 1.0), bench, 1.0) if event.kind == "failed"
    ]
    assert str(gpu.ROOT) not in failure.value
    assert "benchmarks/gpu_sections.py" in failure.value


def breaks_here(bench: Bench) -> Iterator[Row]:
    yield {"value": gpu_sections.fault({})}
