"""The command line as a whole: fast to start, one line an error, no traceback."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "ray", "duckdb", "pyarrow", "matplotlib", "deltalake")


def run(*arguments: str, code: str = "from jobs.cli import main; main()") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys, jobs.cli; print([name for name in {HEAVY} if name in sys.modules])"
    assert run(code=code).stdout.strip() == "[]"


def test_an_error_is_one_line_and_its_exit_code() -> None:
    done = run("convert", "nowhere.pth", "out.safetensors", "--preset", "no_such_preset")
    assert done.returncode == 10
    assert done.stderr.startswith("masklake: error: ")
    assert "tiny" in done.stderr, "the message lists the known presets"
    assert "Traceback" not in done.stderr


def test_wrong_usage_is_exit_code_2() -> None:
    assert run("convert").returncode == 2


def test_version() -> None:
    assert run("--version").stdout.startswith("masklake ")
