"""Metrics of labels: COCO's average precision for boxes, masks and keypoints, and the mean IoU of the foreground.

faster-coco-eval matches detections with the ground truth (equal to pycocotools on every published fixture, 2 to 8 times
faster). This module converts each kind of result to the form that it needs, and reads precision and recall from its arrays, so
that any number of detections per image can be scored (the summary of pycocotools supports only 100).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pycocotools.mask
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray

from masklake.model.config import Category
from masklake.model.errors import ConfigError
from masklake.model.instances import Instances
from masklake.model.wording import agreeing, counted
from masklake.pipeline.coco.dataset import CocoDataset
from masklake.pipeline.coco.document import box_outline, to_document, to_rle
from masklake.pipeline.coco.values import CocoImage
from masklake.pipeline.results.fields import MAX_DETS, MOST_DETECTIONS
from masklake.pipeline.table.fields import LIKELY_SCORE

IouType = Literal["bbox", "segm", "keypoints"]

KIND_NAMES: Mapping[IouType, str] = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
"""Common names of COCO's kinds of results."""

FIELDS: Mapping[IouType, str] = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
"""The field of a COCO result row for each kind."""

KEYPOINT_MAX_DETS = (20,)
"""COCO scores keypoints on the 20 best detections per image."""

# The standard deviation of annotators' clicks, per keypoint of COCO's person, in units of the object's scale.
COCO_SIGMAS: tuple[float, ...] = tuple(
    sigma
    for sigma, count in (
        (0.026, 1),
        (0.025, 2),
        (0.035, 2),
        (0.079, 2),
        (0.072, 2),
        (0.062, 2),
        (0.107, 2),
        (0.087, 2),
        (0.089, 2),
    )
    for _ in range(count)
)
OTHER_SIGMA = 0.05
"""Sigma of keypoints that COCO did not measure: the middle of its range."""

PROPOSAL_COUNTS = (100, 1000)
"""Numbers of proposals per image for which recall is measured: the usual number of detections, and the number of proposals of
an RPN with FPN.
"""

AREAS = ("all", "small", "medium", "large")
"""Area ranges: below 32 x 32 pixels, below 96 x 96, above. Keypoints have no "small"."""


@dataclass(frozen=True)
class Score:
    """COCO's numbers for one kind of result, in 0..1; None if the ground truth has nothing of the kind.

    `ap`, `ap50`, `ap75`, `ap_by_area`, `ap_by_category`, `ar50` and `ar75` are at the largest of `max_dets`. `by_max_dets`
    gives AP, AP50 and AR for each of `max_dets`. `ar_by_area` has no "all": that is the AR in `by_max_dets` at the largest of
    `max_dets`.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_by_area: dict[str, float | None]
    ar_by_area: dict[str, float | None]
    by_max_dets: dict[int, dict[str, float | None]]
    ap_by_category: dict[str, float | None]
    ar50: float | None = None
    ar75: float | None = None


def coco_metrics(
    truth: CocoDataset,
    detections: Iterable[Mapping[str, Any]],
    iou_types: Sequence[IouType] | None = None,
    max_dets: Sequence[int] = MAX_DETS,
    sigmas: Mapping[str, Sequence[float]] | None = None,
) -> dict[IouType, Score]:
    """Returns COCO's average precision and recall of `detections` against `truth`, by kind of result.

    detections: COCO result rows with image_id, category_id, score, and bbox (x, y, width, height), segmentation (run-length
    encoding) or keypoints (x, y, score of each keypoint, flat). iou_types: the kinds to score; None scores those that both the
    ground truth and the detections have. max_dets: maximum numbers of detections per image, for boxes and masks. sigmas: one
    per keypoint, by category name; default: COCO's for 17 keypoints, else 0.05. Raises ConfigError for detections in images
    that the ground truth does not list, and for a kind that the ground truth or the detections do not have.
    """
    if not max_dets or not all(1 <= count <= MOST_DETECTIONS for count in max_dets):
        raise ConfigError(f"max_dets are numbers of detections from 1 to {MOST_DETECTIONS}, not {list(max_dets)}.")
    rows = list(detections)
    known = {image.id for image in truth.images}
    if strays := {row["image_id"] for row in rows} - known:
        count = counted(len(strays), "image of the detections is not in", "images of the detections are not in")
        raise ConfigError(f"{count} {truth.source}, {agreeing(len(strays), 'the one with id', 'such as')} {min(strays)}.")
    kinds = answerable(truth, rows) if iou_types is None else tuple(iou_types)
    for kind in kinds:
        if kind not in answerable(truth, rows):
            raise ConfigError(f"{kind} cannot be scored: {truth.source} or the detections have none.")
    return {kind: _score(truth, rows, kind, sorted(set(max_dets)), sigmas or {}) for kind in kinds}


def proposal_recall(
    truth: CocoDataset, proposals: Iterable[Mapping[str, Any]], counts: Sequence[int] = PROPOSAL_COUNTS
) -> dict[str, float | None]:
    """Returns the average recall of class-agnostic boxes: the mean over IoU 0.50 to 0.95, among the first `counts` per image.

    proposals: rows of `image_id` and `boxes`, (P, 4) xyxy, best first. The result has a key `proposal AR<count>` for each
    count.
    """
    thing = Category(id=1, name="object")
    annotations = {
        image_id: tuple(replace(row, category_id=thing.id) for row in rows) for image_id, rows in truth.annotations.items()
    }
    objects = replace(truth, categories=(thing,), annotations=annotations)
    rows = [
        {"image_id": row["image_id"], "category_id": thing.id, "score": 1 / place, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for row in proposals
        for place, (x1, y1, x2, y2) in enumerate(row["boxes"].tolist(), start=1)
    ]
    found = coco_metrics(objects, rows, ["bbox"], counts)["bbox"]
    return {f"proposal AR{count}": found.by_max_dets[count]["ar"] for count in counts}


def answerable(truth: CocoDataset, detections: Sequence[Mapping[str, Any]]) -> tuple[IouType, ...]:
    """Returns the kinds that both sides have; without any detections, all that the ground truth has (they score 0)."""
    kinds: list[IouType] = ["bbox"]
    if truth.has_masks and (not detections or any("segmentation" in row for row in detections)):
        kinds.append("segm")
    if truth.has_keypoints and (not detections or any("keypoints" in row for row in detections)):
        kinds.append("keypoints")
    return tuple(kinds)


def _score(
    truth: CocoDataset,
    detections: Sequence[Mapping[str, Any]],
    kind: IouType,
    max_dets: Sequence[int],
    sigmas: Mapping[str, Sequence[float]],
) -> Score:
    numbers = _Numbers(truth)
    document = numbers.renumbered(_ignoring_incomplete(to_document(truth), kind, truth))
    rows = [numbers.result(row, kind) for row in detections if row.get(FIELDS[kind]) is not None]
    if kind != "keypoints":
        arrays = [_evaluate(document, rows, kind, max_dets, [numbers.categories[c.id] for c in truth.categories], None)]
        return _summarise(arrays, list(truth.categories), max_dets, AREAS)
    # One pass per category, because each has its own keypoints and sigmas.
    categories = [category for category in truth.categories if category.keypoints]
    arrays = [
        _evaluate(document, rows, kind, KEYPOINT_MAX_DETS, [numbers.categories[c.id]], keypoint_sigmas(c, sigmas))
        for c in categories
    ]
    return _summarise(arrays, categories, KEYPOINT_MAX_DETS, ("all", "medium", "large"))


def _ignoring_incomplete(document: dict[str, Any], kind: IouType, truth: CocoDataset) -> dict[str, Any]:
    """Returns the document with instances that lack the ground truth of this kind marked so that they do not count.

    For masks, the box of an instance without an outline becomes a crowd region. For keypoints, an instance without any gets
    unlabelled ones, and COCO's evaluators ignore it.
    """
    counts = {category.id: len(category.keypoints) for category in truth.categories}
    for row in document["annotations"]:
        if kind == "segm" and "segmentation" not in row:
            row |= {"segmentation": [box_outline(row["bbox"])], "iscrowd": 1}
        if kind == "keypoints" and "keypoints" not in row:
            row |= {"keypoints": [0.0] * 3 * counts[row["category_id"]], "num_keypoints": 0}
    return document


class _Numbers:
    """Consecutive numbers from 1 for images and categories, in the order of their ids, because the evaluator's integers are
    narrower than COCO's ids.
    """

    def __init__(self, truth: CocoDataset) -> None:
        self.images = {number: n for n, number in enumerate(sorted(image.id for image in truth.images), start=1)}
        self.categories = {number: n for n, number in enumerate(sorted(c.id for c in truth.categories), start=1)}

    def renumbered(self, document: dict[str, Any]) -> dict[str, Any]:
        """Returns a COCO document with these numbers."""
        return {
            "images": [{**row, "id": self.images[row["id"]]} for row in document["images"]],
            "categories": [{**row, "id": self.categories[row["id"]]} for row in document["categories"]],
            "annotations": [
                {**row, "image_id": self.images[row["image_id"]], "category_id": self.categories[row["category_id"]]}
                for row in document["annotations"]
            ],
        }

    def result(self, row: Mapping[str, Any], kind: IouType) -> dict[str, Any]:
        """Returns a result row with these numbers (0 for a category that the ground truth does not have) and only the field for
        `kind`: the evaluator takes an object's area from the first field it knows.
        """
        return {
            "image_id": self.images[row["image_id"]],
            "category_id": self.categories.get(row["category_id"], 0),
            "score": row["score"],
            FIELDS[kind]: row[FIELDS[kind]],
        }


def keypoint_sigmas(category: Category, sigmas: Mapping[str, Sequence[float]]) -> list[float]:
    """Returns one sigma per keypoint. Raises ConfigError if another number of sigmas is given."""
    count = len(category.keypoints)
    chosen = list(sigmas.get(category.name, COCO_SIGMAS if count == len(COCO_SIGMAS) else [OTHER_SIGMA] * count))
    if len(chosen) != count:
        raise ConfigError(
            f"'{category.name}' has {counted(count, 'keypoint')}; {counted(len(chosen), 'sigma was', 'sigmas were')} given."
        )
    return chosen


def _evaluate(
    document: dict[str, Any],
    rows: list[dict[str, Any]],
    kind: IouType,
    max_dets: Sequence[int],
    category_ids: Sequence[int],
    sigmas: list[float] | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns precision (IoU thresholds, recall points, categories, areas, max_dets) and recall (the same without recall
    points).
    """
    chosen = set(category_ids)
    truth = COCO({**document, "annotations": [dict(a) for a in document["annotations"] if a["category_id"] in chosen]})
    found = truth.loadRes([dict(row) for row in rows if row["category_id"] in chosen])
    arguments = {} if sigmas is None else {"kpt_oks_sigmas": sigmas}
    evaluation = COCOeval_faster(truth, found, kind, **arguments)
    evaluation.params.catIds = list(category_ids)
    evaluation.params.maxDets = list(max_dets)
    evaluation.evaluate()
    evaluation.accumulate()
    shape = evaluation.eval["counts"]
    precision = np.asarray(evaluation.eval["precision"]).reshape(shape)
    return precision, np.asarray(evaluation.eval["recall"]).reshape([shape[0], *shape[2:]])


def _summarise(
    arrays: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
    categories: Sequence[Category],
    max_dets: Sequence[int],
    areas: Sequence[str],
) -> Score:
    precision = np.concatenate([p for p, _ in arrays], axis=2)
    recall = np.concatenate([r for _, r in arrays], axis=1)
    # IoU thresholds are 0.50, 0.55, ... 0.95: 0 is AP50, 5 is AP75. Areas: 0 is "all". The last of max_dets is the greatest.
    by_max_dets = {
        count: {
            "ap": _mean(precision[:, :, :, 0, m]),
            "ap50": _mean(precision[0, :, :, 0, m]),
            "ar": _mean(recall[:, :, 0, m]),
        }
        for m, count in enumerate(max_dets)
    }
    return Score(
        ap=_mean(precision[:, :, :, 0, -1]),
        ap50=_mean(precision[0, :, :, 0, -1]),
        ap75=_mean(precision[5, :, :, 0, -1]),
        ap_by_area={area: _mean(precision[:, :, :, a, -1]) for a, area in enumerate(areas) if a},
        ar_by_area={area: _mean(recall[:, :, a, -1]) for a, area in enumerate(areas) if a},
        by_max_dets=by_max_dets,
        ap_by_category={c.name: _mean(precision[:, :, k, 0, -1]) for k, c in enumerate(categories)},
        ar50=_mean(recall[0, :, 0, -1]),
        ar75=_mean(recall[5, :, 0, -1]),
    )


def _mean(values: NDArray[np.float64]) -> float | None:
    """Returns the mean of the defined values; the evaluator writes -1 where the ground truth has nothing."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def mean_iou(
    truth: CocoDataset, detections: Iterable[Mapping[str, Any]], score_threshold: float = LIKELY_SCORE
) -> float | None:
    """Returns the foreground IoU: for each class the mean of intersection over union (pixels) over images, then the mean over
    classes.

    The masks of a class are united first, so the value says how well pixels are found, not how well instances are separated. An
    image counts for a class that either side has in it. Detections below `score_threshold` do not count. Neither do pixels of
    crowd regions and of boxes of instances without an outline, unless the ground truth assigns them to another instance. None
    if no image counts.
    """
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in detections:
        if row["score"] >= score_threshold and row.get("segmentation") is not None:
            found.setdefault((row["category_id"], row["image_id"]), []).append(dict(row["segmentation"]))
    means = []
    for category in truth.categories:
        shares = [_image_iou(truth, image, category.id, found.get((category.id, image.id), [])) for image in truth.images]
        known = [share for share in shares if share is not None]
        if known:
            means.append(float(np.mean(known)))
    return float(np.mean(means)) if means else None


def _image_iou(truth: CocoDataset, image: CocoImage, category_id: int, found: list[dict[str, Any]]) -> float | None:
    size = image.height, image.width
    rows = [a for a in truth.annotations.get(image.id, ()) if a.category_id == category_id]
    known = [a.segmentation for a in rows if a.segmentation is not None and not a.crowd]
    if not found and not known:
        return None
    nothing: dict[str, Any] = to_rle({"size": list(size), "counts": [math.prod(size)]}, 0, 0)
    real = _united([nothing, *(to_rle(segmentation, *size) for segmentation in known)])
    unknown = [a.segmentation or [box_outline(a.bbox)] for a in rows if a.crowd or a.segmentation is None]
    crowd = _united([nothing, *(to_rle(segmentation, *size) for segmentation in unknown)])
    guess = _united([nothing, *found])
    either = _united([real, guess])
    ignored = _area(_common(either, crowd)) - _area(_common(real, crowd))
    area = _area(either) - ignored
    return _area(_common(real, guess)) / area if area else None


def _united(rles: list[dict[str, Any]]) -> dict[str, Any]:
    return dict(pycocotools.mask.merge(rles))


def _common(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    return dict(pycocotools.mask.merge([left, right], intersect=True))


def _area(rle: dict[str, Any]) -> int:
    return int(pycocotools.mask.area(rle))


def result_rows(image_id: int, found: Instances, categories: Mapping[int, Category]) -> list[dict[str, Any]]:
    """Returns COCO result rows for a model's instances in one image. categories: by id, with their keypoints."""
    rows: list[dict[str, Any]] = []
    for n, (box, score, label) in enumerate(
        zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    ):
        x1, y1, x2, y2 = box
        row = {"image_id": image_id, "category_id": label, "score": score, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        if found.rles is not None:
            row["segmentation"] = {"size": list(found.size), "counts": found.rles[n]}
        count = len(categories[label].keypoints)
        if found.keypoints is not None and count:
            row["keypoints"] = found.keypoints[n, :count].ravel().tolist()
        rows.append(row)
    return rows
