"""Blocks of rows in the form in which the driver passes them to workers through Ray Data."""

from __future__ import annotations

import pyarrow as pa

_BLOCK = "block"


def packed(block: pa.Table) -> dict[str, bytes]:
    """Returns a block of rows as one item for `ray.data.from_items`.

    Ray Data learns the size of an item where it is created. For each table, it would start a task, which waits for a free CPU.
    """
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, block.schema) as stream:
        stream.write_table(block)
    return {_BLOCK: buffer.getvalue().to_pybytes()}


def unpacked(item: pa.Table) -> pa.Table:
    """Returns the block in one item of `packed`, which a worker receives as a table of one row."""
    return pa.ipc.open_stream(item[_BLOCK][0].as_buffer()).read_all()
