"""The structure of the code base: which way imports run, what the wheel holds, one exit code an error."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import pipeline.errors
from model.errors import MaskLakeError

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("model.kernels", "model", "pipeline", "jobs")
MAY_IMPORT = {
    "model.kernels": {"model.kernels"},
    "model": {"model", "model.kernels"},
    "pipeline": {"pipeline", "model", "model.kernels"},
    "jobs": {"jobs", "pipeline", "model", "model.kernels"},
}
FOREIGN = {"model": {"ray", "pyarrow", "fsspec", "s3fs", "obstore", "deltalake", "duckdb"}, "pipeline": {"typer"}}


def package_of(module: str) -> str | None:
    return next((name for name in PACKAGES if module == name or module.startswith(name + ".")), None)


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def sources() -> list[Path]:
    return [path for top in ("model", "pipeline", "jobs") for path in sorted((ROOT / top).rglob("*.py"))]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    own = package_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert own is not None
    used = {package_of(name) for name in imports_of(path)} - {None}
    assert used <= MAY_IMPORT[own]
    tops = {name.split(".")[0] for name in imports_of(path)}
    assert not tops & FOREIGN.get(own.split(".")[0], set())
    assert not tops & {"tests", "benchmarks", "examples", "docs", "infra"}


def test_the_kernels_know_torch_and_triton_only() -> None:
    own = {name.split(".")[0] for path in (ROOT / "model/kernels").glob("*.py") for name in imports_of(path)}
    assert own - set(sys.stdlib_module_names) <= {"torch", "triton", "model", "numpy"}


def test_every_error_has_its_own_exit_code() -> None:
    classes = [*all_subclasses(MaskLakeError), MaskLakeError]
    codes = [cls.exit_code for cls in classes]
    assert len(set(codes)) == len(codes)
    assert {0, 2, 130} & set(codes) == set(), "0 is success, 2 a usage error, 130 Ctrl-C"
    assert issubclass(pipeline.errors.TableError, MaskLakeError)


def test_the_documented_exit_codes_are_the_real_ones() -> None:
    table = (ROOT / "docs/exit-codes.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")]
    documented = {row[1]: int(row[0]) for row in rows[1:] if row[1]}
    assert documented == {cls.__name__: cls.exit_code for cls in all_subclasses(MaskLakeError)}


def all_subclasses(cls: type[MaskLakeError]) -> list[type[MaskLakeError]]:
    return [sub for child in cls.__subclasses__() for sub in (child, *all_subclasses(child))]


def test_every_package_is_listed_for_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in sources() if path.name == "__init__.py"}
    assert set(listed) == found


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    uv = Path(sys.executable).with_name("uv")
    build = [uv, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", tmp_path, ROOT]
    subprocess.run([*build, "--quiet"], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"model", "pipeline", "jobs"}
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import jobs.cli, sys; print(jobs.cli.__file__); sys.argv = ['masklake', '--help']; jobs.cli.main()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout
    assert "label" in done.stdout
