"""Ray Data sets of rows that the driver holds."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import pyarrow as pa

from masklake.pipeline.blocks import packed


def data_set(rows: pa.Table, sizes: Iterable[int]) -> Any:
    """Returns a Ray data set with a block of rows in each item (`pipeline.blocks`). sizes: number of rows of each block.

    The blocks come from the driver, so that the death of another node loses none of them, and no task is needed for them. A
    task for each, as `from_arrow` starts, would take the workers' CPUs, and wait while other jobs hold them.
    """
    import ray

    counts = list(sizes)
    blocks = [packed(rows.slice(end - count, count)) for end, count in zip(accumulate(counts), counts, strict=True)]
    return ray.data.from_items(blocks, override_num_blocks=len(blocks))


def equal_sizes(rows: int, block_rows: int) -> list[int]:
    """Returns the numbers of rows in blocks of equal size; the last one may be smaller."""
    return [min(block_rows, rows - start) for start in range(0, rows, block_rows)]
