"""The stream of samples: its order follows from the seed, and every worker gets its share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.training.loader import Loader, training_rows
from masklake.pipeline.training.stream import SampleStream, epoch_order
from tests.pipeline.training.scenes import dataset_of, spec


def test_an_epochs_order_is_a_permutation_that_follows_from_seed_and_epoch() -> None:
    order = epoch_order(10, 10, seed=3, epoch=1)
    assert sorted(order) == list(range(10))
    assert np.array_equal(order, epoch_order(10, 10, seed=3, epoch=1))
    assert not np.array_equal(order, epoch_order(10, 10, seed=3, epoch=2))
    assert not np.array_equal(order, epoch_order(10, 10, seed=4, epoch=1))
    assert Counter(epoch_order(3, 8, 0, 0).tolist()).most_common()[-1][1] >= 2  # fewer rows than a batch: repeated evenly


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray cluster of this file's own; logical CPUs, so that it runs on any machine."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_every_worker_gets_equally_many_samples_and_every_epoch_every_image(tmp_path: Path, local_ray: None) -> None:
    rows = training_rows(dataset_of(tmp_path, 22), str(tmp_path), spec())
    loader = ray.put(Loader(rows, spec(), Storage()))
    stream = SampleStream(loader, rows=22, epoch_samples=22, first_epoch=1, epochs=4, seed=0, loader_cpus=0.5)
    data = stream.dataset()
    data.context.execution_options.preserve_order = True
    shards = data.streaming_split(2, equal=True)

    @ray.remote(num_cpus=0)
    def consume(shard: Any) -> list[int]:
        return [row for batch in shard.iter_batches(batch_size=4, batch_format="pyarrow") for row in batch["row"].to_pylist()]

    seen = ray.get([consume.remote(shard) for shard in shards])
    assert [len(s) for s in seen] == [33, 33]
    assert Counter(seen[0] + seen[1]) == dict.fromkeys(range(22), 3)


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "tasks"), [(5, [5]), (20, [16, 4]), (160, [16] * 10)])
def test_a_loading_task_gets_its_share_of_samples_however_few_they_are(local_ray: None, samples: int, tasks: list[int]) -> None:
    class Counting:
        def load(self, rows: list[int], epochs: list[int]) -> pa.Table:
            return pa.table({"rows": [len(rows)]})

    stream = SampleStream(ray.put(Counting()), samples, samples, first_epoch=0, epochs=1, seed=0, loader_cpus=0.5)
    found = [row["rows"] for row in stream.dataset().take_all()]
    assert sorted(found, reverse=True) == tasks
