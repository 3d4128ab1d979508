"""A table against its truth: images are matched, instances counted, and the AP is that of the rows scored directly."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from masklake.jobs import evaluate
from masklake.jobs.commands import app
from masklake.jobs.shapes import generate
from masklake.model.errors import ConfigError
from masklake.model.masks.rle import pack_counts
from masklake.pipeline.coco.document import to_rle
from masklake.pipeline.coco.reading import parse_coco, read_coco
from masklake.pipeline.errors import AnnotationError, InputNotFoundError, TableError
from masklake.pipeline.results.coco_results import ImageNames, Matches
from masklake.pipeline.results.evaluation import coco_metrics, mean_iou
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.schema import FILE_SCHEMA
from masklake.pipeline.table.table import open_table


def write_table(uri: str, rows: list[dict[str, Any]], run: str = "run") -> None:
    table = open_table(Storage(), uri)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=FILE_SCHEMA), sink)
    table.storage.write_bytes(table.storage.join(table.run_folder(run), "part.parquet"), sink.getvalue().to_pybytes())
    assert table.commit_run(run)


def labelled(truth_json: Path, folder: str, skip: int = 0, failed: int = 0) -> list[dict[str, Any]]:
    """Rows of a labeller that sees almost everything right: moved boxes, a few missed, one too many."""
    truth = read_coco(Storage(), str(truth_json))
    names = {category.id: category.name for category in truth.categories}
    random = np.random.default_rng(0)
    rows = []
    for n, image in enumerate(truth.images[skip:]):
        ok = n >= failed
        found = [a for a in truth.annotations.get(image.id, ()) if random.random() < 0.8] if ok else []
        moved = [np.round(np.array(a.bbox) + random.uniform(-1, 1, 4), 2) for a in found]
        rows.append(
            {
                "image_id": n,
                "uri": f"{folder}/{image.file_name}",
                "width": image.width,
                "height": image.height,
                "status": "ok" if ok else "decode_error",
                "error": None if ok else "cut off",
                "labelled_at": datetime.now(UTC),
                "instances": [
                    {
                        "category_id": a.category_id,
                        "category": names[a.category_id],
                        "score": float(random.random()),
                        "box": {"x1": x, "y1": y, "x2": x + w, "y2": y + h},
                        "area": 1,
                    }
                    for a, (x, y, w, h) in zip(found, moved, strict=True)
                ],
                "rles": [to_rle(a.segmentation, image.height, image.width)["counts"] for a in found],
                "keypoints": [
                    [{"x": x + 1, "y": y, "score": 1.0} for x, y, _ in np.reshape(a.keypoints, (-1, 3)).tolist()] for a in found
                ],
            }
        )
    return rows


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("shapes"), 12, 96, seed=5)


def test_a_table_scores_as_its_rows_do(shapes: Path, tmp_path: Path) -> None:
    rows = labelled(shapes, "s3://somewhere/else/images")
    stranger = {**rows[0], "image_id": 99, "uri": "s3://somewhere/else/other.jpg"}
    write_table(str(tmp_path / "table"), [*rows, stranger])
    report = evaluate.run(Storage(), str(tmp_path / "table"), str(shapes), output=str(tmp_path / "report.json"))

    truth = read_coco(Storage(), str(shapes))
    direct = []
    for row, image in zip(rows, truth.images, strict=True):
        for n, instance in enumerate(row["instances"]):
            x1, y1, x2, y2 = (float(np.float32(instance["box"][side])) for side in ("x1", "y1", "x2", "y2"))
            result = {"image_id": image.id, "category_id": instance["category_id"], "score": instance["score"]}
            result |= {"bbox": [x1, y1, x2 - x1, y2 - y1]}
            result |= {"segmentation": {"size": [image.height, image.width], "counts": row["rles"][n]}}
            if row["keypoints"][n]:
                result["keypoints"] = [v for p in row["keypoints"][n] for v in (p["x"], p["y"], p["score"])]
            direct.append(result)
    expected = coco_metrics(truth, direct)
    assert set(report.scores) == {"bbox", "segm", "keypoints"}
    for kind, score in expected.items():
        assert report.scores[kind]["ap"] == pytest.approx(score.ap, abs=1e-6)
    assert expected["segm"].ap is not None
    assert expected["segm"].ap > 0.5
    assert report.mean_iou == pytest.approx(mean_iou(truth, direct), abs=1e-9)
    assert (report.images, report.labelled, report.failed, report.missing, report.strangers) == (12, 12, 0, 0, 1)
    assert json.loads((tmp_path / "report.json").read_text())["scores"]["bbox"]["ap"] == report.scores["bbox"]["ap"]


def test_images_that_failed_or_are_absent_count_as_empty(shapes: Path, tmp_path: Path) -> None:
    write_table(str(tmp_path / "table"), labelled(shapes, "/photos", skip=3, failed=2))
    report = evaluate.run(Storage(), str(tmp_path / "table"), str(shapes))
    assert (report.images, report.labelled, report.failed, report.missing) == (12, 7, 2, 3)
    text = evaluate.describe(report)
    assert "7 labelled, 2 failed, 3 not in the table (these two count as images without detections)" in text
    assert re.search(r"mask +<= 100 +\d+\.\d +\d+\.\d +\d+\.\d", text)


def test_it_is_said_why_images_failed_and_what_the_truth_lacks(shapes: Path, tmp_path: Path) -> None:
    document = json.loads(shapes.read_text())
    for row in document["annotations"][:3]:
        row["segmentation"] = []
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps(document))
    rows = labelled(truth, "/photos", failed=3)
    rows[2]["status"] = "too_large"
    for row in rows[3:]:  # outlines are not what is asked here
        row |= {"rles": [], "keypoints": []}
    write_table(str(tmp_path / "table"), rows)
    report = evaluate.run(Storage(), str(tmp_path / "table"), str(truth))
    assert report.failures == {"decode_error": 2, "too_large": 1}
    assert report.incomplete["without an outline"] == 3
    text = evaluate.describe(report)
    assert "note: images that failed count as images without detections: 2 decode_error, 1 too_large; such as /photos/" in text
    assert (
        "note: 3 instances of the truth without an outline are left out of that task's scores and count in the others" in text
    )


def test_one_of_each_reads_as_one(shapes: Path, tmp_path: Path) -> None:
    document = json.loads(shapes.read_text())
    document["annotations"][0]["segmentation"] = []
    document["images"] = document["images"][:1]
    document["annotations"] = [row for row in document["annotations"] if row["image_id"] == document["images"][0]["id"]]
    document["annotations"].append({**document["annotations"][0], "id": 999, "bbox": [3, 3, 0, 5]})
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps(document))
    rows = labelled(truth, "/photos", failed=1)
    stranger = {**rows[0], "image_id": 99, "uri": "/photos/other.jpg"}
    write_table(str(tmp_path / "table"), [*rows, stranger])
    text = evaluate.describe(evaluate.run(Storage(), str(tmp_path / "table"), str(truth), max_unusable=0.5))
    assert f"  1 image with {len(document['annotations']) - 1} instances: 0 labelled, 1 failed, 0 not in the table" in text
    assert "  1 image of the table is not in the truth and does not count\n" in text
    assert "  the truth's reader left out 1 box without an area\n" in text
    assert "note: images that failed count as images without detections: 1 decode_error; /photos/" in text
    assert "note: 1 instance of the truth without an outline is left out of that task's scores and counts in the others" in text


def damage(row: dict[str, Any], what: str, value: Any) -> None:
    """Puts a wrong value into a row's first instance, or into the row itself."""
    if what == "rle":
        row["rles"][0] = value
    elif what == "point":
        row["keypoints"][0] = [{"x": value, "y": 1.0, "score": 1.0}]
    elif what in ("score", "category_id"):
        row["instances"][0][what] = value
    elif what == "x2":
        row["instances"][0]["box"]["x2"] = value
    else:
        row[what] = value


@pytest.mark.parametrize(
    ("what", "value", "said"),
    [
        ("rle", b"garbage\xff\x00", "a mask whose counts are not run lengths"),
        ("rle", b"", "a mask whose runs do not add up to its 96 x 96 pixels"),
        ("rle", to_rle([[1, 1, 5, 1, 5, 5]], 48, 48)["counts"], "a mask whose runs do not add up to its 96 x 96 pixels"),
        ("rle", pack_counts(np.array([5, -3, 9214]), np.array([3]))[0], "a mask whose runs do not add up"),
        ("rle", pack_counts(np.array([2**40, 2**40]), np.array([2]))[0], "a mask whose runs do not add up"),
        ("rles", [b""] * 99, "instances and 99 rles"),
        ("width", None, "its image the size None x 96"),
        ("height", -96, "its image the size 96 x -96"),
        ("score", math.nan, "has the score nan"),
        ("score", None, "has the score None"),
        ("score", 7.0, "has the score 7.0; a score is 0 to 1"),
        ("category_id", None, "has no category"),
        ("x2", math.inf, "has the box"),
        ("x2", -50.0, "has the box"),
        ("point", math.nan, "has the keypoint"),
        ("instances", None, "has no list of instances"),
        ("instances", [None], "is null"),
    ],
)
def test_numbers_that_cannot_be_scored_are_a_table_error_that_names_the_image(
    shapes: Path, tmp_path: Path, what: str, value: Any, said: str
) -> None:
    rows = labelled(shapes, "/photos")
    row = next(row for row in rows if row["instances"])
    if what == "instances":
        row |= {"rles": [], "keypoints": []}
    damage(row, what, value)
    write_table(str(tmp_path / "table"), rows)
    with pytest.raises(TableError) as error:
        evaluate.run(Storage(), str(tmp_path / "table"), str(shapes))
    assert said in str(error.value)
    assert str(error.value).startswith(row["uri"])


def test_keypoints_of_another_category_are_refused_by_name(shapes: Path, tmp_path: Path) -> None:
    rows = labelled(shapes, "/photos")
    for row in rows:
        row["keypoints"] = [[*points, *points[:1]] for points in row["keypoints"]]
    write_table(str(tmp_path / "table"), rows)
    with pytest.raises(ConfigError, match=r"category \d+ \(\w+\) has \d keypoints in the table and \d in .*json"):
        evaluate.run(Storage(), str(tmp_path / "table"), str(shapes))


def test_one_run_can_be_scored(shapes: Path, tmp_path: Path) -> None:
    write_table(str(tmp_path / "table"), labelled(shapes, "/photos"), "night-1")
    write_table(str(tmp_path / "table"), labelled(shapes, "/photos", failed=12), "night-2")
    assert evaluate.run(Storage(), str(tmp_path / "table"), str(shapes), labelling_run="night-2").labelled == 0
    assert evaluate.run(Storage(), str(tmp_path / "table"), str(shapes)).labelled == 12


def test_a_run_that_is_not_there_is_named(shapes: Path, tmp_path: Path) -> None:
    write_table(str(tmp_path / "table"), labelled(shapes, "/photos"), "night-1")
    with pytest.raises(InputNotFoundError, match="has no run 'nosuch'; its runs: night-1"):
        evaluate.run(Storage(), str(tmp_path / "table"), str(shapes), labelling_run="nosuch")


def test_what_looks_wrong_is_noted(shapes: Path, tmp_path: Path) -> None:
    rows = labelled(shapes, "/photos")
    for row in rows:
        for instance in row["instances"]:
            instance["category"] = instance["category"].replace("disk", "person")
            if instance["category"] == "triangle":
                instance |= {"category_id": 77, "category": "cat"}
    write_table(str(tmp_path / "table"), rows)
    assert evaluate.run(Storage(), str(tmp_path / "table"), str(shapes)).notes == [
        "category 1 is 'person' in the table and 'disk' in the truth",
        "the truth has no category of these detections, which do not count: cat",
    ]


def test_bad_input_is_named(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(TableError):
        evaluate.run(Storage(), str(tmp_path / "none"), str(shapes))
    write_table(str(tmp_path / "table"), labelled(shapes, "/photos"))
    with pytest.raises(
        InputNotFoundError, match=r"none of its 12 images is one of the 12 of .*such as '.*\.jpg', or .*--images"
    ):
        evaluate.run(Storage(), str(tmp_path / "table"), str(shapes), images="/elsewhere")
    write_table(str(tmp_path / "single"), labelled(shapes, "/photos")[:1])
    with pytest.raises(InputNotFoundError, match=r"single: its only image is not one of the 12 of .*--images"):
        evaluate.run(Storage(), str(tmp_path / "single"), str(shapes), images="/elsewhere")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(AnnotationError, match="no list 'images'"):
        evaluate.run(Storage(), str(tmp_path / "table"), str(tmp_path / "bad.json"))
    document = json.loads(shapes.read_text())
    for image in document["images"]:
        image["width"], image["height"] = 300, 300
    for row in document["annotations"]:
        row["segmentation"] = [[1, 1, 9, 1, 9, 9]]
    (tmp_path / "turned.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="is 300 x 300 pixels; it was labelled as"):
        evaluate.run(Storage(), str(tmp_path / "table"), str(tmp_path / "turned.json"))


def test_a_truth_of_which_too_much_is_left_out_is_refused(shapes: Path, tmp_path: Path) -> None:
    write_table(str(tmp_path / "table"), labelled(shapes, "s3://b/images"))
    document = json.loads(shapes.read_text())
    whole = len(document["annotations"])
    for row in document["annotations"][: whole // 4]:
        row["bbox"][2] = 0
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps(document))
    command = ["evaluate", str(tmp_path / "table"), "--truth", str(truth)]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, AnnotationError)
    assert f"{whole // 4} of the {whole} instances of {truth} cannot be used" in str(refused.exception)
    assert "allow more than 5% of the instances to be left out with --max-unusable." in str(refused.exception)
    allowed = CliRunner().invoke(app, [*command, "--max-unusable", "0.25"])
    assert allowed.exit_code == 0
    assert f"the truth's reader left out {whole // 4} boxes without an area" in allowed.output


def test_a_report_does_not_overwrite_its_truth(shapes: Path, tmp_path: Path) -> None:
    truth = tmp_path / "e1.json"
    truth.write_bytes(shapes.read_bytes())
    with pytest.raises(ConfigError, match=r"e1\.json: is the file of --truth, which this would overwrite"):
        evaluate.run(Storage(), str(tmp_path / "table"), str(truth), output=str(truth))
    assert truth.read_bytes() == shapes.read_bytes()


def names_of(*file_names: str, folder: str | None = None) -> ImageNames:
    images = [{"id": n, "file_name": name, "width": 9, "height": 9} for n, name in enumerate(file_names)]
    return ImageNames(parse_coco({"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}, "t"), folder)


def test_images_are_found_by_the_end_of_their_uri() -> None:
    assert names_of("a.jpg", "b.jpg").match(["s3://bucket/val/b.jpg"]).image_ids == {"s3://bucket/val/b.jpg": 1}
    assert names_of("x/a.jpg", "y/a.jpg").match(["/data/y/a.jpg"]).image_ids == {"/data/y/a.jpg": 1}
    assert names_of("val2017/a.jpg").match(["/photos/a.jpg"]).image_ids == {"/photos/a.jpg": 0}
    assert names_of("a.jpg").match(["/photos/ba.jpg"]) == Matches({}, [])
    assert names_of("x/a.jpg", "y/a.jpg").match(["/data/a.jpg"]) == Matches({}, ["/data/a.jpg"])  # could be either
    with pytest.raises(ConfigError, match=r"/one/a\.jpg and /two/a\.jpg both fit a\.jpg .*--images"):
        names_of("a.jpg").match(["/one/a.jpg", "/two/a.jpg"])


@pytest.mark.parametrize(
    ("truth", "exact", "other"),
    [
        ("sub/a.jpg", "/photos/sub/a.jpg", "/photos/a.jpg"),
        ("sub/a.jpg", "s3://b/sub/a.jpg", "s3://b/elsewhere/a.jpg"),
        ("a.jpg", "/photos/a.jpg", "/photos/sub/a.jpg"),
        ("/photos/a.jpg", "/photos/a.jpg", "/copies/photos/a.jpg"),
    ],
)
def test_of_two_files_of_one_name_the_exact_one_is_taken(truth: str, exact: str, other: str) -> None:
    for uris in ([exact, other], [other, exact]):
        assert names_of(truth).match(uris).image_ids == {exact: 0}


def test_a_folder_makes_the_choice() -> None:
    assert names_of("a.jpg", folder="/one").match(["/one/a.jpg", "/two/a.jpg"]) == Matches({"/one/a.jpg": 0}, [])


def test_a_table_without_masks_is_scored_on_boxes(shapes: Path, tmp_path: Path) -> None:
    rows = labelled(shapes, "/photos")
    for row in rows:
        row |= {"rles": [None] * len(row["instances"]), "keypoints": [[]] * len(row["instances"])}
    write_table(str(tmp_path / "table"), rows)
    report = evaluate.run(Storage(), str(tmp_path / "table"), str(shapes))
    assert set(report.scores) == {"bbox"}
    assert report.scores["bbox"]["ap"] > 0.5
    assert report.mean_iou is None
    assert set(report.not_scored) == {"segm", "keypoints"}
    assert "mask is not scored: the table holds no masks; `masklake label --tasks`" in evaluate.describe(report)


def test_a_truth_without_masks_is_named_as_such(shapes: Path, tmp_path: Path) -> None:
    write_table(str(tmp_path / "table"), labelled(shapes, "/photos"))
    document = json.loads(shapes.read_text())
    for annotation in document["annotations"]:
        for field in ("segmentation", "keypoints", "num_keypoints"):
            annotation.pop(field, None)
    for category in document["categories"]:
        category.pop("keypoints", None)
        category.pop("skeleton", None)
    (tmp_path / "boxes.json").write_text(json.dumps(document))
    report = evaluate.run(Storage(), str(tmp_path / "table"), str(tmp_path / "boxes.json"))
    assert set(report.scores) == {"bbox"}
    assert report.not_scored == {"segm": "the truth holds no masks", "keypoints": "the truth holds no keypoints"}


def test_a_run_without_masks_beside_one_with_masks_is_noted(shapes: Path, tmp_path: Path) -> None:
    rows = labelled(shapes, "/photos")
    rows[0]["rles"] = [None] * len(rows[0]["instances"])
    write_table(str(tmp_path / "table"), rows)
    report = evaluate.run(Storage(), str(tmp_path / "table"), str(shapes))
    assert f"{len(rows[0]['instances'])} of the {report.detections} detections hold no mask" in report.notes[0]
    assert set(report.scores) == {"bbox", "segm", "keypoints"}


def test_both_counts_of_detections_are_said(shapes: Path, tmp_path: Path) -> None:
    rows = labelled(shapes, "/photos")
    write_table(str(tmp_path / "table"), rows)
    scores = [instance["score"] for row in rows for instance in row["instances"]]
    likely = sum(score >= 0.5 for score in scores)
    report = evaluate.run(Storage(), str(tmp_path / "table"), str(shapes))
    assert (report.detections_likely, report.detections) == (likely, len(scores))
    assert f"{likely} instances of score >= 0.5, {len(scores)} stored" in evaluate.describe(report)


def test_sides_without_a_category_in_common_are_refused(shapes: Path, tmp_path: Path) -> None:
    rows = labelled(shapes, "/photos")
    for row in rows:
        for instance in row["instances"]:
            instance |= {"category_id": 70 + instance["category_id"]}
    write_table(str(tmp_path / "table"), rows)
    with pytest.raises(ConfigError, match=r"no category id in common: 71 \(disk\).* in the table, 1 \(disk\)"):
        evaluate.run(Storage(), str(tmp_path / "table"), str(shapes))


def test_the_command_prints_a_table_or_json(shapes: Path, tmp_path: Path) -> None:
    write_table(str(tmp_path / "table"), labelled(shapes, "/photos"))
    arguments = ["evaluate", str(tmp_path / "table"), "--truth", str(shapes), "--max-dets", "2", "--max-dets", "500"]
    text = CliRunner().invoke(app, arguments).stdout
    assert "<= 500" in text
    document = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert list(document["scores"]["segm"]["by_max_dets"]) == ["2", "500"]
    assert document["scores"]["segm"]["by_max_dets"]["2"]["ar"] < document["scores"]["segm"]["by_max_dets"]["500"]["ar"]
