"""A user's own `model.py`, `pipeline.py` and `jobs/` beside their script and MaskLake do not take each other's place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from masklake.jobs.shapes import generate

pytestmark = pytest.mark.slow

OWN = {"model.py": "OWNER = 'user'\n", "pipeline.py": "OWNER = 'user'\n", "jobs/__init__.py": "OWNER = 'user'\n"}

CHECK = """
import jobs, model, pipeline
assert jobs.OWNER == model.OWNER == pipeline.OWNER == "user"
"""

RUN = """
if __name__ == "__main__":
    import sys
    import masklake
    from masklake.jobs import label

    address = sys.argv[1] or None
    trained = masklake.train("shapes/instances.json", "training", name="own", recipe={"epochs": 1}, address=address)
    report = label.run(
        label.options(input={"uri": "shapes/images"}, table="labels", weights=trained.checkpoint, address=address)
    )
    assert report.statuses["ok"] == 4, report
    assert masklake.open_table("labels").query("SELECT count(*) AS images FROM images").to_arrow()["images"].to_pylist() == [4]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's project."""
    for name, content in OWN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def run(folder: Path, script: str, *arguments: str) -> None:
    (folder / "script.py").write_text(script)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "script.py", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_both_are_imported_in_one_process(folder: Path) -> None:
    """What the driver imports and what Ray's workers unpickle."""
    run(folder, CHECK + "from masklake.jobs import label\nimport masklake.pipeline.labelling.labeller\n")


@pytest.fixture(params=["in this process", "on a cluster"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """Empty for an embedded Ray, else the address of a cluster of two nodes on this machine."""
    if request.param == "in this process":
        yield ""
        return
    from ray.cluster_utils import Cluster

    node = {"object_store_memory": 150 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, **node})
    try:
        cluster.add_node(num_cpus=2, **node)
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_project_with_such_names_trains_and_labels(folder: Path, address: str) -> None:
    generate(folder / "shapes", 4, size=96)
    run(folder, CHECK + RUN, address)
