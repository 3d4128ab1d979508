"""All that is to be known of a GPU before MaskLake runs on it at night, by one command in under six minutes.

    python -m benchmarks.gpu [--output FOLDER] [--images FOLDER] [--budget-s 340] [--sections NAME ...] [--pretend]

First whether the GPU is right (against the CPU, between precisions and batch sizes, and by the tests marked `gpu`), then how
fast: kernels beside torchvision's and the card's own ceilings, inference by stages, a profile, training steps, host
synchronisations. What each section measures is in `benchmarks.gpu_sections`.

Made for a machine that is borrowed for minutes. Every section has its own process and its own time: one that fails, hangs or
breaks the CUDA context costs nothing but itself. gpu.json in FOLDER is written anew after each row, and the report gpu.md is
made from it. Without --output the JSON goes to benchmarks/results and the dated report to benchmarks/reports.

--pretend runs every section at a small size on a machine without a GPU (tests/pretend_cuda.py). What it prints then says
that the command works and nothing about any GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_sections import FULL, ROOT, SECTIONS, SMALL, Bench, Row, Scale, Section
from benchmarks.record import REPORTS, RESULTS, environment, table

BUDGET_S = 340.0
LEAST_S = 5.0  # a section that gets less does not begin
JOIN_S = 5.0


@dataclass(frozen=True)
class Event:
    """What a section says while it runs: a row, or how it ended ("ok", "failed" with a traceback, "out of time")."""

    kind: str
    value: Any = None


def run_here(section: Section, bench: Bench, limit_s: float) -> Iterator[Event]:
    """A section in this process. Nothing can stop it: for tests and the pretended device."""
    del limit_s
    try:
        for row in section.measure(bench):
            yield Event("row", row)
    except Exception:  # noqa: BLE001  # whatever it is, it is reported as this section's result and the next one runs
        yield Event("failed", traceback.format_exc().replace(f"{ROOT}/", ""))
    else:
        yield Event("ok")


def _serve(orders: Connection, bench: Bench) -> None:
    """The worker: one section after another, until one fails."""
    while True:
        for event in run_here(SECTIONS[orders.recv()], bench, 0.0):
            orders.send(event)
            if event.kind == "failed":  # a fault of a kernel stays with its process: the next section gets a new one
                return


class Worker:
    """Runs sections in a process of its own, and in a new one after a failure or a time-out."""

    def __init__(self, bench: Bench, serve: Callable[[Connection, Bench], None] = _serve, method: str = "spawn") -> None:
        self._bench, self._serve, self._method = bench, serve, method
        self._process: Any = None
        self._pipe: Connection | None = None

    def __call__(self, section: Section, bench: Bench, limit_s: float) -> Iterator[Event]:
        """Events of the section; after ``limit_s`` seconds it is ended."""
        deadline = time.monotonic() + limit_s
        pipe = self._started()
        try:
            pipe.send(section.name)
        except OSError:  # it ended between two sections
            self.close()
            pipe = self._started()
            pipe.send(section.name)
        event = Event("row")
        while event.kind == "row":
            event = self._next(pipe, deadline)
            yield event
        if event.kind != "ok":
            self.close()

    def _started(self) -> Connection:
        if self._pipe is None:
            context: Any = multiprocessing.get_context(self._method)
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=self._serve, args=(theirs, self._bench), daemon=True)
            self._process.start()
            theirs.close()
        return self._pipe

    def _next(self, pipe: Connection, deadline: float) -> Event:
        if not pipe.poll(max(0.0, deadline - time.monotonic())):
            return Event("out of time")
        try:
            event: Event = pipe.recv()
        except EOFError:
            self._process.join(JOIN_S)
            return Event("failed", f"the process ended with exit code {self._process.exitcode}")
        return event

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join(JOIN_S)
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None


Runner = Callable[[Section, Bench, float], Iterator[Event]]


def measure(
    sections: Sequence[Section], bench: Bench, run: Runner, budget_s: float, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run the sections in turn within ``budget_s`` seconds; ``save`` gets the whole document after every row."""
    deadline = time.monotonic() + budget_s
    document: dict[str, Any] = {"environment": environment(), "scale": bench.scale.name, "sections": {}}
    for section in sections:
        entry: dict[str, Any] = {"title": section.title, "status": "running", "seconds": None, "rows": []}
        document["sections"][section.name] = entry
        started = time.monotonic()
        limit = min(section.budget_s, deadline - started)
        if limit < LEAST_S:
            entry["status"] = "not begun: no time was left"
            save(document)
            continue
        print(f"{section.name} ...", file=sys.stderr, flush=True)
        for event in run(section, bench, limit):
            if event.kind == "row":
                entry["rows"].append(event.value)
            else:
                entry["status"] = event.kind
                if event.value is not None:
                    entry["error"] = event.value
            entry["seconds"] = round(time.monotonic() - started, 1)
            save(document)
    return document


def markdown(document: dict[str, Any]) -> str:
    """The document as a page: what was measured on what, then a table for each section."""
    facts = "\n".join(f"- {key}: {value}" for key, value in document["environment"].items())
    lines = [f"# GPU benchmark ({document['scale']})", "", facts]
    if document["scale"] != FULL.name:
        lines += ["", "Small sizes: this shows that the command runs, not how fast a GPU is."]
    for name, entry in document["sections"].items():
        took = f" in {entry['seconds']} s" if entry["seconds"] is not None else ""
        lines += ["", f"## {entry['title']}", "", f"`{name}`: {entry['status']}{took}."]
        for group in _alike(entry["rows"]):
            lines += ["", table(group)]
        if "error" in entry:
            lines += ["", "```", entry["error"].strip(), "```"]
    return "\n".join(lines) + "\n"


def _alike(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows in groups of equal columns: a table each."""
    groups: list[list[Row]] = []
    for row in rows:
        if not groups or list(groups[-1][0]) != list(row):
            groups.append([])
        groups[-1].append(row)
    return groups


def saver(json_path: Path, page_path: Path) -> Callable[[dict[str, Any]], None]:
    """Writes the document and its page; a reader, or the end of the lease, never finds half a file."""

    def save(document: dict[str, Any]) -> None:
        for path, text in ((json_path, json.dumps(document, indent=1, allow_nan=False)), (page_path, markdown(document))):
            partial = path.with_name(path.name + ".partial")
            partial.write_text(text)
            partial.replace(path)

    return save


def outputs(folder: Path | None) -> tuple[Path, Path]:
    """Where the JSON and the page go."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        return folder / "gpu.json", folder / "gpu.md"
    name = f"{environment()['date'][:10]}-gpu"
    return RESULTS / f"{name}.json", REPORTS / f"{name}.md"


def pretended(sections: Sequence[Section], bench: Bench, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Every section, small, on tensors that pretend to be a GPU's."""
    from tests.pretend_cuda import pretend_cuda

    with pretend_cuda():
        return measure(sections, bench, run_here, float("inf"), save)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for gpu.json and gpu.md; default: benchmarks/results and reports")
    parser.add_argument("--images", type=Path, help="folder of JPEGs to use instead of generated pictures")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help=f"seconds for everything (default {BUDGET_S:.0f})")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--pretend", action="store_true", help="small sizes on a pretended device, to try the command")
    parsed = parser.parse_args(arguments)
    if parsed.pretend and parsed.output is None:
        parser.error("--pretend measures nothing: name a folder for its files with --output")
    if not parsed.pretend and not torch.cuda.is_available():
        parser.error("no CUDA device; --pretend --output FOLDER tries the command without one")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the page, and exit with 1 when a section did not end well."""
    options = parse(arguments)
    scale: Scale = SMALL if options.pretend else FULL
    sections = [SECTIONS[name] for name in options.sections]
    json_path, page_path = outputs(options.output)
    save = saver(json_path, page_path)
    with tempfile.TemporaryDirectory(prefix="masklake-gpu-") as scratch:
        bench = Bench(scale, Path(scratch), options.images)
        if options.pretend:
            document = pretended(sections, bench, save)
        else:
            worker = Worker(bench)
            try:
                document = measure(sections, bench, worker, options.budget_s, save)
            finally:
                worker.close()
    with suppress(BrokenPipeError):
        print(markdown(document))
        print(f"written: {json_path} and {page_path}")
    return int(any(entry["status"] != "ok" for entry in document["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
