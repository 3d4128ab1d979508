"""Stored proposals: the boxes of an RPN for each image, in one Parquet file, on which a detector is trained later.

With them, the RPN need not run at every step (Mask R-CNN, section 3.1: "RPN is trained separately"). They are computed for
unaugmented images, and are transformed with their image by the augmentation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from masklake.model.wording import agreeing, counted_of
from masklake.pipeline.coco.dataset import NAMED
from masklake.pipeline.errors import AnnotationError
from masklake.pipeline.storage.errors import translated
from masklake.pipeline.storage.storage import Storage

PROPOSAL_SCHEMA = pa.schema(
    [
        ("file_name", pa.string()),  # as the COCO file has it
        ("width", pa.int32()),  # pixels of the upright image
        ("height", pa.int32()),
        ("boxes", pa.large_list(pa.float32())),  # P x (x1, y1, x2, y2) in those pixels, the best first
    ]
)


def read_proposals(storage: Storage, uri: str) -> pa.Table:
    """Returns the PROPOSAL_SCHEMA rows of the file at `uri`. Raises AnnotationError if `masklake propose` did not write it."""
    filesystem, path = storage.arrow(uri)
    with translated(uri), filesystem.open_input_file(path) as file:
        try:
            table = pq.read_table(file)
            rows = table.select(PROPOSAL_SCHEMA.names).cast(PROPOSAL_SCHEMA)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, KeyError) as error:
            raise AnnotationError(f"{uri} holds no proposals ({error}). Give a file of `masklake propose`.") from error
    _check_boxes(rows, uri)
    return rows


def _check_boxes(rows: pa.Table, uri: str) -> None:
    """Raises AnnotationError unless each row has boxes of four finite numbers."""
    boxes = rows["boxes"].combine_chunks()
    wrong = boxes.is_null().to_numpy(zero_copy_only=False) | (boxes.value_lengths().fill_null(0).to_numpy() % 4 != 0)
    finite = np.isfinite(boxes.flatten().to_numpy(zero_copy_only=False))  # null is NaN here
    wrong[boxes.value_parent_indices().to_numpy()[~finite]] = True
    if count := int(wrong.sum()):
        name = rows["file_name"][int(np.flatnonzero(wrong)[0])].as_py()
        raise AnnotationError(
            f"{uri}: {counted_of(count, len(wrong), 'image')} {agreeing(count, 'has', 'have')} proposals that are not boxes of "
            f"four finite numbers{agreeing(count, ': ', ', such as ')}{name}. Run `masklake propose` again."
        )


def proposals_of(rows: pa.Table, names: Sequence[str], proposals: pa.Table) -> pa.ChunkedArray:
    """Returns the boxes of each training row. names: the file names of the rows.

    Raises AnnotationError for rows without proposals, or whose image had another size when they were computed.
    """
    place = {name: number for number, name in enumerate(proposals["file_name"].to_pylist())}
    missing = [name for name in names if name not in place]
    if count := len(missing):
        raise AnnotationError(
            f"{counted_of(count, len(names), 'image')} {agreeing(count, 'has', 'have')} no proposals"
            f"{', such as ' if count > NAMED else ': '}{', '.join(missing[:NAMED])}. Run `masklake propose` on this COCO file."
        )
    chosen = proposals.take(pa.array([place[name] for name in names], pa.int64()))
    for side in ("width", "height"):
        for name, own, theirs in zip(names, rows[side].to_pylist(), chosen[side].to_pylist(), strict=True):
            if own != theirs:
                raise AnnotationError(f"{name}: its proposals are of an image of another size; run `masklake propose` again.")
    return chosen["boxes"]
