"""`masklake propose`: stores an RPN's proposals for every image of a COCO file, to train a detector on them."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from pydantic import BaseModel, ConfigDict

from masklake.jobs.cluster.blocks import data_set, equal_sizes
from masklake.jobs.cluster.connection import connect_ray, data_context, last_line
from masklake.jobs.cluster.waiting import said_while_waiting
from masklake.jobs.fields import ProposeFields
from masklake.jobs.labelling.plan import WorkerPlan, plan_workers
from masklake.jobs.terminal.output import check_not_read
from masklake.jobs.weights import read_detector
from masklake.model.detector import can_propose
from masklake.model.errors import ConfigError
from masklake.pipeline.coco.dataset import CocoDataset, image_folder
from masklake.pipeline.coco.image_check import check_unusable, listed_and_left_out, unusable_share, usable_images
from masklake.pipeline.coco.reading import read_coco
from masklake.pipeline.errors import LabellingError
from masklake.pipeline.storage.options import StorageOptions
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import canonical, parent, parse_uri, relative_to
from masklake.pipeline.training.proposals import PROPOSAL_SCHEMA
from masklake.pipeline.training.proposer import Proposer

log = logging.getLogger(__name__)

BLOCK_IMAGES = 16
"""Number of images per block: enough to hide the latency of a request."""


class ProposeOptions(BaseModel, ProposeFields, frozen=True):
    """Options of `masklake propose`."""

    model_config = ConfigDict(extra="forbid")

    storage: StorageOptions = StorageOptions()


class ProposeReport(BaseModel):
    """The results of `masklake propose`."""

    model_config = ConfigDict(frozen=True)

    output: str
    model_id: str
    images: int
    proposals: int


def run(options: ProposeOptions, say: Callable[[str], None] = log.info) -> ProposeReport:
    """Writes the proposals of all images to the output file, which appears when it is complete. Calls `say` with a line while
    the run waits for the cluster.

    Raises AnnotationError if more images than allowed cannot be used, ConfigError for a model without proposals or an invalid
    output, ClusterTooSmallError, LabellingError if Ray fails, and the storage's errors.
    """
    storage = Storage(options.storage)
    _check_output(storage, options)
    folder = image_folder(options.images, options.coco)
    whole, most = read_coco(storage, options.coco), unusable_share(options.allow_missing, options.max_unusable)
    if canonical(options.output) in {canonical(relative_to(folder, image.file_name)) for image in whole.images}:
        raise ConfigError(f"{options.output}: is one of the images, which this would overwrite; name another file")
    data = usable_images(storage, whole, folder, most)
    listed, left_out = listed_and_left_out(data)
    checkpoint, model = read_detector(storage, options.weights)
    if not can_propose(model):
        raise ConfigError(f"{options.weights}: model {model.model_id} gives no proposals; name a two-stage detector")
    workers = plan_workers(connect_ray(options.address), len(data.images), options.workers, options.device)
    images = proposals = 0
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "proposals.parquet")
        with pq.ParquetWriter(path, PROPOSAL_SCHEMA, compression="zstd") as writer:
            for block in _blocks(storage, _rows(data, folder), checkpoint, workers, say):
                usable = block.filter(block["error"].is_null()).select(PROPOSAL_SCHEMA.names).cast(PROPOSAL_SCHEMA)
                failed += [f"{row['file_name']}: {row['error']}" for row in block.to_pylist() if row["error"]]
                check_unusable(failed, listed, most, options.coco, left_out)
                writer.write_table(usable)
                images += usable.num_rows
                proposals += len(usable["boxes"].combine_chunks().flatten()) // 4
        storage.upload(path, options.output)
    return ProposeReport(output=options.output, model_id=model.model_id, images=images, proposals=proposals)


def _check_output(storage: Storage, options: ProposeOptions) -> None:
    """Raises if the file could not be written at the end: ConfigError for its name, the storage's errors for its place."""
    output = options.output
    if not output.endswith(".parquet"):
        raise ConfigError(f"cannot write {output}: a file of proposals is named *.parquet")
    if parse_uri(output).is_local and Path(parse_uri(output).key).is_dir():
        raise ConfigError(f"cannot write {output}: it is a folder")
    check_not_read(output, {"the COCO file": options.coco, "the file of --weights": options.weights})
    storage.check_writable(parent(canonical(output)))


def _rows(data: CocoDataset, folder: str) -> pa.Table:
    """Returns the images' names, URIs and sizes, as the COCO file states them."""
    return pa.table(
        {
            "file_name": [image.file_name for image in data.images],
            "uri": [relative_to(folder, image.file_name) for image in data.images],
            "width": [image.width for image in data.images],
            "height": [image.height for image in data.images],
        }
    )


def _blocks(
    storage: Storage, rows: pa.Table, checkpoint: bytes, workers: WorkerPlan, say: Callable[[str], None]
) -> Iterator[pa.Table]:
    """Yields the workers' results, in any order."""
    begun = threading.Event()
    arguments: tuple[Any, ...] = (storage, ray.put(checkpoint), workers.device, workers.cpus_each)
    with ray.data.DataContext.current(data_context()):
        answers = data_set(rows, equal_sizes(rows.num_rows, BLOCK_IMAGES)).map_batches(
            Proposer,
            fn_constructor_args=arguments,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers.workers),
            num_cpus=workers.cpus_each,
            num_gpus=workers.gpus_each or None,
        )
        try:
            with said_while_waiting(workers.needs, begun.is_set, say):
                for answer in answers.iter_batches(batch_size=None, batch_format="pyarrow"):
                    begun.set()
                    yield answer
        except ray.exceptions.RayError as error:
            raise LabellingError(f"the proposals could not be computed: {last_line(error)}; nothing was written") from error
