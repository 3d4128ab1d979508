"""Images a second of `masklake label`, start to commit, beside a plain Ray Data + torchvision + pycocotools script.

    python -m benchmarks.label                     # drawn images, everywhere
    python -m benchmarks.label --images val2017/   # real photographs

Both label the same files with the same seeded weights (`benchmarks.seeded`), at about 10 and at 100 detections an image. Each
system runs on a few and on many images, in turn; the slope between the two is its rate, free of start-up, which is reported
beside it. The detections of both are compared: boxes within 0.01 px, scores within 1e-4, equal RLE.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from torchvision.io import decode_image
from torchvision.models.detection import maskrcnn_resnet50_fpn

from benchmarks.record import record, report
from benchmarks.seeded import seeded_state_dict
from masklake.jobs.shapes import generate
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.table import open_table

PRESET = "maskrcnn_resnet50_fpn"
SYSTEMS = ("plain", "masklake fp32", "masklake bf16")
BOX_TOLERANCE, SCORE_TOLERANCE = 0.01, 1e-4


@dataclass(frozen=True)
class Weights:
    """The same weights for both systems."""

    state_dict: Path
    checkpoint: Path


def main() -> None:
    """Measure, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of JPEGs; default: drawn shapes of 640 pixels")
    parser.add_argument("--few", type=int, default=16)
    parser.add_argument("--many", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--detections", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="masklake-bench-") as scratch:
        few, many = image_folders(arguments.images, arguments.few, arguments.many, Path(scratch))
        rows = []
        for detections in arguments.detections:
            weights = make_weights(few, detections, Path(scratch) / f"weights-{detections}")
            rows += measure(few, many, weights, detections, arguments.repeats, arguments.systems, Path(scratch))
    print(f"report: {report('label', 'masklake label against a plain Ray Data script', rows).name}")


def image_folders(source: Path | None, few: int, many: int, scratch: Path) -> tuple[Path, Path]:
    """Two folders of copies: the first `few` images of `source`, and the first `many`."""
    if source is None:
        source = generate(scratch / "shapes", many, size=640, seed=7).parent / "images"
    files = sorted(source.glob("*.jpg"))
    if len(files) < many:
        raise SystemExit(f"{source} holds {len(files)} JPEGs, --many asks for {many}")
    folders = scratch / "few", scratch / "many"
    for folder, count in zip(folders, (few, many), strict=True):
        folder.mkdir()
        for file in files[:count]:
            shutil.copy(file, folder)
    return folders


def make_weights(images: Path, detections: int, folder: Path) -> Weights:
    """Seeded torchvision weights tuned to `detections` an image of `images`, and the checkpoint converted from them."""
    folder.mkdir()
    tuning = [decode_image(str(file), "RGB") / 255 for file in sorted(images.iterdir())]
    weights = Weights(folder / "state_dict.pth", folder / "model.safetensors")
    torch.save(seeded_state_dict(maskrcnn_resnet50_fpn, tuning, detections), weights.state_dict)
    masklake("convert", str(weights.state_dict), str(weights.checkpoint), "--preset", PRESET)
    return weights


def masklake(*arguments: str) -> None:
    """Run the command line in a process of its own, as a user does."""
    subprocess.run([sys.executable, "-m", "masklake.jobs.cli", *arguments], check=True, stdout=subprocess.DEVNULL)


def run_once(system: str, images: Path, weights: Weights, output: Path) -> float:
    """Label `images` into a fresh `output`; wall seconds of the whole process."""
    shutil.rmtree(output, ignore_errors=True)
    started = time.perf_counter()
    if system == "plain":
        plain = [sys.executable, "-m", "benchmarks.plain_label", str(images), str(output), "--weights", str(weights.state_dict)]
        subprocess.run(plain, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    else:
        precision = system.split()[1]
        masklake("label", str(images), str(output), "--weights", str(weights.checkpoint), "--precision", precision)
    return time.perf_counter() - started


def measure(
    few: Path, many: Path, weights: Weights, detections: int, repeats: int, systems: Sequence[str], scratch: Path
) -> list[dict[str, Any]]:
    """Runs the systems in turn; prints, records and returns a row for each."""
    seconds: dict[str, list[tuple[float, float]]] = {system: [] for system in systems}
    outputs = {system: scratch / f"out-{detections}" / system.replace(" ", "-") for system in systems}
    for _ in range(repeats):
        for system in systems:
            pair = run_once(system, few, weights, outputs[system]), run_once(system, many, weights, outputs[system])
            seconds[system].append(pair)
            print(f"{detections} detections, {system}: {pair[0]:.1f} s, {pair[1]:.1f} s", flush=True)
    extra = len(list(many.iterdir())) - len(list(few.iterdir()))
    rates = {system: [extra / (long - short) for short, long in pairs] for system, pairs in seconds.items()}
    found = {system: read_output(system, outputs[system]) for system in systems}
    rows = []
    for system in systems:
        row: dict[str, Any] = {
            "system": system,
            "detections_wanted": detections,
            "detections_found": round(float(np.mean([len(rows["scores"]) for rows in found[system].values()])), 1),
            "images": len(found[system]),
            "images_per_s": round(statistics.median(rates[system]), 4),
            "whole_process_s": round(statistics.median(long for _, long in seconds[system]), 2),
            "repeats": repeats,
        }
        if "plain" in systems:
            row["ratio"] = round(statistics.median(np.divide(rates[system], rates["plain"]).tolist()), 3)
            row.update(agreement(found["plain"], found[system]))
        print(json.dumps(row), flush=True)
        record("label", row)
        rows.append(row)
    return rows


def read_output(system: str, output: Path) -> dict[str, dict[str, Any]]:
    """Detections by file name: boxes (N, 4), scores (N,), labels and rles."""
    if system == "plain":
        rows = pyarrow.parquet.read_table(output).to_pylist()
        return {Path(row["uri"]).name: {**row, "boxes": np.array(row["boxes"]).reshape(-1, 4)} for row in rows}
    rows = open_table(Storage(), str(output)).dataset().to_table().to_pylist()
    return {Path(row["uri"]).name: flat(row) for row in rows}


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A table row in the plain script's columns."""
    instances = row["instances"]
    boxes = [[instance["box"][side] for side in ("x1", "y1", "x2", "y2")] for instance in instances]
    return {
        "boxes": np.array(boxes).reshape(-1, 4),
        "scores": [instance["score"] for instance in instances],
        "labels": [instance["category_id"] for instance in instances],
        "rles": row["rles"],
    }


def agreement(theirs: Mapping[str, dict[str, Any]], ours: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """Share of their detections that have one of ours within the tolerances, and of those the share with the equal RLE."""
    total = close = equal = 0
    for name, plain in theirs.items():
        mine = ours[name]
        total += len(plain["scores"])
        for index, box in enumerate(plain["boxes"]):
            fits = [
                other
                for other in range(len(mine["scores"]))
                if mine["labels"][other] == plain["labels"][index]
                and abs(mine["scores"][other] - plain["scores"][index]) <= SCORE_TOLERANCE
                and np.abs(mine["boxes"][other] - box).max() <= BOX_TOLERANCE
            ]
            close += bool(fits)
            equal += any(mine["rles"][other] == plain["rles"][index] for other in fits)
    return {"boxes_equal": round(close / max(total, 1), 4), "rles_equal": round(equal / max(total, 1), 4)}


if __name__ == "__main__":
    main()
