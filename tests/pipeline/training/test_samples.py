"""Samples: the order follows from the seed, geometry stays consistent, and what the model gets is what was drawn."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pycocotools.mask
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from masklake.model.config import Category
from masklake.model.masks.bit_masks import BitMasks
from masklake.pipeline.coco.dataset import learnable
from masklake.pipeline.coco.document import to_rle
from masklake.pipeline.coco.reading import parse_coco
from masklake.pipeline.errors import AnnotationError, EmptyInputError, StorageError
from masklake.pipeline.images.fetch import Fetched
from masklake.pipeline.images.status import Status
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.training.augmentation import Augmentation, SampleSpec, choose_window, make_sample
from masklake.pipeline.training.loader import Loader, load_samples, training_rows
from masklake.pipeline.training.samples import replaced_in, sample_rows, to_training
from masklake.pipeline.training.stream import SampleStream, epoch_order

BIRD = Category(id=4, name="bird", keypoints=("beak", "left_wing", "right_wing"), flip_pairs=((1, 2),))
CAT = Category(id=9, name="cat")
PLAIN = Augmentation(flip=False)


def spec(augmentation: Augmentation = PLAIN, masks: bool = True, seed: int = 0) -> SampleSpec:
    return SampleSpec((BIRD, CAT), masks=masks, keypoints=3, augmentation=augmentation, seed=seed)


def polygon(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def annotation(x: float, y: float, w: float, h: float, category: int = 9, keypoints: Any = ()) -> dict[str, Any]:
    return {"category_id": category, "bbox": [x, y, w, h], "segmentation": polygon(x, y, w, h), "keypoints": keypoints}


def painted(height: int, width: int, annotations: list[dict[str, Any]]) -> torch.Tensor:
    """Black, each instance's pixels 200."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for row in annotations:
        image[:, torch.from_numpy(pycocotools.mask.decode(to_rle(row["segmentation"], height, width))).bool()] = 200
    return image


def masks_of(sample: Any) -> np.ndarray:
    height, width = sample.image.shape[1:]
    return np.stack(
        [pycocotools.mask.decode(to_rle({"size": [height, width], "counts": counts}, height, width)) for counts in sample.rles]
    )


def test_an_untouched_sample_is_the_annotation() -> None:
    rows = [annotation(3, 2, 10, 5), annotation(20, 4, 6, 9, 4, [21, 5, 2, 24, 6, 1, 0, 0, 0])]
    image = painted(20, 40, rows)
    sample = make_sample(image, rows, spec(), (0, 0, 0))
    assert torch.equal(sample.image, image)
    np.testing.assert_array_equal(sample.boxes, [[3, 2, 13, 7], [20, 4, 26, 13]])
    np.testing.assert_array_equal(sample.labels, [9, 4])
    np.testing.assert_array_equal(masks_of(sample)[1], pycocotools.mask.decode(to_rle(rows[1]["segmentation"], 20, 40)))
    np.testing.assert_array_equal(sample.keypoints[1], [[21, 5, 2], [24, 6, 1], [0, 0, 0]])
    assert not sample.keypoints[0].any()


def test_a_mirror_moves_everything_and_exchanges_left_and_right() -> None:
    rows = [annotation(20, 4, 6, 9, 4, [21, 5, 2, 24, 6, 1, 25, 12, 2])]
    mirrored = next(
        sample
        for n in range(20)
        if (sample := make_sample(painted(20, 40, rows), rows, spec(Augmentation()), (0, 0, n))).boxes[0, 0] != 20
    )
    np.testing.assert_array_equal(mirrored.boxes, [[14, 4, 20, 13]])
    np.testing.assert_array_equal(mirrored.keypoints[0], [[19, 5, 2], [15, 12, 2], [16, 6, 1]])
    np.testing.assert_array_equal(masks_of(mirrored)[0], mirrored.image[0].numpy() > 0)


def test_a_mirror_exchanges_pixels_where_keypoints_name_pixels() -> None:
    """With an offset of a half, keypoint 0 is the middle of the first pixel: a mirror makes the last one of it."""
    rows = [annotation(20, 4, 6, 9, 4, [21, 5, 2, 0, 6, 1, 39, 12, 2])]
    pixels = dataclasses.replace(spec(Augmentation()), keypoint_offset=0.5)
    mirrored = next(
        sample for n in range(20) if (sample := make_sample(painted(20, 40, rows), rows, pixels, (0, 0, n))).boxes[0, 0] != 20
    )
    np.testing.assert_array_equal(mirrored.keypoints[0], [[18, 5, 2], [0, 12, 2], [39, 6, 1]])
    still = make_sample(painted(20, 40, rows), rows, dataclasses.replace(pixels, augmentation=PLAIN), (0, 0, 0))
    np.testing.assert_array_equal(still.keypoints[0], [[21, 5, 2], [0, 6, 1], [39, 12, 2]])


def test_both_mirrors_are_half_a_turn_and_keep_left_and_right() -> None:
    rows = [annotation(20, 4, 6, 9, 4, [21, 5, 2, 24, 6, 1, 25, 12, 2])]
    both = Augmentation(flip_vertical=True)
    turned = next(
        sample
        for n in range(40)
        if tuple((sample := make_sample(painted(20, 40, rows), rows, spec(both), (0, 0, n))).boxes[0, :2]) == (14, 7)
    )
    np.testing.assert_array_equal(turned.keypoints[0], [[19, 15, 2], [16, 14, 1], [15, 8, 2]])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    crop=st.none() | st.integers(32, 70),
    scale=st.sampled_from([(1.0, 1.0), (0.5, 0.5), (0.7, 1.6), (2.0, 2.0)]),
    vertical=st.booleans(),
)
def test_image_mask_and_box_stay_together(seed: int, crop: int | None, scale: tuple[float, float], vertical: bool) -> None:
    random = np.random.default_rng(seed)
    height, width = (int(v) for v in random.integers(40, 90, 2))
    x, y = (int(v) for v in random.integers(0, 20, 2))
    rows = [annotation(x, y, int(random.integers(6, 19)), int(random.integers(6, 19)))]
    augmentation = Augmentation(crop=crop, scale=scale, flip_vertical=vertical)
    sample = make_sample(painted(height, width, rows), rows, spec(augmentation), (seed,))
    if crop:
        assert max(sample.image.shape[1:]) <= crop + 1
    if not len(sample.labels):
        return
    mask, (x1, y1, x2, y2) = masks_of(sample)[0], sample.boxes[0]
    seen = sample.image[0].numpy() > 100  # a resized edge is blurred over a pixel
    assert (mask.astype(bool) ^ seen).sum() <= 2 * (mask.shape[0] + mask.shape[1])
    inside = np.argwhere(mask)
    assert np.abs(inside.min(0) - (y1, x1)).max() <= 1.5
    assert np.abs(inside.max(0) + 1 - (y2, x2)).max() <= 1.5


def test_instances_outside_the_window_go_and_cut_ones_get_the_visible_parts_box() -> None:
    rows = [annotation(2, 2, 20, 20), annotation(150, 150, 20, 20)]
    crop = Augmentation(flip=False, crop=64)
    seen = set()
    for n in range(30):
        sample = make_sample(painted(200, 200, rows), rows, spec(crop), (0, 0, n))
        assert sample.image.shape == (3, 64, 64)
        assert len(sample.labels) <= 1
        for box, mask in zip(sample.boxes, masks_of(sample) if sample.rles else [], strict=True):
            np.testing.assert_array_equal(box, [*np.argwhere(mask).min(0)[::-1], *np.argwhere(mask).max(0)[::-1] + 1])
            seen.add(tuple(box[2:] - box[:2]))
    assert len(seen) > 1  # some were cut


def test_a_window_shows_an_instance_where_there_is_one() -> None:
    boxes = np.array([[400.0, 400, 420, 420]])
    augmentation = Augmentation(crop=200)
    windows = [choose_window((500, 500), boxes, augmentation, np.random.default_rng(n)) for n in range(50)]
    hits = [w for w in windows if w.left <= 410 <= w.left + w.width and w.top <= 410 <= w.top + w.height]
    assert len(hits) == 50
    assert len({(w.left, w.top) for w in windows}) > 25


def test_keypoints_that_leave_the_window_become_absent() -> None:
    rows = [annotation(0, 0, 100, 100, 4, [5, 5, 2, 95, 95, 2, 50, 50, 2])]
    for n in range(10):
        sample = make_sample(painted(100, 100, rows), rows, spec(Augmentation(flip=False, crop=40)), (0, 0, n))
        present = sample.keypoints[0][sample.keypoints[0][:, 2] > 0]
        assert len(present) < 3
        assert ((present[:, :2] >= 0) & (present[:, :2] <= 40)).all()


def test_an_epochs_order_is_a_permutation_that_follows_from_seed_and_epoch() -> None:
    order = epoch_order(10, 10, seed=3, epoch=1)
    assert sorted(order) == list(range(10))
    assert np.array_equal(order, epoch_order(10, 10, seed=3, epoch=1))
    assert not np.array_equal(order, epoch_order(10, 10, seed=3, epoch=2))
    assert not np.array_equal(order, epoch_order(10, 10, seed=4, epoch=1))
    assert Counter(epoch_order(3, 8, 0, 0).tolist()).most_common()[-1][1] >= 2  # fewer rows than a batch: repeated evenly


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray cluster of this file's own; logical CPUs, so that it runs on any machine."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    yield
    ray.shutdown()


def dataset_of(tmp_path: Path, images: int, empty: int = 0) -> Any:
    document: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 9, "name": "cat"}]}
    for n in range(images):
        rows = [] if n < empty else [annotation(2 + n, 3, 8, 8)]
        Image.fromarray(painted(24, 48, rows).permute(1, 2, 0).numpy()).save(tmp_path / f"{n}.png")
        document["images"].append({"id": n, "file_name": f"{n}.png", "width": 48, "height": 24})
        document["annotations"] += [
            {"image_id": n, "area": 64, **{k: v for k, v in r.items() if k != "keypoints"}} for r in rows
        ]
    return parse_coco(document, "cats.json")


def test_rows_leave_out_what_teaches_nothing(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, 4, empty=1)
    assert training_rows(dataset, str(tmp_path), spec()).num_rows == 3
    assert training_rows(dataset, str(tmp_path), spec(), keep_empty=True).num_rows == 4
    with pytest.raises(EmptyInputError, match="no image has an instance"):
        training_rows(dataset_of(tmp_path, 2, empty=2), str(tmp_path), spec())


def test_the_batch_is_what_was_drawn(tmp_path: Path) -> None:
    rows = training_rows(dataset_of(tmp_path, 3), str(tmp_path), spec())
    batch = sample_rows(load_samples(rows, [(0, 0, n) for n in range(3)], spec(), Storage()))
    images, targets = to_training(batch, spec())
    for n, (image, target) in enumerate(zip(images, targets, strict=True)):
        assert image.shape == (3, 24, 48)
        assert isinstance(target.masks, BitMasks)
        assert target.keypoints is not None
        assert torch.equal(target.masks.unpack()[0].bool(), image[0] > 0)
        assert target.masks.known.all()
        assert target.boxes.tolist() == [[2 + n, 3, 10 + n, 11]]
        assert target.keypoints.shape == (1, 3, 3)
    assert [target.labels.tolist() for target in targets] == [[9]] * 3


def test_an_image_without_instances_is_an_empty_target(tmp_path: Path) -> None:
    rows = training_rows(dataset_of(tmp_path, 2, empty=1), str(tmp_path), spec(), keep_empty=True)
    _, targets = to_training(sample_rows(load_samples(rows, [(0, 0, 0), (0, 0, 1)], spec(), Storage())), spec())
    assert targets[0].boxes.shape == (0, 4)
    assert targets[0].masks is not None
    assert targets[0].masks.shape == (0, 24, 48)


@pytest.mark.parametrize("outline", [None, [[0.2, 0.2, 0.3, 0.2, 0.3, 0.3]]])
@pytest.mark.parametrize("crop", [None, 32])
def test_an_instance_without_an_outline_keeps_its_box_and_has_no_mask(outline: Any, crop: int | None) -> None:
    """Also one whose outline is thinner than any pixel: the box is cut and moved like every other."""
    rows = [annotation(3, 2, 10, 5), {**annotation(12, 4, 6, 9), "segmentation": outline}]
    own = spec(Augmentation(flip=False, crop=crop))
    batch = sample_rows([(0, make_sample(painted(20, 40, rows[:1]), rows, own, (0, 0, 1)))])
    _, [target] = to_training(batch, own)
    assert isinstance(target.masks, BitMasks)
    assert target.labels.tolist() == [9, 9]
    assert target.masks.known.tolist() == [True, False]
    assert target.masks.unpack()[0].any()
    assert not target.masks.unpack()[1].any()
    assert (target.boxes[1, 2:] - target.boxes[1, :2]).tolist() == [6, 9]


def test_rows_leave_out_what_the_loader_would_not_show(tmp_path: Path) -> None:
    dataset = parse_coco(
        {
            "images": [{"id": 1, "file_name": "a.png", "width": 48, "height": 24}],
            "categories": [{"id": 9, "name": "cat"}],
            "annotations": [
                {"image_id": 1, "category_id": 9, "bbox": box} for box in ([2, 2, 9, 9], [5, 5, 0.6, 9], [47.5, 2, 3, 3])
            ],
        },
        "x.json",
    )
    (image,) = dataset.images
    assert [learnable(instance, image) for instance in dataset.annotations[1]] == [True, False, False]
    [row] = training_rows(dataset, str(tmp_path), spec(masks=False)).to_pylist()
    assert [a["bbox"] for a in json.loads(row["annotations"])] == [[2, 2, 9, 9]]


def bad_image(kind: str) -> bytes:
    if kind == "cut off":
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 48, 3), dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()[:200]
    buffer = io.BytesIO()
    Image.new("RGB", (24, 48)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "message"), [("cut off", ""), ("turned", "24 x 48 pixels, its annotations are for 48 x 24")])
def test_a_bad_image_is_named_or_left_out(tmp_path: Path, kind: str, message: str) -> None:
    rows = training_rows(dataset_of(tmp_path, 3), str(tmp_path), spec())
    (tmp_path / "1.png").write_bytes(bad_image(kind))
    batch = sample_rows(load_samples(rows, [(0, 0, n) for n in range(3)], spec(), Storage()))
    assert batch["row"].to_pylist() == [0, 1, 2]
    with pytest.raises(AnnotationError, match=rf"1\.png: .*{message}.*--allow-missing"):
        to_training(batch, spec())
    assert set(Loader(rows, spec(), Storage()).load([1], [0])["error"].to_pylist()) != {None}


def test_another_image_takes_the_place_of_one_that_cannot_be_used(tmp_path: Path) -> None:
    """Epochs keep their length, the same images replace the same ones, and who reads the batch learns which."""
    rows = training_rows(dataset_of(tmp_path, 6), str(tmp_path), spec())
    for n in (1, 2, 4):
        (tmp_path / f"{n}.png").write_bytes(bad_image("cut off"))
    (tmp_path / "4.png").unlink()
    loader = Loader(rows, spec(), Storage(), skip_bad=True)
    batch = loader.load(range(6), [3] * 6)
    assert batch.num_rows == len(to_training(batch, spec())[0]) == 6
    assert set(batch["row"].to_pylist()) == {0, 3, 5}
    assert loader.load([4, 1], [3, 3])["row"].to_pylist() == [batch["row"][4].as_py(), batch["row"][1].as_py()]
    assert {message.rpartition("/")[2].partition(":")[0] for message in replaced_in(batch)} == {"1.png", "2.png", "4.png"}
    assert replaced_in(loader.load([0], [0])) == []
    for n in range(6):
        (tmp_path / f"{n}.png").unlink(missing_ok=True)
    with pytest.raises(AnnotationError, match="not found"):
        to_training(loader.load([0], [0]), spec())


def test_no_image_takes_a_place_while_the_storage_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = training_rows(dataset_of(tmp_path, 2), str(tmp_path), spec())
    down = Fetched(Status.FETCH_ERROR, error="the store is overloaded", may_pass=True)
    monkeypatch.setattr("masklake.pipeline.training.loader.fetch_patiently", lambda _, uris, **__: [down for _ in uris])
    batch = Loader(rows, spec(), Storage(), skip_bad=True).load([0, 1], [0, 0])
    assert replaced_in(batch) == []
    with pytest.raises(StorageError, match=r"0\.png: the store is overloaded$"):
        to_training(batch, spec())


@pytest.mark.slow
def test_every_worker_gets_equally_many_samples_and_every_epoch_every_image(tmp_path: Path, local_ray: None) -> None:
    rows = training_rows(dataset_of(tmp_path, 22), str(tmp_path), spec())
    loader = ray.put(Loader(rows, spec(), Storage()))
    stream = SampleStream(loader, rows=22, epoch_samples=22, first_epoch=1, epochs=4, seed=0, loader_cpus=0.5)
    data = stream.dataset()
    data.context.execution_options.preserve_order = True
    shards = data.streaming_split(2, equal=True)

    @ray.remote(num_cpus=0)
    def consume(shard: Any) -> list[int]:
        return [row for batch in shard.iter_batches(batch_size=4, batch_format="pyarrow") for row in batch["row"].to_pylist()]

    seen = ray.get([consume.remote(shard) for shard in shards])
    assert [len(s) for s in seen] == [33, 33]
    assert Counter(seen[0] + seen[1]) == dict.fromkeys(range(22), 3)


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "tasks"), [(5, [5]), (20, [16, 4]), (160, [16] * 10)])
def test_a_loading_task_gets_its_share_of_samples_however_few_they_are(local_ray: None, samples: int, tasks: list[int]) -> None:
    class Counting:
        def load(self, rows: list[int], epochs: list[int]) -> pa.Table:
            return pa.table({"rows": [len(rows)]})

    stream = SampleStream(ray.put(Counting()), samples, samples, first_epoch=0, epochs=1, seed=0, loader_cpus=0.5)
    found = [row["rows"] for row in stream.dataset().take_all()]
    assert sorted(found, reverse=True) == tasks


def test_annotations_are_plain_json(tmp_path: Path) -> None:
    rows: pa.Table = training_rows(dataset_of(tmp_path, 1), str(tmp_path), spec())
    assert json.loads(rows["annotations"][0].as_py())[0]["category_id"] == 9
