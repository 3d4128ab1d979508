"""The examples in README.md and docs are true: each Python block runs as it stands."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from masklake.jobs.shapes import generate
from tests.masklake.conftest import write_table

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str) -> list[str]:
    """The Python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def needs_ray(block: str) -> bool:
    return "masklake.label(" in block or "masklake.train(" in block


PAGES = ("README.md", "docs/python.md", "docs/labelling.md")


@pytest.fixture
def place(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the examples name, apart from a table."""
    truth = generate(tmp_path / "shapes", 4, size=96)
    coco = json.loads(truth.read_text())
    for number, row in enumerate(coco["images"]):
        (truth.parent / "images" / row["file_name"]).rename(truth.parent / "images" / f"{number:04d}.jpg")
        row["file_name"] = f"{number:04d}.jpg"
    truth.write_text(json.dumps(coco))
    shutil.copy(checkpoint, tmp_path / "detector.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_examples_that_read_and_predict(place: Path) -> None:
    write_table(place / "labels", {place / "shapes/images/0000.jpg": [0.9, 0.3]})
    quick = [block for page in PAGES for block in blocks(page) if not needs_ray(block)]
    assert len(quick) == 4
    for block in quick:
        exec(compile(block, "example", "exec"), {})
    assert (place / "0000-instances.png").is_file()


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(900)
def test_all_examples_in_order(place: Path) -> None:
    script = place / "example.py"
    parts = [*blocks("docs/python.md"), *blocks("README.md"), *blocks("docs/labelling.md")]
    assert sum(map(needs_ray, parts)) == 3
    script.write_text("\n".join(parts))
    done = subprocess.run([sys.executable, script], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "{'ok': 4" in done.stdout
    assert (place / "training" / "first" / "model.safetensors").is_file()
