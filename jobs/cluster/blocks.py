"""Ray Data sets of rows that the driver holds."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from masklake.pipeline.blocks import packed


def data_set(rows: pa.Table, block_rows: int) -> Any:
    """Returns a Ray data set with a block of `block_rows` rows in each item (`pipeline.blocks`).

    The blocks come from the driver, so that the death of another node loses none of them, and no task is needed for them. A
    task for each, as `from_arrow` starts, would take the workers' CPUs, and wait while other jobs hold them.
    """
    import ray

    blocks = [packed(rows.slice(start, block_rows)) for start in range(0, rows.num_rows, block_rows)]
    return ray.data.from_items(blocks, override_num_blocks=len(blocks))
