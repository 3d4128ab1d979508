"""A driver or a node that is killed, a second driver, Ctrl-C, a store that refuses: the same command ends with every image
exactly once, and none of it is an image's fault."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.table import open_table
from tests.s3_proxy import Rule

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

IMAGES = 200  # four blocks, of a second or more each


def written_blocks(table: Path) -> int:
    return len(list(table.glob("run=*/part-*.parquet")))


def lease_of(table: Path) -> str:
    """The lease of the table's only run, not of its planning: who writes it now."""
    (lease,) = (path for path in table.glob("_masklake/*/lease") if not path.parent.name.startswith("plan-"))
    return lease.read_text()


def test_killed_refused_and_interrupted_every_image_is_there_once(
    tmp_path: Path, tiny_checkpoint: Path, pictures: Callable[..., Path], start: Callable[..., Any]
) -> None:
    folder, table = pictures(IMAGES), tmp_path / "table"
    command = ("label", folder, table, "--weights", tiny_checkpoint, "--json", "--workers", 1)

    first = start(*command)
    first.wait_until(lambda: written_blocks(table) >= 1)
    code, _ = first.stop(signal.SIGKILL)
    assert code == -signal.SIGKILL
    survived = written_blocks(table)
    assert survived < 4

    second = start(*command)  # at once: on this host nobody waits for the dead driver's lease
    second.wait_until(lambda: f'"pid": {second.process.pid},' in lease_of(table))
    second.process.send_signal(signal.SIGSTOP)  # or it might be done before the rival has started
    rival = start(*command)
    code, _, err = rival.finish()
    second.process.send_signal(signal.SIGCONT)
    assert code == 31, err
    assert f"(process {second.process.pid})" in err
    second.wait_until(lambda: written_blocks(table) > survived)
    code, err = second.stop(signal.SIGINT)
    assert code == 130, err
    assert "masklake: interrupted. Run the same command again to continue.\n" in err

    third = start(*command)
    code, out, err = third.finish()
    assert code == 0, err
    assert "continues" in err
    report = json.loads(out)
    assert (report["images"], report["resumed"]) == (IMAGES, True)
    assert report["labelled_now"] < IMAGES
    rows = open_table(Storage(), str(table)).dataset().to_table(columns=["uri", "status"]).to_pylist()
    assert sorted(row["uri"] for row in rows) == sorted(str(path) for path in folder.iterdir())
    assert {row["status"] for row in rows} == {"ok"}


def rows_of(table: str) -> list[tuple[str, str]]:
    """(uri, status) of each row, by uri."""
    rows = open_table(Storage(), table).dataset().to_table(columns=["uri", "status"]).to_pylist()
    return sorted((row["uri"], row["status"]) for row in rows)


@pytest.mark.faults
def test_a_node_that_dies_takes_what_it_had_in_hand_and_ends_no_run(
    tmp_path: Path, tiny_checkpoint: Path, pictures: Callable[..., Path], start: Callable[..., Any]
) -> None:
    """The node that is left has room for one worker: the run goes on with it."""
    from ray.cluster_utils import Cluster

    folder, table = pictures(40), tmp_path / "table"
    node = {"object_store_memory": 150 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **node})
    try:
        lost = cluster.add_node(num_cpus=3, **node)  # of two workers, one at least is there
        command = start(
            "label", folder, table, "--weights", tiny_checkpoint, "--workers", 2, "--address", cluster.address, "--json"
        )
        command.wait_until(lambda: written_blocks(table) >= 1)
        cluster.remove_node(lost, allow_graceful=False)
        code, out, err = command.finish()
    finally:
        cluster.shutdown()
    assert code == 0, err
    assert json.loads(out)["statuses"]["ok"] == 40
    assert rows_of(str(table)) == [(str(path), "ok") for path in sorted(folder.iterdir())]


@pytest.mark.faults
def test_the_counter_and_the_board_are_on_the_drivers_node() -> None:
    """With a soft affinity three of six were elsewhere."""
    import ray
    from ray.cluster_utils import Cluster

    from masklake.jobs.cluster.connection import connect_ray
    from masklake.jobs.labelling.progress import start_counter
    from masklake.jobs.training.messages import start_messages

    node = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **node})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, **node)
        connect_ray(cluster.address)
        actors = [start() for start in (start_counter, start_messages) for _ in range(3)]
        ray.get([actor.__ray_ready__.remote() for actor in actors])
        places = {actor["Address"]["NodeID"] for actor in ray._private.state.actors().values()}
        assert places == {ray.get_runtime_context().get_node_id()}
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("method", "text", "status", "code", "exit_code"),
    [
        ("PUT", "/run=", 403, "AccessDenied", 22),
        ("PUT", "/run=", 400, "ExpiredToken", 22),
        ("PUT", "/_delta_log/", 403, "AccessDenied", 22),
        ("PUT", "/run=", 503, "SlowDown", 24),
        ("GET", "images.manifest", 403, "AccessDenied", 22),
    ],
)
def test_what_cannot_be_written_or_read_is_no_image_s_fault(
    s3: Any,
    s3_proxy: Any,
    tiny_checkpoint: Path,
    pictures: Callable[..., Path],
    start: Callable[..., Any],
    method: str,
    text: str,
    status: int,
    code: str,
    exit_code: int,
) -> None:
    folder = pictures(10)
    command = ("label", folder, s3.uri("table"), "--weights", tiny_checkpoint, "--workers", 1)
    s3_proxy.answer(status, code, method, text)
    returned, _, err = start(*command).finish()
    assert returned == exit_code, err
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"masklake: error: {s3.uri('table')}"), last
    assert code in last
    assert not open_table(Storage(), s3.uri("table")).files(), "nothing is committed"

    s3_proxy.clear()
    returned, _, err = start(*command).finish()
    assert returned == 0, err
    assert "continues" in err
    assert rows_of(s3.uri("table")) == [(str(path), "ok") for path in sorted(folder.iterdir())]


class FirstPuts(Rule):
    """Drops the reply of each object's first PUT, whatever its name."""

    def __init__(self) -> None:
        super().__init__("PUT", "", forwards=True)
        self.objects: set[str] = set()

    def meets(self, method: str, target: str) -> bool:
        """Whether it is one that nobody has asked for yet."""
        first = method == self.method and target not in self.objects
        if first:
            self.objects.add(target)
            self.hits += 1
        return first


@pytest.mark.faults
def test_the_reply_of_every_object_s_first_put_is_lost(
    s3: Any, s3_proxy: Any, tiny_checkpoint: Path, pictures: Callable[..., Path], start: Callable[..., Any]
) -> None:
    """Description, manifest, leases, records, blocks and log are each there when the client thinks that they are not."""
    folder = pictures(70)
    rule = FirstPuts()
    s3_proxy.rules.append(rule)
    command = ("label", folder, s3.uri("table"), "--weights", tiny_checkpoint, "--workers", 1, "--json")
    code, out, err = start(*command).finish()
    assert code == 0, err
    for name in ("/lease", "images.manifest", "run.json", "table.json", "/part-", "_delta_log/"):
        assert any(name in unquote(target) for target in rule.objects), name
    assert json.loads(out)["statuses"]["ok"] == 70
    assert rows_of(s3.uri("table")) == [(str(path), "ok") for path in sorted(folder.iterdir())]
    code, out, err = start(*command).finish()
    assert (code, json.loads(out)["run_id"]) == (0, None), err
