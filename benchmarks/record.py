"""Numbers are files: one CSV a benchmark, one row a measurement, with what it was measured on; and timing helpers.

A row says device, date, commit and versions, so that a figure in the README can be traced to where it came from.
"""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
REPORTS = Path(__file__).parent / "reports"


def record(name: str, row: Mapping[str, object]) -> None:
    """Append a row to ``results/<name>.csv``, after the date, commit, device and versions it was measured with.

    The file's columns are the union of all rows' keys in order of appearance; a row without a column leaves it empty.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    complete = {**environment(), **row}
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    columns = list(dict.fromkeys([*(rows[0] if rows else ()), *complete]))
    partial = path.with_suffix(".csv.partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, complete])
    partial.replace(path)


def report(name: str, title: str, rows: Sequence[Mapping[str, object]], notes: str = "") -> Path:
    """Write ``reports/<date>-<name>.md``: the environment, a table of the rows and what there is to say about them."""
    REPORTS.mkdir(exist_ok=True)
    facts = "\n".join(f"- {key}: {value}" for key, value in environment().items())
    path = REPORTS / f"{environment()['date'][:10]}-{name}.md"
    path.write_text(
        "\n".join(part for part in (f"# {title}", "", facts, "", table(rows), "", notes) if part is not None) + "\n"
    )
    return path


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a Markdown table; its columns are the first row's keys."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def environment() -> dict[str, str]:
    """Date (UTC), commit, device, threads and the versions that a figure depends on."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "device": _device(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The run in the middle."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the range of the middle half of the runs, as a share of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else (self.median,) * 3
        return (high - low) / 2 / self.median


def side_by_side(runs: Mapping[str, Callable[[], object]], repeats: int, warm: bool = True) -> dict[str, Timing]:
    """Time several functions in turn, so that whatever else the machine does meets all of them alike.

    warm: each runs once unmeasured before. CUDA work is waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    if warm:
        for run in runs.values():
            run()
    for _ in range(repeats):
        for name, run in runs.items():
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _commit() -> str:
    """Of this checkout; MASKLAKE_COMMIT tells it where a copy of the files has no history."""
    if told := os.environ.get("MASKLAKE_COMMIT"):
        return told
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{len(names) or '?'} x {names[0] if names else platform.processor() or platform.machine()}"
