"""A training driver that dies: the same command goes on after the last complete epoch."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.shapes import generate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_ctrl_c_ends_it_in_one_line(tmp_path: Path, start: Callable[..., Any]) -> None:
    generate(tmp_path / "data", 12, 96, seed=1)
    run = start("train", tmp_path / "data" / "instances.json", "-o", tmp_path / "runs", "--name", "day", "--epochs", 500)
    run.wait_until(lambda: (tmp_path / "runs" / "day" / "latest.json").exists())
    code, err = run.stop(signal.SIGINT)
    assert code == 130, err
    assert err.endswith("masklake: interrupted. The same command goes on where this one stopped.\n")
    assert "Traceback" not in err


def test_killed_between_epochs_it_goes_on_where_it_was(tmp_path: Path, start: Callable[..., Any]) -> None:
    generate(tmp_path / "data", 12, 96, seed=1)
    run = tmp_path / "runs" / "night"
    command = ("train", tmp_path / "data" / "instances.json", "-o", tmp_path / "runs", "--name", "night", "--json")
    options = ("--epochs", 3, "--batch-size", 2)

    first = start(*command, *options)
    first.wait_until(lambda: (run / "latest.json").exists())
    code, _ = first.stop(signal.SIGKILL)
    assert code == -signal.SIGKILL
    survived = json.loads((run / "latest.json").read_text())["epoch"]
    assert not (run / "metrics.json").exists()

    second = start(*command, *options)
    code, out, err = second.finish()
    assert code == 0, err
    assert f"goes on after epoch {survived} of 3" in err
    report = json.loads(out)
    assert report["resumed_from"] == survived >= 1
    history = json.loads((run / "metrics.json").read_text())["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3]
