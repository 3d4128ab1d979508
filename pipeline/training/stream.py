"""The order of a training run's samples, and the Ray Data set that Ray Train splits between its workers.

Only numbers are shuffled. Sample `i` of a run belongs to epoch `i // epoch_samples`; the order within an epoch is a permutation
that depends on (seed, epoch). All epochs are one stream, so a new epoch needs no restart (of an executor, a barrier, a first
batch), and a resume is a stream that starts later.

Several processes of Ray unpickle the stream without loading a sample, so this module imports neither torch nor the model: the
loader is in the object store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

if TYPE_CHECKING:
    from masklake.pipeline.training.loader import Loader

LOADER_ROWS = 16
"""Number of samples per loading task: enough to hide the latency of a request, few enough for a quick first batch."""
RANGE_ROWS = 256 * LOADER_ROWS
"""Number of sample numbers in a block before it is split into blocks of `LOADER_ROWS`."""


def epoch_order(rows: int, samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Returns the rows of one epoch's samples: permutations of all rows, one after another, cut to `samples`."""
    random = np.random.default_rng((seed, epoch))
    passes = [random.permutation(rows) for _ in range(-(-samples // rows))]
    return np.concatenate(passes)[:samples]


@dataclass(frozen=True)
class SampleStream:
    """The samples of epochs `first_epoch` to `epochs` - 1.

    loader: fetches, decodes and augments; in the object store. rows: its number of images. epoch_samples: a multiple of the
    images that all workers take in one step, so that every epoch ends with a step.
    """

    loader: ray.ObjectRef[Loader]
    rows: int
    epoch_samples: int
    first_epoch: int
    epochs: int
    seed: int
    loader_cpus: float

    def dataset(self) -> ray.data.Dataset:
        """Returns a lazy data set: sample numbers in small blocks, which loading tasks turn into SAMPLE_SCHEMA rows."""
        samples = max(0, self.epochs - self.first_epoch) * self.epoch_samples
        # Repartitioning splits blocks but joins none: by default Ray Data begins a small set with one or two rows in each.
        blocks = max(1, -(-samples // RANGE_ROWS))
        numbers = ray.data.range(samples, override_num_blocks=blocks).repartition(target_num_rows_per_block=LOADER_ROWS)
        return numbers.map_batches(self.load, batch_size=None, batch_format="pyarrow", num_cpus=self.loader_cpus)

    def load(self, numbers: pa.Table) -> pa.Table:
        """Returns SAMPLE_SCHEMA rows of the samples with these numbers (column `id`, from 0 at `first_epoch`)."""
        epochs, places = np.divmod(numbers["id"].to_numpy(), self.epoch_samples)
        orders = {
            int(epoch): epoch_order(self.rows, self.epoch_samples, self.seed, self.first_epoch + int(epoch))
            for epoch in np.unique(epochs)
        }
        rows = [int(orders[int(epoch)][place]) for epoch, place in zip(epochs, places, strict=True)]
        return ray.get(self.loader).load(rows, [self.first_epoch + int(epoch) for epoch in epochs])
