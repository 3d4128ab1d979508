"""AP equals pycocotools' on random results and on published fixtures; mean IoU equals its definition on bitmaps."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from masklake.model.errors import ConfigError
from masklake.pipeline.coco.document import to_document
from masklake.pipeline.coco.reading import parse_coco
from masklake.pipeline.results.evaluation import coco_metrics, keypoint_sigmas, mean_iou, proposal_recall

HEIGHT, WIDTH = 90, 120
SIGMAS = {"bird": [0.1, 0.02, 0.05]}


def rectangle(x: int, y: int, width: int, height: int) -> dict[str, Any]:
    bitmap = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    bitmap[y : y + height, x : x + width] = 1
    rle = pycocotools.mask.encode(bitmap)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def random_case(seed: int, instances: int = 6) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Truth with crowds and keypoints of one category, and detections that are near it, far from it, or of another class."""
    random = np.random.default_rng(seed)
    document: dict[str, Any] = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": WIDTH, "height": HEIGHT} for n in range(1, 9)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "bird", "keypoints": ["a", "left_b", "right_b"]}],
        "annotations": [],
    }
    found = []
    for image in range(1, 9):
        for _ in range(int(random.integers(0, instances + 1))):
            x, y, w, h = (int(v) for v in random.integers((0, 0, 4, 4), (80, 60, 40, 30)))
            category = int(random.choice([3, 7]))
            points = [
                int(v) for v in np.stack([random.integers(x, x + w, 3), random.integers(y, y + h, 3), [2, 1, 2]], 1).ravel()
            ]
            row = {"image_id": image, "category_id": category, "bbox": [x, y, w, h], "area": w * h}
            row |= {"segmentation": rectangle(x, y, w, h), "iscrowd": int(random.random() < 0.1)}
            if category == 7:
                row |= {"keypoints": points, "num_keypoints": 3}
            document["annotations"].append({"id": len(document["annotations"]) + 1, **row})
            for _ in range(int(random.integers(0, 4))):
                dx, dy = (int(v) for v in random.integers(-4, 5, 2))
                left, top = max(0, x + dx), max(0, y + dy)
                found.append(
                    {
                        "image_id": image,
                        "category_id": category if random.random() < 0.8 else 10 - category,
                        "score": round(float(random.random()), 3),
                        "bbox": [left, top, w, h],
                        "segmentation": rectangle(left, top, w, h),
                        "keypoints": [float(v) + dx * (k % 3 < 2) for k, v in enumerate(points)],
                    }
                )
    return document, found


@pytest.mark.parametrize("scale", [-1, 2**31, 2**62])
def test_any_ids_give_the_same_scores(scale: int) -> None:
    document, found = random_case(1)
    expected = coco_metrics(parse_coco(document, "truth.json"), found, sigmas=SIGMAS)
    for row in (*document["images"], *document["annotations"], *found):
        key = "id" if "file_name" in row else "image_id"
        row[key] = row[key] + scale
    for row in (*document["categories"], *document["annotations"], *found):
        key = "id" if "name" in row else "category_id"
        row[key] = row[key] - 2**31
    assert coco_metrics(parse_coco(document, "truth.json"), found, sigmas=SIGMAS) == expected


def test_what_lacks_a_kinds_truth_is_no_false_positive_of_it_when_found() -> None:
    """Two birds, both found exactly: one has no outline and no keypoints. Boxes ask for both, the rest for the other one."""
    document, _ = random_case(1, instances=0)
    points = [12, 12, 2, 20, 20, 2, 25, 14, 2]
    whole = {
        "category_id": 7,
        "bbox": [10, 10, 20, 15],
        "area": 300,
        "segmentation": rectangle(10, 10, 20, 15),
        "keypoints": points,
    }
    document["annotations"] = [{"id": 1, "image_id": 1, **whole}, {"id": 2, "image_id": 2, **whole}]
    found = [{"image_id": n, "score": 0.9 - n / 10, **whole} for n in (2, 1)]
    for key in ("segmentation", "keypoints"):
        del document["annotations"][1][key]
    truth = parse_coco(document, "truth.json")
    scores = coco_metrics(truth, found, sigmas=SIGMAS)
    assert {kind: round(score.ap or 0, 6) for kind, score in scores.items()} == {"bbox": 1, "segm": 1, "keypoints": 1}
    assert mean_iou(truth, found) == 1
    missed = coco_metrics(truth, found[1:], sigmas=SIGMAS)
    assert (missed["bbox"].ar50, missed["segm"].ar50, missed["keypoints"].ar50) == (0.5, 1, 1)


def oracle(document: dict[str, Any], rows: list[dict[str, Any]], kind: str, max_dets: list[int]) -> COCOeval:
    """pycocotools, given each kind's own field only."""
    field = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[kind]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps(document))
        truth.createIndex()
        keys = ("image_id", "category_id", "score", field)
        evaluation = COCOeval(truth, truth.loadRes([{k: row[k] for k in keys} for row in rows]), kind)
        evaluation.params.maxDets = max_dets
        if kind == "keypoints":
            evaluation.params.catIds = [7]
            evaluation.params.kpt_oks_sigmas = np.array(SIGMAS["bird"])
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def mean(values: np.ndarray) -> float | None:
    return float(values[values > -1].mean()) if (values > -1).any() else None


@pytest.mark.parametrize("seed", range(4))
def test_random_results_score_as_in_pycocotools(seed: int) -> None:
    document, found = random_case(seed)
    scores = coco_metrics(parse_coco(document, "truth.json"), found, max_dets=(1, 2, 5), sigmas=SIGMAS)
    assert set(scores) == {"bbox", "segm", "keypoints"}
    for kind, score in scores.items():
        max_dets = [20] if kind == "keypoints" else [1, 2, 5]
        expected = oracle(document, found, kind, max_dets).eval
        for m, count in enumerate(max_dets):
            assert score.by_max_dets[count]["ap"] == pytest.approx(mean(expected["precision"][..., 0, m]), abs=1e-9)
            assert score.by_max_dets[count]["ap50"] == pytest.approx(mean(expected["precision"][0, ..., 0, m]), abs=1e-9)
            assert score.by_max_dets[count]["ar"] == pytest.approx(mean(expected["recall"][..., 0, m]), abs=1e-9)
        assert score.ap == score.by_max_dets[max_dets[-1]]["ap"]
        for a, area in enumerate(score.ap_by_area, start=1):
            assert score.ap_by_area[area] == pytest.approx(mean(expected["precision"][:, :, :, a, -1]), abs=1e-9)


def test_more_detections_than_100_can_count() -> None:
    boxes = [(x, y) for x in range(0, 112, 8) for y in range(0, 80, 8)]  # 140 objects
    document = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [x, y, 6, 6], "area": 36} for x, y in boxes],
    }
    found = [{"image_id": 1, "category_id": 1, "score": 0.9, "bbox": [x, y, 6, 6]} for x, y in boxes]
    score = coco_metrics(parse_coco(document, "cells.json"), found, max_dets=(100, 500))["bbox"]
    assert score.by_max_dets[100]["ar"] == pytest.approx(100 / 140)
    assert score.ap == score.by_max_dets[500]["ap"] == pytest.approx(1.0)


def test_no_detections_score_zero() -> None:
    document, _ = random_case(0)
    scores = coco_metrics(parse_coco(document, "truth.json"), [])
    assert {kind: score.ap for kind, score in scores.items()} == {"bbox": 0.0, "segm": 0.0, "keypoints": 0.0}


def test_what_cannot_be_scored_is_said() -> None:
    document, found = random_case(0)
    truth = parse_coco(document, "truth.json")
    boxes = [{k: row[k] for k in ("image_id", "category_id", "score", "bbox")} for row in found]
    with pytest.raises(ConfigError, match="segm cannot be scored"):
        coco_metrics(truth, boxes, iou_types=["segm"])
    with pytest.raises(ConfigError, match=r"^1 image of the detections is not in truth\.json, the one with id 99"):
        coco_metrics(truth, [{**boxes[0], "image_id": 99}])
    with pytest.raises(ConfigError, match="3 keypoints; 2 sigmas were"):
        keypoint_sigmas(truth.categories[1], {"bird": [0.1, 0.1]})


def test_a_crowd_without_an_outline_takes_its_box() -> None:
    document, found = random_case(1)
    document["annotations"].append({"image_id": 1, "category_id": 3, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 1})
    assert "segm" in coco_metrics(parse_coco(document, "truth.json"), found)


def bitmap_iou(document: dict[str, Any], found: list[dict[str, Any]], threshold: float) -> float:
    """The definition, on bitmaps."""
    means = []
    for category in document["categories"]:
        shares = []
        for image in document["images"]:
            planes = [np.zeros((HEIGHT, WIDTH), bool) for _ in range(3)]  # real, crowd, guess
            rows = [(a, 1 if a["iscrowd"] else 0) for a in document["annotations"]]
            rows += [(d, 2) for d in found if d["score"] >= threshold]
            mine = [(r, p) for r, p in rows if r["image_id"] == image["id"] and r["category_id"] == category["id"]]
            for row, plane in mine:
                planes[plane] |= pycocotools.mask.decode(row["segmentation"]).astype(bool)
            real, crowd, guess = planes
            counted = (real | guess) & ~(crowd & ~real)
            if counted.any():
                shares.append((real & guess).sum() / counted.sum())
        means.append(np.mean(shares))
    return float(np.mean(means))


@pytest.mark.parametrize("seed", range(4))
def test_mean_iou_is_its_definition(seed: int) -> None:
    document, found = random_case(seed)
    truth = parse_coco(document, "truth.json")
    assert mean_iou(truth, found, 0.4) == pytest.approx(bitmap_iou(document, found, 0.4), abs=1e-12)
    assert mean_iou(truth, []) == 0.0
    perfect = [{"score": 1.0, **row} for row in document["annotations"] if not row["iscrowd"]]
    assert mean_iou(truth, perfect) == pytest.approx(1.0)


# Published numbers (val2014_fake_eval_res.txt of cocoapi; keypoints by pycocotools), in the order of COCOeval.stats.
PUBLISHED = {
    (
        "cocoapi_val2014_100/instances_val2014_100.json",
        "cocoapi_val2014_100/instances_val2014_fakebbox100_results.json",
        "bbox",
    ): (*(0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564),),
    (
        "cocoapi_val2014_100/instances_val2014_100.json",
        "cocoapi_val2014_100/instances_val2014_fakesegm100_results.json",
        "segm",
    ): (*(0.320, 0.562, 0.299, 0.387, 0.310, 0.327, 0.268, 0.415, 0.417, 0.469, 0.377, 0.381),),
    ("xtcocotools/example_coco_val.json", "xtcocotools/example_coco_preds.json", "keypoints"): (
        *(0.861, 0.993, 0.911, 0.776, 0.937, 0.875, 1.0, 0.917, 0.780, 0.943),
    ),
    ("faster_coco_eval/keypoints_dataset/gt_dataset.json", "faster_coco_eval/keypoints_dataset/dt_dataset.json", "keypoints"): (
        *(0.505, 0.723, 0.634, 0.466, 0.751, 0.518, 0.727, 0.636, 0.467, 0.750),
    ),
}


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"{Path(case[1]).stem}-{case[2]}")
def test_published_numbers_are_reproduced(case: tuple[str, str, Any], shared_data: Path) -> None:
    folder = shared_data / "coco_eval_fixtures"
    truth = parse_coco(json.loads((folder / case[0]).read_text()), case[0])
    found = json.loads((folder / case[1]).read_text())
    score = coco_metrics(truth, found, iou_types=[case[2]])[case[2]]
    recalls = [score.ar50, score.ar75] if case[2] == "keypoints" else []
    counts = [row["ar"] for row in score.by_max_dets.values()]
    order = [score.ap, score.ap50, score.ap75, *score.ap_by_area.values(), *counts, *recalls, *score.ar_by_area.values()]
    assert order == pytest.approx(PUBLISHED[case], abs=6e-4)


def test_a_document_survives_the_reader() -> None:
    document, _ = random_case(2)
    truth = parse_coco(document, "truth.json")
    assert parse_coco(to_document(truth), "truth.json") == truth


def test_recall_of_proposals_is_pycocotools_without_categories() -> None:
    document, _ = random_case(4)
    random = np.random.default_rng(0)
    proposals = []
    for image in range(1, 9):
        corner, size = random.uniform(0, (80, 60), (150, 2)), random.uniform(4, (40, 30), (150, 2))
        proposals.append({"image_id": image, "boxes": np.concatenate([corner, corner + size], axis=1)})
    rows = [
        {"image_id": row["image_id"], "category_id": 3, "score": 1 - n / 150, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for row in proposals
        for n, (x1, y1, x2, y2) in enumerate(row["boxes"].tolist())
    ]
    truth = parse_coco(document, "random")
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO()
        theirs.dataset = to_document(truth)
        theirs.createIndex()
        evaluation = COCOeval(theirs, theirs.loadRes(rows), "bbox")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = [20, 100]
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"][:, 0, 0]  # IoU thresholds, detections
    expected = {"proposal AR20": recall[:, 0].mean(), "proposal AR100": recall[:, 1].mean()}
    assert proposal_recall(truth, proposals, (20, 100)) == pytest.approx(expected)
    assert expected["proposal AR20"] < expected["proposal AR100"]


def test_one_proposal_on_each_object_is_full_recall_when_it_is_among_the_first() -> None:
    square = {"image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20], "area": 400}
    document = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [square],
    }
    boxes = np.array([[60.0, 60, 70, 70]] * 2 + [[10, 10, 30, 30]])
    found = proposal_recall(parse_coco(document, "one"), [{"image_id": 1, "boxes": boxes}], (2, 3))
    assert found == {"proposal AR2": 0, "proposal AR3": 1}
