"""A driver that is killed, a second driver, Ctrl-C: the same command ends with every image exactly once."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage import Storage
from pipeline.table import open_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

IMAGES = 200  # four blocks, of a second or more each


def written_blocks(table: Path) -> int:
    return sum(not path.name.endswith(".pending.parquet") for path in table.glob("_masklake/*/checkpoint/*.parquet"))


def lease_of(table: Path) -> str:
    """The lease of the table's only run, not of its planning: who writes it now."""
    (lease,) = (path for path in table.glob("_masklake/*/lease") if not path.parent.name.startswith("plan-"))
    return lease.read_text()


def test_killed_refused_and_interrupted_every_image_is_there_once(
    tmp_path: Path, tiny_checkpoint: Path, pictures: Callable[..., Path], start: Callable[..., Any]
) -> None:
    folder, table = pictures(IMAGES), tmp_path / "table"
    command = ("label", folder, table, "--weights", tiny_checkpoint, "--json", "--workers", 1)

    first = start(*command)
    first.wait_until(lambda: written_blocks(table) >= 1)
    code, _ = first.stop(signal.SIGKILL)
    assert code == -signal.SIGKILL
    survived = written_blocks(table)
    assert survived < 4

    second = start(*command)  # at once: on this host nobody waits for the dead driver's lease
    second.wait_until(lambda: f'"pid": {second.process.pid},' in lease_of(table))
    second.process.send_signal(signal.SIGSTOP)  # or it might be done before the rival has started
    rival = start(*command)
    code, _, err = rival.finish()
    second.process.send_signal(signal.SIGCONT)
    assert code == 31, err
    assert f"(process {second.process.pid})" in err
    second.wait_until(lambda: written_blocks(table) > survived)
    code, err = second.stop(signal.SIGINT)
    assert code == 130, err
    assert "masklake: interrupted. The same command goes on where this one stopped.\n" in err

    third = start(*command)
    code, out, err = third.finish()
    assert code == 0, err
    assert "continues" in err
    report = json.loads(out)
    assert (report["images"], report["resumed"]) == (IMAGES, True)
    assert report["labelled_now"] < IMAGES
    rows = open_table(Storage(), str(table)).dataset().to_table(columns=["uri", "status"]).to_pylist()
    assert sorted(row["uri"] for row in rows) == sorted(str(path) for path in folder.iterdir())
    assert {row["status"] for row in rows} == {"ok"}
