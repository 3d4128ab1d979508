"""A training driver that is killed, and one that Ctrl-C ends: the same command goes on after the last complete epoch."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.shapes import generate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_killed_between_epochs_it_goes_on_where_it_was_till_ctrl_c(tmp_path: Path, start: Callable[..., Any]) -> None:
    generate(tmp_path / "data", 4, 96, seed=1)
    run = tmp_path / "runs" / "night"
    command = ("train", tmp_path / "data" / "instances.json", "-o", tmp_path / "runs", "--name", "night", "--json")
    options = ("--epochs", 500, "--batch-size", 2)

    def last_epoch() -> int:
        path = run / "latest.json"
        return int(json.loads(path.read_text())["epoch"]) if path.exists() else 0

    first = start(*command, *options)
    first.wait_until(lambda: last_epoch() >= 1)
    code, _ = first.stop(signal.SIGKILL)
    assert code == -signal.SIGKILL
    while time.time() - (run / "latest.json").stat().st_mtime < 3:  # its worker lives a little longer and may end an epoch
        time.sleep(0.1)
    survived = last_epoch()
    assert not (run / "metrics.json").exists()

    second = start(*command, *options)
    second.wait_until(lambda: last_epoch() >= survived + 2)  # the second line is out, the first is shown
    code, err = second.stop(signal.SIGINT)
    assert code == 130, err
    assert f"goes on after epoch {survived} of 500" in err
    assert f"epoch {survived + 1}/500, step " in err
    assert f"epoch {survived}/500, step " not in err
    assert err.endswith("masklake: interrupted. The same command goes on after the last complete epoch.\n")
    assert "Traceback" not in err
