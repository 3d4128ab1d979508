"""The structure of the code base: the direction of imports, the content of the wheel, one exit code per error."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from masklake.model.errors import MaskLakeError
from masklake.pipeline.errors import TableError

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("model", "pipeline", "jobs")
LAYERS = (
    ("model.kernels",),
    ("model",),
    ("pipeline.errors", "pipeline.blocks"),
    ("pipeline.storage",),
    ("pipeline.inputs",),
    ("pipeline.images",),
    ("pipeline.coco",),
    ("pipeline.table",),
    ("pipeline.results",),
    ("pipeline.labelling", "pipeline.training"),
    ("jobs",),
    ("masklake",),
)
"""Each imports from itself and from the layers above it in this list."""
FOREIGN = {"model": {"ray", "pyarrow", "fsspec", "s3fs", "obstore", "deltalake", "duckdb"}, "pipeline": {"typer"}}


def layer_of(module: str) -> tuple[int, str] | None:
    """The layer's number and the room, of a module's name without `masklake.`."""
    found = ((level, name) for level, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}."))
    return next(found, None)


def own_imports(path: Path) -> set[str]:
    """The project's names that a file imports, as `name_of` gives them."""
    return {own_name(name) for name in imports_of(path) if name.startswith("masklake.")}


def own_name(name: str) -> str:
    """A name without `masklake.`, where it is of one of the three folders and not of the public API."""
    inside = name.removeprefix("masklake.")
    return inside if inside.split(".")[0] in TOPS else name


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def sources() -> list[Path]:
    return [*sorted((ROOT / "masklake").glob("*.py")), *(path for top in TOPS for path in sorted((ROOT / top).rglob("*.py")))]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    module = name_of(path)
    tops = {name.split(".")[0] for name in imports_of(path)}
    assert not tops & {*TOPS, "tests", "benchmarks", "examples", "docs", "infra"}, "the import name is masklake"
    assert not tops & FOREIGN.get(module.split(".")[0], set())
    if module == "pipeline":
        return
    own = layer_of(module)
    assert own is not None, "each module of pipeline/ is in a room"
    for used in own_imports(path):
        layer = layer_of(used)
        assert layer is None or layer[0] < own[0] or layer == own, f"{module} imports {used}"


def test_no_imports_run_in_a_circle() -> None:
    modules = {name_of(path): path for path in sources() if path.name != "__init__.py"}
    TopologicalSorter({name: own_imports(path) & set(modules) - {name} for name, path in modules.items()}).prepare()


DETECTOR_USERS = ("pipeline/labelling", "pipeline/results", "pipeline/table", "pipeline/training/proposer.py")
DETECTOR_USERS += ("jobs/label.py", "jobs/labelling", "jobs/propose.py", "jobs/evaluate.py", "masklake/prediction.py")


def test_labelling_evaluation_and_proposing_know_no_certain_detector() -> None:
    """They know `model.detector`, and values that any detector has; how Mask R-CNN is built, loaded and run is not theirs."""
    places = [ROOT / place for place in DETECTOR_USERS]
    files = [path for place in places for path in (place.rglob("*.py") if place.is_dir() else [place])]
    known = {
        "coco_categories",
        "config",
        "detector",
        "devices",
        "errors",
        "fields",
        "identity",
        "instances",
        "masks",
        "wording",
    }
    for path in files:
        used = {name for name in own_imports(path) if name.startswith("model.")}
        strange = {name for name in used if name.split(".")[1] not in known} | used & {"model.config.ModelConfig"}
        assert not strange, f"{path.relative_to(ROOT)} imports {', '.join(sorted(strange))}"
    assert len(files) > 15


def test_no_rooms_import_each_other() -> None:
    """A file outside of any room counts as one."""
    graph: dict[str, set[str]] = {}
    for path in sources():
        room = room_of(name_of(path))
        graph.setdefault(room, set()).update({room_of(used) for used in own_imports(path) if is_module(used)} - {room})
    TopologicalSorter(graph).prepare()


def is_module(name: str) -> bool:
    place = ROOT / name.replace(".", "/")
    return place.with_suffix(".py").exists()


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_the_kernels_know_torch_and_triton_only() -> None:
    own = {name.split(".")[0] for path in (ROOT / "model/kernels").glob("*.py") for name in imports_of(path)}
    assert own - set(sys.stdlib_module_names) <= {"torch", "triton", "masklake", "numpy"}


def test_every_error_has_its_own_exit_code() -> None:
    classes = [*all_subclasses(MaskLakeError), MaskLakeError]
    codes = [cls.exit_code for cls in classes]
    assert len(set(codes)) == len(codes)
    assert {0, 2, 130} & set(codes) == set(), "0 is success, 2 a usage error, 130 Ctrl-C"
    assert issubclass(TableError, MaskLakeError)


def test_the_documented_exit_codes_are_the_real_ones() -> None:
    table = (ROOT / "docs/exit-codes.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")]
    documented = {row[1]: int(row[0]) for row in rows[1:] if row[1]}
    assert documented == {cls.__name__: cls.exit_code for cls in all_subclasses(MaskLakeError)}


def all_subclasses(cls: type[MaskLakeError]) -> list[type[MaskLakeError]]:
    return [sub for child in cls.__subclasses__() for sub in (child, *all_subclasses(child))]


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a `build/` that is left from another day would add its modules
    for folder in ("masklake", *TOPS):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    uv = Path(sys.executable).with_name("uv")
    build = [uv, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", tmp_path, source]
    subprocess.run([*build, "--quiet"], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"masklake"}
    expected = {f"masklake/{str(path.relative_to(ROOT)).removeprefix('masklake/')}" for path in sources()}
    assert {name for name in names if ".dist-info" not in name} == expected | {"masklake/py.typed"}
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    for other in TOPS:  # another distribution's packages of these names stand beside it
        (tmp_path / "site" / other).mkdir()
        (tmp_path / "site" / other / "__init__.py").write_text("OTHER = True")
    code = (
        "import sys, model, pipeline, jobs; assert model.OTHER and pipeline.OTHER and jobs.OTHER; "
        "from masklake.jobs import cli; print(cli.__file__); sys.argv = ['masklake', '--help']; cli.main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout
    assert "label" in done.stdout


def programs(path: Path) -> list[ast.ImportFrom]:
    """The project's imports in programs that a test holds as text, and starts in a process of its own."""
    texts = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
    lines = (line.strip(" ;") for text in texts if isinstance(text, str) for line in text.split("\n"))
    begun = (part for line in lines for part in re.findall(r"from masklake[\w.]* import [\w, ]+", line))
    return [node for part in begun for node in ast.parse(part.rstrip(" ,")).body if isinstance(node, ast.ImportFrom)]


def test_programs_within_tests_import_what_there_is() -> None:
    """Linters and mypy do not see them, and some run only with `make test-faults`."""
    checked = 0
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in programs(path):
            target = ROOT / str(node.module).removeprefix("masklake.").replace(".", "/")
            if node.module == "masklake" or str(node.module).split(".")[1] not in TOPS:
                continue
            file = target / "__init__.py" if target.is_dir() else target.with_suffix(".py")
            for name in (alias.name for alias in node.names):
                known = re.search(rf"\b{name}\b", file.read_text()) or (target / name).exists()
                assert known or (target / f"{name}.py").exists(), f"{path.relative_to(ROOT)}: {node.module} has no {name}"
                checked += 1
    assert checked > 20
