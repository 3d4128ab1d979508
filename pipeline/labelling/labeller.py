"""The labelling step: takes a block of manifest rows and returns a block of finished table rows.

A labeller has one model replica. It fetches its own images, so that neither compressed bytes nor pixels pass through Ray's
object store, decodes them in threads (the decoders release the interpreter lock), and predicts while the next images are
decoded. Every image gets a row, with a status and a reason if it failed.
"""

from __future__ import annotations

import io
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from masklake.model.config import PredictOptions
from masklake.model.detector import Detector, check_answers, load_detector
from masklake.model.instances import Instances
from masklake.pipeline.blocks import unpacked
from masklake.pipeline.images.decode import Decoded, DecodeLimits, Header, decode, read_header
from masklake.pipeline.images.fetch import Fetched, fetch
from masklake.pipeline.images.status import ERROR_LENGTH, Status
from masklake.pipeline.labelling.run_output import REPORT_SCHEMA, Finished, failed, finished, write_block, written
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.rows import Outcome, outcome_rows
from masklake.pipeline.table.table import Table

FETCH_WINDOW_BYTES = 64 * 2**20
FETCH_WINDOW_IMAGES = 256
"""Maximum of compressed bytes, and of images, that are fetched together (a single larger file is fetched alone). Twice that is
in memory, since the next window is fetched while one is labelled. Batches are filled from one window.
"""
PART_S = 10.0
"""Seconds of work after which a worker writes what it has labelled. Its death loses no more than that."""
DECODE_WINDOW_PIXELS = 32_000_000
"""Number of pixels decoded together, 96 MB. Twice that is in memory, since the next window is decoded during prediction."""
BATCHES_PER_WINDOW = 4
"""Number of batches in a window of decoded images: enough to find images of equal canvas, few enough to show progress."""

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class LabelSpec:
    """Settings that are the same for every labeller of a run. They are sent to the workers."""

    storage: Storage
    model_id: str
    label_id: str
    predict: PredictOptions
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    device: str = "cpu"
    torch_threads: int = 1
    decode_threads: int = 2
    decode_timeout_s: float = 60.0
    """Seconds after which the decoder of an image is considered hung, and the image `crashed`."""


@dataclass(frozen=True)
class _Source:
    """A row of the manifest."""

    image_id: int
    uri: str
    etag: str | None
    bytes: int | None

    def outcome(self, fetched: Fetched, decoded: Decoded | None = None, instances: Instances | None = None) -> Outcome:
        """Returns the row of this image after its last step, with the version that was read, not the one that was listed."""
        last = decoded or fetched
        return Outcome(
            image_id=self.image_id,
            uri=self.uri,
            etag=fetched.etag if fetched.etag is not None else self.etag,
            bytes=fetched.bytes if fetched.bytes is not None else self.bytes,
            status=last.status,
            error=last.error,
            width=decoded.width if decoded else None,
            height=decoded.height if decoded else None,
            instances=instances,
        )


@dataclass(frozen=True)
class _Job:
    """An image to decode. Sizes are pixels as stored."""

    source: _Source
    fetched: Fetched
    data: bytes
    header: Header


class Labeller:
    """Labels blocks of the manifest with one model. Calls may overlap; the model itself serves one call at a time."""

    def __init__(self, spec: LabelSpec, model: Detector, on_progress: Callable[[int, int], None] | None = None) -> None:
        """on_progress: called with the number of images that were just finished, and of the failed ones among them."""
        self._spec = spec
        self._model = model
        self._names = {category.id: category.name for category in model.categories}
        self._on_progress = on_progress or (lambda images, failed: None)
        self._model_lock = Lock()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Returns FILE_SCHEMA rows, one for each of the MANIFEST_SCHEMA rows of a block, in the same order."""
        [rows] = self.parts(block, math.inf)
        return rows

    def parts(self, block: pa.Table, seconds: float = PART_S) -> Iterator[pa.Table]:
        """Yields the same rows in parts: one whenever `seconds` have passed, and the rest. A part's rows keep their order."""
        sources = [_Source(**row) for row in block.select(["image_id", "uri", "etag", "bytes"]).to_pylist()]
        places = {source.image_id: place for place, source in enumerate(sources)}
        outcomes: list[Outcome] = []
        begun = time.monotonic()
        for outcome in self._outcomes(sources):
            if outcomes and time.monotonic() - begun >= seconds:
                yield self._rows(outcomes, places)
                outcomes, begun = [], time.monotonic()
            outcomes.append(outcome)
        yield self._rows(outcomes, places)

    def _rows(self, outcomes: list[Outcome], places: Mapping[int, int]) -> pa.Table:
        outcomes.sort(key=lambda outcome: places[outcome.image_id])
        return outcome_rows(outcomes, model_id=self._spec.model_id, label_id=self._spec.label_id, category_names=self._names)

    def _outcomes(self, sources: Sequence[_Source]) -> Iterator[Outcome]:
        """Labels images in windows; while one is labelled, the next is fetched."""
        windows = list(_windows(sources, lambda source: source.bytes or 0, FETCH_WINDOW_BYTES, FETCH_WINDOW_IMAGES))
        with ThreadPoolExecutor(1, thread_name_prefix="fetch") as ahead:
            fetching = [ahead.submit(self._fetch, window) for window in windows[:1]]
            for number, window in enumerate(windows):
                found = fetching.pop().result()
                fetching += [ahead.submit(self._fetch, later) for later in windows[number + 1 : number + 2]]
                yield from self._label(window, found)

    def _fetch(self, sources: Sequence[_Source]) -> list[Fetched]:
        return fetch(self._spec.storage, [source.uri for source in sources], max_bytes=self._spec.limits.max_bytes)

    def _label(self, sources: Sequence[_Source], found: Sequence[Fetched]) -> Iterator[Outcome]:
        """Checks the headers of fetched images, then decodes and predicts window by window, images of similar shape
        together.
        """
        jobs: list[_Job] = []
        for source, fetched in zip(sources, found, strict=True):
            job = _job_or_outcome(source, fetched, self._spec.limits)
            if isinstance(job, Outcome):
                yield from self._finished([job])
            else:
                jobs.append(job)
        jobs.sort(key=lambda job: self._model.batch_key((job.header.height, job.header.width)))
        most = BATCHES_PER_WINDOW * self._spec.predict.batch_size
        windows = list(_windows(jobs, lambda job: job.header.pixels, DECODE_WINDOW_PIXELS, most))
        with _decoder(self._spec) as decoder:
            for window, decoded in _one_ahead(windows, decoder):
                yield from self._finished(self._predict(window, decoded))

    def _finished(self, outcomes: list[Outcome]) -> list[Outcome]:
        self._on_progress(len(outcomes), sum(outcome.status is not Status.OK for outcome in outcomes))
        return outcomes

    def _predict(self, jobs: Sequence[_Job], decoded: Sequence[Decoded]) -> list[Outcome]:
        """Returns the outcomes of one window. If the model fails, each half is tried again, down to single images."""
        images = [each.image for each in decoded if each.image is not None]
        with self._model_lock:
            answers = iter(self._answers(images))
        outcomes = []
        for job, each in zip(jobs, decoded, strict=True):
            answer = next(answers) if each.image is not None else None
            if isinstance(answer, str):
                each = Decoded(Status.MODEL_ERROR, width=each.width, height=each.height, error=answer)
            outcomes.append(job.source.outcome(job.fetched, each, answer if isinstance(answer, Instances) else None))
        return outcomes

    def _answers(self, images: Sequence[torch.Tensor]) -> Sequence[Instances | str]:
        """Returns the instances of each image, or the reason why the model failed."""
        if not images:
            return []
        try:
            answers = self._model.predict(images, self._spec.predict)
            check_answers(answers, images, self._names)
            return answers
        except torch.AcceleratorError:
            # The device's context is broken permanently: every later image would fail. A new process may succeed.
            log.exception("the accelerator failed; this worker ends so that another one replaces it")
            os._exit(1)
        except Exception as error:  # noqa: BLE001 - one image must not take its block with it; the row carries the reason
            if len(images) == 1:
                return [f"{type(error).__name__}: {error}"[:ERROR_LENGTH]]
        half = len(images) // 2  # a device's memory may hold half of them
        return [*self._answers(images[:half]), *self._answers(images[half:])]


class LabellingActor(Labeller):
    """A `Labeller` on a worker. It writes what it labels, so that only images in progress are lost when its node dies."""

    def __init__(self, spec: LabelSpec, checkpoint: list[Any], progress: Any, table: Table, run_id: str) -> None:
        """checkpoint: a list of one Ray reference to the bytes (references outside of lists are resolved by Ray itself).
        progress: handle of an actor like `jobs.labelling.progress.Counter`.
        """
        import ray

        self._progress = progress
        _told(progress.starting.remote(ray.get_runtime_context().get_actor_id()))
        torch.set_num_threads(spec.torch_threads)
        model = load_detector(ray.get(checkpoint[0]), device=spec.device)
        super().__init__(spec, model, on_progress=lambda images, failed: progress.add.remote(images, failed))
        self._table = table
        self._run_id = run_id
        _told(progress.ready.remote())

    def __call__(self, packed_block: pa.Table) -> pa.Table:
        """Labels and writes a block. Returns one REPORT_SCHEMA row: the file that contains the block, or why it could not be
        written.

        packed_block: one row of `pipeline.blocks.packed`. Returns no row if too many workers died with this block: Ray would
        give it to the next worker forever.
        """
        block = unpacked(packed_block)
        first = int(block["image_id"][0].as_py())
        taken = _told(self._progress.take.remote(first))
        if taken == 0:
            return REPORT_SCHEMA.empty_table()
        report = self.alone(block, begun_before=taken is not None and taken > 1)
        self._progress.lay_down.remote(first)
        return report

    def alone(self, block: pa.Table, begun_before: bool = False) -> pa.Table:
        """Same as calling the actor, for a caller that gives this block, MANIFEST_SCHEMA rows, to no other worker.

        begun_before: whether another worker may have written a part of the block.
        """
        return labelled_and_written(self, block, self._table, self._run_id, self._take_back, begun_before)

    def _take_back(self, rows: pa.Table) -> None:
        """Subtracts labelled images that could not be written from the counter."""
        ended_ok = pc.sum(pc.equal(rows["status"], Status.OK.value)).as_py()
        _told(self._progress.take_back.remote(rows.num_rows, rows.num_rows - ended_ok))

    def prove(self) -> str:
        """Labels a generated picture, and returns the id of the node. If this worker dies later, it is known to have worked."""
        import ray

        picture = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(picture).resize((640, 480), Image.Resampling.NEAREST).save(buffer, format="JPEG")
        image = decode(buffer.getvalue(), self._spec.limits).image
        self._model.predict([] if image is None else [image], self._spec.predict)
        return str(ray.get_runtime_context().get_node_id())


def labelled_and_written(
    labeller: Labeller,
    block: pa.Table,
    table: Table,
    run_id: str,
    on_unwritten: Callable[[pa.Table], object] = lambda rows: None,
    begun_before: bool = False,
) -> pa.Table:
    """Labels a block and writes its parts. Returns REPORT_SCHEMA rows: the files, and the error that ended it, if any.

    Errors are returned, never raised: Ray would count an exception as a lost block, as it counts a dead worker. on_unwritten:
    called with labelled rows that could not be written. begun_before: leaves out images that are in a file of the run.
    """
    reports = [REPORT_SCHEMA.empty_table()]
    rows: pa.Table | None = None
    try:
        if begun_before:
            block = _without(block, finished(table, run_id))
        for rows in labeller.parts(block) if block.num_rows else ():
            reports.append(written(write_block(table, run_id, rows)))
            rows = None
    except Exception as error:
        log.exception("a block was not labelled")
        if rows is not None:
            on_unwritten(rows)
        reports.append(failed(error))
    return pa.concat_tables(reports)


def _without(block: pa.Table, files: Sequence[Finished]) -> pa.Table:
    """Returns the rows of a block whose images are in none of the files."""
    done = np.concatenate([np.empty(0, np.int64), *(file.image_ids for file in files)])
    return block.filter(pa.array(~np.isin(block["image_id"].to_numpy(), done)))


def _told(answer: Any) -> Any:
    """Waits for the counter's answer, because this process may end at any moment, and returns it; None if there is none."""
    import ray

    try:
        return ray.get(answer, timeout=10)
    except ray.exceptions.RayError:
        log.warning("the progress counter does not answer")
        return None


def _job_or_outcome(source: _Source, fetched: Fetched, limits: DecodeLimits) -> _Job | Outcome:
    """Returns a job if the image was fetched and its header is valid, else the outcome that says why not."""
    if fetched.data is None:
        return source.outcome(fetched)
    header = read_header(fetched.data, limits)
    if header.status is not Status.OK:
        return source.outcome(fetched, header.refused())
    return _Job(source, fetched, fetched.data, header)


def _windows(items: Sequence[T], weight: Callable[[T], int], most: int, count: int | None = None) -> Iterator[list[T]]:
    """Yields consecutive items of at most `most` weight (at least one item) and at most `count` items."""
    window: list[T] = []
    total = 0
    for item in items:
        if window and (total + weight(item) > most or len(window) == count):
            yield window
            window, total = [], 0
        window.append(item)
        total += weight(item)
    if window:
        yield window


def _one_ahead(windows: Sequence[list[_Job]], decoder: _Decoder) -> Iterator[tuple[list[_Job], list[Decoded]]]:
    """Yields each window with its decoded images; while the caller works on one, the next is decoded."""
    ahead = decoder.start(windows[0]) if windows else []
    for number, window in enumerate(windows):
        decoded = decoder.finish(window, ahead)
        if number + 1 < len(windows):
            ahead = decoder.start(windows[number + 1])
        yield window, decoded


class _Decoder:
    """Decodes in threads, with a time limit. A thread that hangs is abandoned and replaced: threads cannot be killed."""

    def __init__(self, spec: LabelSpec) -> None:
        self._spec = spec
        self._pool = self._new_pool()

    def start(self, jobs: Iterable[_Job]) -> list[Future[Decoded]]:
        """Starts decoding `jobs` in the background."""
        return [self._pool.submit(decode, job.data, self._spec.limits, job.header) for job in jobs]

    def finish(self, jobs: Sequence[_Job], futures: list[Future[Decoded]]) -> list[Decoded]:
        """Returns the results of `start`, in order. An image that hangs is `crashed`; those that wait behind it are started
        again.
        """
        late = wait(futures, timeout=self._spec.decode_timeout_s).not_done
        if not late:
            return [future.result() for future in futures]
        waiting = {number for number, future in enumerate(futures) if future in late and future.cancel()}
        self.close()
        self._pool = self._new_pool()
        again = [jobs[number] for number in sorted(waiting)]
        redone = iter(self.finish(again, self.start(again)))
        reason = f"decoding did not end within {self._spec.decode_timeout_s:g} s"
        hung = [Decoded(Status.CRASHED, width=job.header.width, height=job.header.height, error=reason) for job in jobs]
        return [
            next(redone) if number in waiting else hung[number] if future in late else future.result()
            for number, future in enumerate(futures)
        ]

    def close(self) -> None:
        """Shuts the threads down without waiting for one that hangs."""
        self._pool.shutdown(wait=False, cancel_futures=False)

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._spec.decode_threads, thread_name_prefix="decode")


@contextmanager
def _decoder(spec: LabelSpec) -> Iterator[_Decoder]:
    decoder = _Decoder(spec)
    try:
        yield decoder
    finally:
        decoder.close()
