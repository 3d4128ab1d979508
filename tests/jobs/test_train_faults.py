"""A training whose driver or worker is killed, one that Ctrl-C ends, and one whose messages are lost."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from masklake.jobs import train
from masklake.jobs.shapes import generate
from masklake.jobs.training import fit
from masklake.jobs.training.messages import Messages
from masklake.jobs.training.options import TrainOptions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def kill_workers() -> None:
    """Kills the processes of Ray Train's workers."""
    actors = ray._private.state.actors().values()
    for actor in actors:
        if actor["State"] == "ALIVE" and "RayTrainWorker" in actor["ActorClassName"]:
            os.kill(actor["Pid"], signal.SIGKILL)


@pytest.mark.faults
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
    assert f"continues after epoch {survived} of 500" in err
    assert f"epoch {survived + 1}/500, step " in err
    assert f"epoch {survived}/500, step " not in err
    assert err.endswith("masklake: interrupted. Run the same command again to continue after the last complete epoch.\n")
    assert "Traceback" not in err


@pytest.mark.faults
def test_a_killed_worker_is_said_and_changes_no_byte_of_the_model(tmp_path: Path) -> None:
    generate(tmp_path / "data", 6, 96, seed=1)

    def trained(name: str, say: Callable[[str], None]) -> bytes:
        options = TrainOptions(
            train=str(tmp_path / "data" / "instances.json"),
            output=str(tmp_path / "runs"),
            name=name,
            threads=1,
            recipe={"epochs": 3, "batch_size": 2},
        )
        return Path(train.run(options, say).checkpoint).read_bytes()

    lines: list[str] = []

    def killing(line: str) -> None:
        lines.append(line)
        if line.startswith("epoch 2/3, step ") and not said("again"):
            kill_workers()

    def said(words: str) -> list[str]:
        return [line for line in lines if words in line]

    try:
        assert trained("disturbed", killing) == trained("undisturbed", lines.append)
    finally:
        ray.shutdown()
    [line] = said("starts again")
    assert line.startswith("worker 0 ended (")
    assert line.endswith("; training starts again (restart 1 of 2) after the last complete epoch")
    assert said("the worker is up, continuing after epoch ")


@pytest.mark.faults
def test_a_training_whose_messages_are_lost_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(tmp_path / "data", 4, 96, seed=1)
    actors: list[Any] = []
    lines: list[str] = []

    def started() -> Any:
        actors.append(ray.remote(num_cpus=0)(Messages).remote())  # as it ends with its node: it does not come back
        return actors[-1]

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith("the worker is up"):
            ray.kill(actors[0])

    monkeypatch.setattr(fit, "start_messages", started)
    options = TrainOptions(
        train=str(tmp_path / "data" / "instances.json"),
        output=str(tmp_path / "runs"),
        name="lost",
        recipe={"epochs": 2, "batch_size": 2},
    )
    try:
        report = train.run(options, say)
    finally:
        ray.shutdown()
    assert report.epochs == 2
    assert Path(report.curves).stat().st_size
    assert Path(report.checkpoint).stat().st_size
    after = lines[next(number for number, line in enumerate(lines) if line.startswith("the worker is up")) + 1 :]
    assert not [line for line in after if "step" in line], "the messages were lost before the first step"
