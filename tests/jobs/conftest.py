"""Fixtures of the tests of jobs: a tiny model's checkpoint, folders of small pictures, and commands in their own processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from masklake.jobs.cli import main
from masklake.model import create_model, save_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `tiny` with seeded random weights."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    torch.manual_seed(0)
    save_checkpoint(create_model("tiny"), path)
    return path


def draw(path: Path, seed: int, size: tuple[int, int]) -> None:
    """Blocks of colour, so that a random model finds edges to look at."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST).save(path, quality=90)


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of `count` JPEGs in two shapes."""

    def make(count: int, name: str = "images", first: int = 0) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for number in range(first, first + count):
            draw(folder / f"{number:03d}.jpg", number, (96, 64) if number % 2 else (64, 96))
        return folder

    return make


class Command:
    """A `masklake` command as a user starts it, in a process of its own."""

    def __init__(self, *arguments: object, environment: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "masklake.jobs.cli", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )

    def wait_until(self, ready: Callable[[], bool], limit_s: float = 400) -> None:
        """Return as soon as `ready` holds; fail when the command ends before, or the limit is over."""
        deadline = time.monotonic() + limit_s
        while not ready():
            if self.process.poll() is not None:
                pytest.fail(f"the command ended before its moment: {self.process.communicate()}")
            assert time.monotonic() < deadline, "the moment never came"
            time.sleep(0.02)

    def stop(self, signal_number: int) -> tuple[int, str]:
        """Send a signal; exit code and stderr."""
        self.process.send_signal(signal_number)
        return self.finish()[0::2]

    def finish(self) -> tuple[int, str, str]:
        """Wait for the end; exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=600)
        return self.process.returncode, out, err


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    """Start `masklake` commands; those that a failed test leaves behind are ended."""
    commands: list[Command] = []

    def begin(*arguments: object, environment: Mapping[str, str] | None = None) -> Command:
        commands.append(Command(*arguments, environment=environment))
        return commands[-1]

    yield begin
    for command in commands:
        if command.process.poll() is None:
            command.process.kill()
            command.process.communicate()


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder on this machine, then one in a bucket."""
    return str(tmp_path / "a b%") if request.param == "local" else str(request.getfixturevalue("s3").uri("a b%"))


@pytest.fixture
def masklake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["masklake", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run
