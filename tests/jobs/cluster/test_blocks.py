"""The driver's rows as a Ray data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
import ray

from masklake.jobs.cluster.blocks import data_set, equal_sizes
from masklake.pipeline.blocks import unpacked

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    yield
    ray.shutdown()


def test_blocks_need_no_tasks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve tasks held six CPUs for 35 s before the first worker started, and a notice blamed other jobs."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a task of Ray Data")

    monkeypatch.setattr("ray.data.read_api.cached_remote_fn", refused)
    rows = pa.table({"image_id": pa.array(range(7), pa.int64()), "etag": pa.array([None] * 6 + ["x"])})
    blocks = [unpacked(item) for item in data_set(rows, [3, 3, 1]).iter_batches(batch_size=None, batch_format="pyarrow")]
    assert [block.num_rows for block in blocks] == [3, 3, 1]
    assert pa.concat_tables(blocks).equals(rows)


def test_blocks_of_equal_size_end_with_the_rest() -> None:
    assert equal_sizes(7, 3) == [3, 3, 1]
    assert equal_sizes(6, 3) == [3, 3]
    assert equal_sizes(0, 3) == []
