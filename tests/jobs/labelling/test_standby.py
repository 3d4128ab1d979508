"""Short runs without Ray. Each test has a process of its own: a fork of a process that has used torch's threads may hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from masklake.jobs.labelling.plan import RETRY_ROWS
from masklake.jobs.labelling.standby import Standby
from masklake.model.config import PredictOptions
from masklake.model.detector import load_detector
from masklake.pipeline.labelling.labeller import Labeller, LabelSpec
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.schema import MANIFEST_SCHEMA

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux alone")]

POISONED = """
import os, sys
from masklake.jobs import label
from masklake.jobs.labelling.standby import started
from masklake.pipeline.labelling import labeller

decode = labeller.decode

def deadly(data, *rest):
    if b"poison" in data:
        os._exit(9)
    return decode(data, *rest)

labeller.decode = deadly  # Ray's workers do not have it
with started() as standby:
    source, table, weights = sys.argv[1:]
    report = label.run(label.options(input={"uri": source}, table=table, weights=weights), print, standby)
print(report.statuses["ok"], "ok")
"""

WAITING = """
import time
from masklake.jobs.labelling.standby import started

with started() as standby:
    print(standby._pid, flush=True)
    time.sleep(600)
"""


def test_a_short_run_starts_no_ray_and_labels_as_ever(
    tmp_path: Path, pictures: Callable[..., Path], tiny_checkpoint: Path, start: Callable[..., Any]
) -> None:
    folder = pictures(RETRY_ROWS - 1)
    (folder / "broken.jpg").write_bytes(b"no image")
    sessions = tmp_path / "ray"
    command = ("label", folder, tmp_path / "table", "--weights", tiny_checkpoint, "--json", "--max-failed", 1)
    code, out, err = start(*command, environment={"RAY_TMPDIR": str(sessions)}).finish()
    assert code == 0, err
    assert not sessions.exists()
    report = json.loads(out)
    assert {name: count for name, count in report["statuses"].items() if count} == {"ok": 7, "decode_error": 1}
    assert "8/8" in err
    assert "failed=1" in err

    [file] = (tmp_path / "table").glob("run=*/*.parquet")
    found = pq.read_table(file, partitioning=None)
    spec = LabelSpec(Storage(), report["model_id"], report["label_id"], PredictOptions(), torch_threads=1)
    labeller = Labeller(spec, load_detector(tiny_checkpoint.read_bytes(), device="cpu"))
    [manifest] = (tmp_path / "table" / "_masklake").glob("*/images.manifest")
    expected = labeller(pq.read_table(manifest).cast(MANIFEST_SCHEMA))
    assert found.drop_columns("labelled_at").equals(expected.cast(found.schema).drop_columns("labelled_at"))


@pytest.mark.faults
def test_rays_workers_take_over_if_the_process_ends(
    tmp_path: Path, pictures: Callable[..., Path], tiny_checkpoint: Path
) -> None:
    folder = pictures(3)
    with (folder / "001.jpg").open("ab") as file:
        file.write(b"poison")
    arguments = [sys.executable, "-c", POISONED, folder, tmp_path / "table", tiny_checkpoint]
    lines = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "3 images were lost with their workers; they run again, 1 at a time" in lines
    assert lines[-1] == "3 ok"


def test_a_process_that_has_ended_gives_no_answer() -> None:
    class Ended:
        def send(self, value: object) -> None:
            raise BrokenPipeError

        def recv(self) -> object:
            raise EOFError

    standby = Standby(Ended(), 0)  # type: ignore[arg-type]
    standby.load(b"", "cpu")
    assert standby.label(None, lambda images, failed: None) is None  # type: ignore[arg-type]


def test_the_process_ends_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2]:
        time.sleep(0.05)  # the limit is the test's own
