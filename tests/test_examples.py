"""The examples' own scripts end in a line for a wrong input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "nuclei.py"


def test_nuclei_names_a_source_that_is_missing_or_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "empty.json").touch()
    for name, words in (("nowhere", "nowhere does not exist; give the unpacked"), ("empty.json", "JSONDecodeError")):
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(tmp_path / name), "--output", str(tmp_path / "out")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert words in done.stderr
        assert "Traceback" not in done.stderr
