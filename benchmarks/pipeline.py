"""What the labelling run itself costs: a model that costs nothing, beside a bare decode loop, and a device of fixed speed.

    python -m benchmarks.pipeline                        # drawn images of 640 x 480
    python -m benchmarks.pipeline --images val2017/      # real photographs

Three cases, in turn in one run:

- `bare loop`: threads, one per core, that read and decode the files. Nothing that decodes on this machine is faster.
- `null`: `masklake label` with a detector that answers at once. The slope between a few and many images is its rate at steady
  state; its share of the bare loop is what is left of the machine for decoding.
- `device`: the same with a detector that takes 4 ms per image, which the host must keep busy: its share of 250 images/s.
- `short`: the whole command on eight images.

The files are repeated under other names until there are enough (hard links).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import null_detector
from benchmarks.record import record, report
from masklake.jobs.shapes import generate
from masklake.pipeline.images.decode import decode

DEVICE_S = 0.004
SHORT = 8


def main() -> None:
    """Measure, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of JPEGs; default: drawn shapes of 640 pixels")
    parser.add_argument("--few", type=int, default=2_000)
    parser.add_argument("--many", type=int, default=12_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, help="of the null case; default: one per core")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="masklake-bench-") as name:
        scratch = Path(name)
        source = arguments.images or generate(scratch / "shapes", 64, size=640, seed=7).parent / "images"
        files = sorted(source.glob("*.jpg"))
        folders = {count: linked(files, scratch / f"images-{count}", count) for count in (SHORT, arguments.few, arguments.many)}
        null_detector.install(scratch / "site")
        for seconds in (0.0, DEVICE_S):
            (scratch / f"{seconds:g}.safetensors").write_bytes(null_detector.checkpoint(seconds))
        rows = measure(arguments, folders, scratch)
    print(f"report: {report('pipeline', 'What the labelling run itself costs', rows).name}")


def linked(files: list[Path], folder: Path, count: int) -> Path:
    """Returns a folder of `count` hard links to copies of the files, repeated."""
    kept = folder.parent / "kept"
    kept.mkdir(exist_ok=True)
    copies = [Path(shutil.copy(file, kept)) for file in files]
    folder.mkdir()
    for number in range(count):
        os.link(copies[number % len(copies)], folder / f"{number:08d}.jpg")
    return folder


def measure(arguments: argparse.Namespace, folders: dict[int, Path], scratch: Path) -> list[dict[str, Any]]:
    """Runs the cases in turn; prints, records and returns a row for each."""
    rates: dict[str, list[float]] = {"bare loop": [], "null": [], "device": []}
    seconds: list[float] = []
    few, many = arguments.few, arguments.many
    for _ in range(arguments.repeats):
        rates["bare loop"].append(bare_loop(folders[few]))
        for case, device_s, workers in (("null", 0.0, arguments.workers), ("device", DEVICE_S, 1)):
            spent = [label(folders[count], scratch, device_s, workers) for count in (few, many)]
            rates[case].append((many - few) / (spent[1] - spent[0]))
            print(f"{case}: {rates[case][-1]:.0f} images/s ({spent[0]:.1f} s, {spent[1]:.1f} s)", flush=True)
        seconds.append(label(folders[SHORT], scratch, 0.0, None))
    limits = {"null": statistics.median(rates["bare loop"]), "device": 1 / DEVICE_S}
    rows: list[dict[str, Any]] = []
    for case, found in rates.items():
        rate = statistics.median(found)
        share = {"share": round(rate / limits[case], 3)} if case in limits else {}
        rows.append({"case": case, "images_per_s": round(rate, 1), "few": few, "many": many, "repeats": len(found), **share})
    rows.append({"case": "short", "whole_process_s": round(statistics.median(seconds), 2), "repeats": len(seconds)})
    for row in rows:
        print(json.dumps(row), flush=True)
        record("pipeline", row)
    return [{"case": "", "images_per_s": "", "share": "", "whole_process_s": "", **row} for row in rows]


def bare_loop(folder: Path) -> float:
    """Images per second of threads that only read and decode."""
    files = sorted(folder.iterdir())
    started = time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(lambda file: decode(file.read_bytes()), files):
            pass
    rate = len(files) / (time.perf_counter() - started)
    print(f"bare loop: {rate:.0f} images/s", flush=True)
    return rate


def label(folder: Path, scratch: Path, device_s: float, workers: int | None) -> float:
    """Labels a folder into a fresh table with the command line; returns the wall seconds of the whole process."""
    table = scratch / "table"
    shutil.rmtree(table, ignore_errors=True)
    command = [sys.executable, "-m", "masklake.jobs.cli", "label", str(folder), str(table)]
    command += ["--weights", str(scratch / f"{device_s:g}.safetensors")]
    command += [] if workers is None else ["--workers", str(workers)]
    started = time.perf_counter()
    subprocess.run(
        command,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(scratch / "site")},
    )
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
