"""The loader: which rows are samples, and what happens to images that cannot be used."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from masklake.pipeline.coco.dataset import learnable
from masklake.pipeline.coco.reading import parse_coco
from masklake.pipeline.errors import AnnotationError, EmptyInputError, StorageError
from masklake.pipeline.images.fetch import Fetched
from masklake.pipeline.images.status import Status
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.training.loader import Loader, load_samples, training_rows
from masklake.pipeline.training.samples import replaced_in, sample_rows, to_training
from tests.pipeline.training.scenes import dataset_of, spec


def test_rows_leave_out_what_teaches_nothing(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, 4, empty=1)
    assert training_rows(dataset, str(tmp_path), spec()).num_rows == 3
    assert training_rows(dataset, str(tmp_path), spec(), keep_empty=True).num_rows == 4
    with pytest.raises(EmptyInputError, match="no image has an instance"):
        training_rows(dataset_of(tmp_path, 2, empty=2), str(tmp_path), spec())


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


def test_annotations_are_plain_json(tmp_path: Path) -> None:
    rows: pa.Table = training_rows(dataset_of(tmp_path, 1), str(tmp_path), spec())
    assert json.loads(rows["annotations"][0].as_py())[0]["category_id"] == 9
