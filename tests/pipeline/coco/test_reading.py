"""COCO files as people have them: what is left out is counted, and what cannot be used is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from hypothesis import given
from hypothesis import strategies as st

from masklake.pipeline.coco.dataset import (
    OUTSIDE,
    REPEATED_IMAGE,
    REPEATED_ROW,
    ZERO_AREA,
    check_dropped,
)
from masklake.pipeline.coco.document import to_rle
from masklake.pipeline.coco.image_check import usable_images
from masklake.pipeline.coco.reading import flip_pairs, parse_coco, read_coco
from masklake.pipeline.errors import AnnotationError, InputNotFoundError
from masklake.pipeline.storage.storage import Storage

SQUARE = [2.0, 1.0, 8.0, 1.0, 8.0, 5.0, 2.0, 5.0]
DOCUMENT: dict[str, Any] = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 12, "height": 8},
        {"id": 2, "file_name": "b.png", "width": 4, "height": 4},
    ],
    "annotations": [
        {"id": 0, "image_id": 1, "category_id": 5, "bbox": [2, 1, 6, 4], "area": 24, "iscrowd": 0, "segmentation": [SQUARE]}
    ],
    "categories": [
        {"id": 5, "name": "bird", "keypoints": ["beak", "left_wing", "right_wing"], "skeleton": [[1, 2], [1, 3]]},
        {"id": 2, "name": "cat"},
    ],
}


def changed(part: str, number: int, **values: Any) -> dict[str, Any]:
    """The document with fields of one row replaced; None removes a field."""
    document = copy.deepcopy(DOCUMENT)
    row = document[part][number]
    row.update(values)
    document[part][number] = {key: value for key, value in row.items() if value is not None}
    return document


def added(part: str, row: dict[str, Any]) -> dict[str, Any]:
    document = copy.deepcopy(DOCUMENT)
    document[part].append(row)
    return document


def test_a_file_without_info_or_licences_reads() -> None:
    dataset = parse_coco(DOCUMENT, "x.json")
    assert [image.file_name for image in dataset.images] == ["a.png", "b.png"]
    bird, cat = dataset.categories
    assert (bird.id, bird.flip_pairs, bird.skeleton) == (5, ((1, 2),), ((0, 1), (0, 2)))
    assert cat.keypoints == ()
    assert dataset.has_masks
    assert dataset.has_keypoints
    assert dataset.dropped == {}


def test_crowds_in_both_run_length_forms_are_the_same_region() -> None:
    region = np.zeros((8, 12), np.uint8, order="F")
    region[2:6, 3:9] = 1
    compressed = pycocotools.mask.encode(region)
    runs = [3 * 8 + 2] + [4, 4] * 5 + [4, 8 * 3 + 2]
    forms = [{"size": [8, 12], "counts": compressed["counts"].decode()}, {"size": [8, 12], "counts": runs}]
    for form in forms:
        row = {"image_id": 1, "category_id": 2, "bbox": [3, 2, 6, 4], "iscrowd": 1, "segmentation": form}
        crowd = parse_coco(added("annotations", row), "x.json").annotations[1][1]
        assert crowd.crowd
        assert crowd.area == 24  # of the box: the row has none of its own
        np.testing.assert_array_equal(pycocotools.mask.decode(to_rle(crowd.segmentation, 8, 12)), region)


def test_a_repeated_image_row_is_dropped_and_a_contradictory_one_refused() -> None:
    dataset = parse_coco(added("images", {**DOCUMENT["images"][0], "license": 3}), "x.json")
    assert len(dataset.images) == 2
    assert dataset.dropped == {REPEATED_IMAGE: 1}
    with pytest.raises(
        AnnotationError, match=r"x\.json: images\[2\]: the id 1 is given to 'a\.png' \(\d+ x \d+\) and to 'c\.png'"
    ):
        parse_coco(added("images", {"id": 1, "file_name": "c.png", "width": 12, "height": 8}), "x.json")


@pytest.mark.parametrize("bbox", [[3, 3, 0, 2], [3, 3, 2, 0], [3, 3, -2, 2]])
def test_boxes_without_an_area_are_dropped_and_counted(bbox: list[float]) -> None:
    dataset = parse_coco(added("annotations", {"image_id": 2, "category_id": 2, "bbox": bbox}), "x.json")
    assert dataset.dropped == {ZERO_AREA: 1}
    assert dataset.instance_count() == 1


@pytest.mark.parametrize("outline", [[], None, [[]], [[1, 1, 2, 2]], {"size": [8, 12], "counts": [96]}])
def test_an_instance_without_an_outline_takes_no_masks_from_the_others(outline: Any) -> None:
    row = {"image_id": 2, "category_id": 2, "bbox": [1, 1, 2, 2], "segmentation": [[1, 1, 3, 1, 3, 3, 1, 3]]}
    document = changed("annotations", 0, segmentation=outline)
    document["annotations"].append(row)
    dataset = parse_coco(document, "x.json")
    assert dataset.annotations[1][0].segmentation is None
    assert dataset.has_masks
    assert dataset.incomplete() == {"without an outline": 1, "without keypoints": 1}
    assert not parse_coco(changed("annotations", 0, segmentation=outline), "x.json").has_masks


@pytest.mark.parametrize("points", [None, [], [0] * 9, [5, 5, 0] * 3])
def test_an_instance_without_keypoints_is_counted(points: Any) -> None:
    dataset = parse_coco(changed("annotations", 0, keypoints=points, num_keypoints=3), "x.json")
    assert dataset.without_keypoints() == 1
    assert (
        parse_coco(changed("annotations", 0, keypoints=[3, 3, 1] + [0] * 6, num_keypoints=0), "x.json").without_keypoints() == 0
    )


def test_boxes_outside_their_image_are_dropped_counted_and_named() -> None:
    row = {"id": 41, "image_id": 2, "category_id": 2, "bbox": [100, 0, 2, 2]}
    dataset = parse_coco(added("annotations", row), "x.json")
    assert dataset.dropped == {OUTSIDE: 1}
    assert dataset.examples[OUTSIDE] == ("x.json: annotations[1] (id 41; image 2, b.png)",)
    with pytest.raises(AnnotationError, match=r"1 of the 2 instances .*1 box outside its image.*id 41; .*--max-unusable"):
        check_dropped(dataset)
    check_dropped(dataset, 0.5)


def boxes(*rows: list[float]) -> dict[str, Any]:
    annotations = [{"id": n, "image_id": 1, "category_id": 2, "bbox": row} for n, row in enumerate(rows)]
    return {**DOCUMENT, "images": [{"id": 1, "file_name": "a.png", "width": 640, "height": 480}], "annotations": annotations}


def test_boxes_in_other_units_are_recognised() -> None:
    with pytest.raises(AnnotationError, match=r"2 of the 3 boxes lie within 0\.\.1.* multiply x and width"):
        parse_coco(boxes([0.1, 0.2, 0.3, 0.3], [0.5, 0.5, 0.5, 0.5], [10, 10, 30, 30]), "x.json")
    with pytest.raises(AnnotationError, match=r"^x.json: the only box lies within 0\.\.1\. Such numbers seem to be shares"):
        parse_coco(boxes([0.1, 0.2, 0.3, 0.3]), "x.json")
    corners = [[30 * n + 330, 20 * n + 200, 30 * n + 370, 20 * n + 230] for n in range(8)]
    with pytest.raises(AnnotationError, match=r"8 of the 8 boxes reach beyond.*subtract x1 from x2"):
        parse_coco(boxes(*corners), "x.json")
    assert parse_coco(boxes(*corners[:7]), "x.json").instance_count() == 7  # too few to tell
    assert parse_coco(boxes(*corners, *([600, 400, 90, 90] for _ in range(9))), "x.json").instance_count() == 17


@pytest.mark.parametrize("number", [-1, 0, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 5.0])
def test_ids_of_images_are_64_bit_integers(number: float) -> None:
    document = changed("images", 0, id=number)
    document["annotations"][0]["image_id"] = number
    assert parse_coco(document, "x.json").images[0].id == number


@pytest.mark.parametrize("number", ["5", 5.5, True, 1e300, float("nan"), float("inf"), 2**63, 10**400, -(2**63) - 1, [1]])
def test_other_ids_are_refused_by_name(number: Any) -> None:
    for part in ("images", "categories"):
        with pytest.raises(AnnotationError, match=rf"^x\.json: {part}\[0\] (needs a whole number|has the) 'id'"):
            parse_coco(changed(part, 0, id=number), "x.json")


def test_ids_of_categories_are_32_bit_integers() -> None:
    for number in (-(2**31), -1, 0, 2**31 - 1):
        document = changed("categories", 0, id=number)
        document["annotations"][0]["category_id"] = number
        assert parse_coco(document, "x.json").categories[0].id == number
    with pytest.raises(AnnotationError, match=r"categories\[0\] has the 'id' 2147483648, which is beyond 32-bit"):
        parse_coco(changed("categories", 0, id=2**31), "x.json")


def test_the_same_row_twice_is_one_and_two_rows_of_one_id_are_two() -> None:
    dataset = parse_coco(added("annotations", copy.deepcopy(DOCUMENT["annotations"][0])), "x.json")
    assert (dataset.instance_count(), dataset.dropped) == (1, {REPEATED_ROW: 1})
    assert (
        parse_coco(added("annotations", {**DOCUMENT["annotations"][0], "bbox": [3, 1, 6, 4]}), "x.json").instance_count() == 2
    )


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "holds a list"),
        ({"images": [], "annotations": []}, "no list 'categories'"),
        ({**DOCUMENT, "categories": []}, "has no categories"),
        (added("categories", {"id": 5, "name": "dog"}), r"categories\[2\] repeats the id 5 of 'bird'"),
        (changed("categories", 0, skeleton=[[0, 1]]), r"skeleton edge \[0, 1\]"),
        (changed("images", 0, file_name=None), r"images\[0\] has no file_name"),
        (changed("images", 0, width=None), r"images\[0\] needs a whole number 'width', not None"),
        (changed("images", 0, height=0), r"size 12 x 0"),
        (changed("annotations", 0, image_id=9), r"annotations\[0\] .id 0. belongs to the image 9"),
        (changed("annotations", 0, category_id=9), r"annotations\[0\] .*has the category 9"),
        (changed("annotations", 0, bbox=[1, 2, 3]), r"needs a bbox"),
        (changed("annotations", 0, bbox=[1, 2, float("nan"), 3]), r"finite numbers"),
        (changed("annotations", 0, keypoints=[1, 2, 2]), r"'bird' with 3 keypoints needs 9"),
        (changed("annotations", 0, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), r"a polygon of 7 numbers"),
        (changed("annotations", 0, segmentation="mask.png"), "neither polygons nor"),
        (changed("annotations", 0, segmentation={"size": [12, 8], "counts": [96]}), r"size \[12, 8\] is not its image's"),
        (changed("annotations", 0, segmentation={"size": [8, 12], "counts": [95]}), "do not add up"),
        (changed("annotations", 0, segmentation={"size": [8, 12], "counts": [10**400]}), "do not add up"),
        (changed("annotations", 0, segmentation={"size": [8, 12], "counts": ["96"]}), "a list of whole numbers"),
        (changed("annotations", 0, segmentation={"size": [8, 12]}), "counts are not run lengths, but None"),
        (changed("annotations", 0, segmentation=SQUARE), "is a list of its own within that list"),
        (changed("annotations", 0, segmentation=[["1", "2", "3", "4", "5", "6"]]), "has a polygon with '1' in it; x, y pairs"),
        (changed("annotations", 0, segmentation=[[1, 2, 3, float("nan"), 5, 6]]), "has a polygon with nan in it; x, y pairs"),
        (
            changed("annotations", 0, segmentation=[[1, 2, 1e9, 4, 5, 6]]),
            r"id 0; image 1, a.png. has a polygon from x = 1 to 1e.09",
        ),
        (changed("annotations", 0, segmentation=[[1, 2, 10**400, 4, 5, 6]]), "pairs of finite numbers"),
        (changed("annotations", 0, segmentation=[[1, 2, float("inf"), 4, 5, 6]]), "pairs of finite numbers"),
        (changed("annotations", 0, bbox=[1, 1, 1e12, 4]), r"a bbox from x = 1 to 1e\+12"),
        (changed("annotations", 0, bbox=["1", "1", "3", "4"]), "finite numbers"),
        (changed("annotations", 0, bbox=[True, 1, 3, 4]), "finite numbers"),
        (changed("annotations", 0, keypoints="abc"), "the keypoints 'abc'"),
        (changed("annotations", 0, keypoints=[1e9, 2, 2] * 3), "has keypoints from x"),
        (changed("annotations", 0, keypoints=[1, 2, 5] * 3), "visibility 5"),
        (changed("annotations", 0, area="24"), "needs an area in pixels"),
        (changed("annotations", 0, area=float("nan")), "needs an area in pixels"),
        (changed("annotations", 0, iscrowd="0"), "an iscrowd of 0 or 1, not '0'"),
        (changed("images", 0, width="12"), "whole number 'width', not '12'"),
        (changed("images", 0, width=2**40), "beyond 32-bit"),
        (changed("images", 0, file_name="a\0b"), "no file_name that a file can have"),
        (changed("images", 0, file_name="a\ud800"), "no file_name that a file can have"),
        (changed("categories", 0, keypoints="beak"), "a list of names as its keypoints"),
        (changed("categories", 0, skeleton=[5]), "skeleton edge 5"),
        ({**DOCUMENT, "images": [None]}, r"images\[0\]"),
        ({**DOCUMENT, "annotations": [5]}, r"annotations\[0\]"),
        ([{"image_id": 1, "score": 0.5}], "looks like detections"),
        ({"a.jpg12": {"filename": "a.jpg", "regions": []}}, "VGG Image Annotator"),
        ({"shapes": [], "imagePath": "a.jpg"}, "LabelMe"),
    ],
)
def test_what_cannot_be_used_is_named(document: Any, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        parse_coco(document, "x.json")


@given(st.text(alphabet="0123456789LMNOPQRSTabcdefghijkl~", max_size=12))
def test_hostile_compressed_counts_never_escape_the_image(counts: str) -> None:
    try:
        dataset = parse_coco(changed("annotations", 0, segmentation={"size": [8, 12], "counts": counts}), "x.json")
    except AnnotationError:
        return
    mask = pycocotools.mask.decode(to_rle(dataset.annotations[1][0].segmentation, 8, 12))
    assert mask.shape == (8, 12)
    assert set(np.unique(mask)) <= {0, 1}


def test_flip_pairs_follow_the_names() -> None:
    assert flip_pairs(["left_eye", "nose", "right_eye", "left_fin"]) == ((0, 2),)


def test_bad_files_are_said_to_be_bad(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError):
        read_coco(Storage(), str(tmp_path / "none.json"))
    for name, data in {"half.json": json.dumps(DOCUMENT)[:-9].encode(), "image.json": b"\xff\xd8\xff\xe0"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(AnnotationError, match="is not JSON"):
            read_coco(Storage(), str(tmp_path / name))


def test_real_files_read(shared_data: Path) -> None:
    folder = shared_data / "coco_mini"
    dataset = read_coco(Storage(), str(folder / "annotations" / "instances_val2017.json"))
    assert len(usable_images(Storage(), dataset, str(folder / "val2017")).images) == 79
    assert sum(a.crowd for rows in dataset.annotations.values() for a in rows) == 5
    assert dataset.instance_count() == 619


def test_a_box_that_ends_beyond_the_floats_is_left_out_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    document = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 12, "height": 8}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1e308, 1, 1e308, 1]}],
        "categories": [{"id": 1, "name": "cell"}],
    }
    assert parse_coco(document, "x.json").dropped == {OUTSIDE: 1}
    assert not recwarn.list


def test_a_row_that_is_no_object_is_told_so() -> None:
    rows = {"images": 5, "annotations": "a", "categories": None}
    for part, row in rows.items():
        document: dict[str, list[object]] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cell"}]}
        document[part] = [row]
        with pytest.raises(AnnotationError, match=rf"x\.json: {part}\[0\] is {row!r} and not an object"):
            parse_coco(document, "x.json")
