"""Scores a model on validation images: each worker predicts its share, and the first one computes the metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed
from torch import Tensor

from masklake.model.config import PredictOptions
from masklake.model.detector import Detector, TwoStageDetector
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.phases import Phase
from masklake.model.weights.checkpoint import dumps
from masklake.model.wording import counted, percent
from masklake.pipeline.coco.dataset import UNUSABLE_IMAGE, CocoDataset, without_images
from masklake.pipeline.coco.image_check import check_unusable, first_few, listed_and_left_out, wrong_size
from masklake.pipeline.coco.values import CocoImage
from masklake.pipeline.errors import StorageError
from masklake.pipeline.images.decode import DecodeLimits, decode
from masklake.pipeline.images.fetch import fetch_patiently
from masklake.pipeline.results.evaluation import (
    KIND_NAMES,
    PROPOSAL_COUNTS,
    IouType,
    Score,
    coco_metrics,
    proposal_recall,
    result_rows,
)
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import relative_to
from masklake.pipeline.training.run import TrainingRun, Worker
from masklake.pipeline.training.run_folder import best_uri, write_latest

COMPARED = ("mask AP", "box AP", f"proposal AR{PROPOSAL_COUNTS[-1]}")
"""Names of the scores by which epochs are compared: the first that exists counts."""

EVALUATION_IMAGES = 16
"""Number of images fetched together while the previous ones are evaluated."""


@dataclass(frozen=True)
class Validation:
    """Validation data: ground truth and the folder of its images. most_unusable: share of the images that may be unusable."""

    truth: CocoDataset
    folder: str
    max_dets: tuple[int, ...]
    most_unusable: float = 0.0


Validate = Callable[[], Validation | None]
"""Returns the validation data, if any; called only when a model is scored."""


def score(run: TrainingRun, worker: Worker, validation: Validate, model: MaskRCNN, history: list[dict[str, Any]]) -> None:
    """Scores the model of the last epoch in `history`, if that is due and not done yet; adds the scores to the history and
    stores them. The epoch must have been saved.
    """
    row = history[-1]
    if not run.is_scored(row["epoch"]) or row.keys() & {"scores", "recall"}:
        return
    if (data := validation()) is None:
        return
    row |= evaluate(data, run.storage, run.phase(row["epoch"] - 1), model.eval(), worker)
    if worker.rank != 0:
        return
    candidates = run.candidates(history)
    is_best = run.keep_best and _is_best(candidates)
    if is_best:  # under a name that says its epoch, and before the scores that make it the best
        run.storage.write_bytes(best_uri(run.uri, row["epoch"]), dumps(model))
    write_latest(run.storage, run.uri, row["epoch"], row)
    if is_best:
        for earlier in candidates[:-1]:
            if best_score(earlier) is not None:
                run.storage.delete(best_uri(run.uri, earlier["epoch"]))


def evaluate(validation: Validation, storage: Storage, phase: Phase, model: TwoStageDetector, worker: Worker) -> dict[str, Any]:
    """Returns the scores of a model on the first worker, from the results of all workers; an empty dictionary on the others.

    Scores are the AP of detections or, for an RPN that is trained alone, the recall of its proposals. Raises AnnotationError if
    too many images cannot be used, and StorageError if the storage is out of reach.
    """
    start = time.perf_counter()
    share = propose_share if phase.trains == "rpn" else predict_share
    unusable: dict[int, str] = {}
    found = share(model, validation, storage, worker.rank, worker.count, unusable)
    shares: list[Any] = [(found, unusable)]
    if worker.count > 1:
        shares = [None] * worker.count if worker.rank == 0 else []
        torch.distributed.gather_object((found, unusable), shares if worker.rank == 0 else None)
    if worker.rank != 0:
        return {}
    answers = [row for rows, _ in shares for row in rows]
    validation, left_out = _scored(validation, {number: why for _, bad in shares for number, why in bad.items()})
    row: dict[str, Any]
    if phase.trains == "rpn":
        row = {"recall": proposal_recall(validation.truth, answers)}
        headline = row["recall"]
    else:
        scores = coco_metrics(validation.truth, answers, max_dets=validation.max_dets)
        headline = {name: value for kind, score in scores.items() for name, value in named_ap(kind, score).items()}
        row = {"ap": headline, "scores": {kind: vars(score) for kind, score in scores.items()}}
    if left_out:
        row["not_scored"] = left_out
        unused = counted(
            len(left_out), "image could not be used and is not scored", "images could not be used and are not scored"
        )
        worker.say(f"{unused}: {first_few(left_out)}")
    images = counted(len(validation.truth.images), "image")
    worker.say(f"evaluated on {images} in {time.perf_counter() - start:.0f} s: {describe_scores(headline)}")
    return row


def _scored(validation: Validation, unusable: Mapping[int, str]) -> tuple[Validation, list[str]]:
    """Returns the validation data without unusable images, and the reasons. Raises AnnotationError for too many."""
    truth = validation.truth
    listed, left_out = listed_and_left_out(truth)
    check_unusable(list(unusable.values()), listed, validation.most_unusable, truth.source, left_out)
    return replace(validation, truth=without_images(truth, unusable.keys(), UNUSABLE_IMAGE)), list(unusable.values())


def named_ap(kind: IouType, score: Score) -> dict[str, float | None]:
    """Returns the two numbers that a curve shows."""
    return {f"{KIND_NAMES[kind]} AP": score.ap, f"{KIND_NAMES[kind]} AP50": score.ap50}


def describe_scores(scores: Mapping[str, float | None]) -> str:
    """Returns one line of scores in percent, as papers write them."""
    return ", ".join(f"{name} {percent(value)}" for name, value in scores.items())


def predict_share(
    model: Detector,
    validation: Validation,
    storage: Storage,
    rank: int = 0,
    world: int = 1,
    unusable: dict[int, str] | None = None,
) -> list[dict[str, Any]]:
    """Returns COCO result rows of every `world`-th image from `rank` on. unusable: receives the reasons for images that cannot
    be used, by id.
    """
    categories = {category.id: category for category in model.categories}
    most = max(validation.max_dets)
    options = PredictOptions(max_detections=max(most, model.settings(PredictOptions()).get("max_detections", 0)))
    rows: list[dict[str, Any]] = []
    for loaded in _share(validation, storage, rank, world, unusable):
        answers = model.predict([image for _, image in loaded], options)
        for (image_id, _), found in zip(loaded, answers, strict=True):
            rows.extend(result_rows(image_id, found, categories))
    return rows


def propose_share(
    model: TwoStageDetector,
    validation: Validation,
    storage: Storage,
    rank: int = 0,
    world: int = 1,
    unusable: dict[int, str] | None = None,
) -> list[dict[str, Any]]:
    """Returns `image_id` and `boxes` (float32 (P, 4), xyxy, best first) of every `world`-th usable image from `rank` on."""
    return [
        {"image_id": image_id, "boxes": boxes}
        for loaded in _share(validation, storage, rank, world, unusable)
        for (image_id, _), boxes in zip(loaded, model.propose([image for _, image in loaded]), strict=True)
    ]


def _share(
    validation: Validation, storage: Storage, rank: int, world: int, unusable: dict[int, str] | None
) -> Iterator[list[tuple[int, Tensor]]]:
    """Yields a worker's images with their ids, a few at a time, while the next ones are loaded; `unusable` receives the reasons
    for the others.
    """
    mine = validation.truth.images[rank::world]
    chunks = [mine[start : start + EVALUATION_IMAGES] for start in range(0, len(mine), EVALUATION_IMAGES)]
    with ThreadPoolExecutor(1) as ahead:
        loading = ahead.submit(_load_images, storage, validation.folder, chunks[0]) if chunks else None
        for number in range(len(chunks)):
            ready = loading.result() if loading is not None else []
            if number + 1 < len(chunks):
                loading = ahead.submit(_load_images, storage, validation.folder, chunks[number + 1])
            if unusable is not None:
                unusable.update((number, loaded) for number, loaded in ready if isinstance(loaded, str))
            yield [(number, loaded) for number, loaded in ready if isinstance(loaded, Tensor)]


def _load_images(storage: Storage, folder: str, images: Sequence[CocoImage]) -> list[tuple[int, Tensor | str]]:
    """Returns each image with its id, or the reason why it cannot be used. Raises StorageError if the storage is out of
    reach.
    """
    limits = DecodeLimits()
    uris = [relative_to(folder, image.file_name) for image in images]
    loaded: list[tuple[int, Tensor | str]] = []
    for image, got in zip(images, fetch_patiently(storage, uris, max_bytes=limits.max_bytes), strict=True):
        if got.may_pass:
            raise StorageError(str(got.error))
        decoded = decode(got.data, limits) if got.data is not None else None
        reason = got.error if decoded is None else decoded.error
        if decoded is not None and decoded.image is not None:
            reason = wrong_size((decoded.image.shape[2], decoded.image.shape[1]), image)
            if reason is None:
                loaded.append((image.id, decoded.image))
                continue
        loaded.append((image.id, f"{image.file_name}: {reason}"))
    return loaded


def _is_best(history: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether the last epoch was scored and no earlier one scored higher."""
    scores = [best_score(row) for row in history]
    return bool(scores) and scores[-1] is not None and all(score is None or score <= scores[-1] for score in scores)


def best_score(row: Mapping[str, Any]) -> float | None:
    """Returns the score that `--keep best` compares: mask AP if there is any, else box AP; for an RPN alone, its recall."""
    scores = row.get("ap") or row.get("recall") or {}
    return next((scores[name] for name in COMPARED if scores.get(name) is not None), None)
