"""The labelling step: whatever happens to an image, its row comes back; labels depend on the image alone."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pycocotools.mask
import pytest
import torch
from PIL import Image

from masklake.model import PRESETS, Instances, PredictOptions, create_model
from masklake.model.detector import Detector, load_detector
from masklake.model.fields import Task
from masklake.pipeline.errors import StorageError
from masklake.pipeline.images.decode import Decoded, DecodeLimits
from masklake.pipeline.images.status import Status
from masklake.pipeline.labelling import labeller as labeller_module
from masklake.pipeline.labelling.labeller import Labeller, LabelSpec, _windows, labelled_and_written
from masklake.pipeline.labelling.run_output import Finished, finished, reported, write_block
from masklake.pipeline.storage.objects import local_etag
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.schema import FILE_SCHEMA, MANIFEST_SCHEMA
from masklake.pipeline.table.table import open_table
from tests import second_detector

# pytest puts its own filters over the one that `decode` sets for its process.
pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG = PRESETS["tiny"]
DEFAULT = PredictOptions()
CATEGORY = CONFIG.categories[0]


class OneBox:
    """A detector that finds one box, whose score is the image's mean; an image of one colour 13 makes it fail."""

    model_id = "one-box"
    categories = CONFIG.categories
    tasks: frozenset[Task] = frozenset({"box", "mask"})

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []
        self.inside = 0

    def batch_key(self, size: tuple[int, int]) -> tuple[int, ...]:
        return size

    def settings(self, options: PredictOptions) -> dict[str, Any]:
        return {}

    def predict(self, images: Sequence[torch.Tensor], options: PredictOptions = DEFAULT) -> list[Instances]:
        self.inside += 1
        assert self.inside == 1, "two threads at once"
        self.batches.append([(image.shape[1], image.shape[2]) for image in images])
        time.sleep(0.001)
        self.inside -= 1
        if any(bool((image == 13).all()) for image in images):
            raise RuntimeError("thirteen")
        return [self._find(image) for image in images]

    def _find(self, image: torch.Tensor) -> Instances:
        return Instances(
            size=(image.shape[1], image.shape[2]),
            boxes=np.array([[0, 0, image.shape[2], image.shape[1]]], np.float32),
            scores=np.array([image.float().mean() / 255], np.float32),
            labels=np.array([CATEGORY.id]),
            rles=[b"counts"],
            areas=np.array([7]),
        )


SPEC = LabelSpec(Storage(), "tiny-000000000000", "label", PredictOptions(batch_size=2), DecodeLimits(max_pixels=10_000))


def write(folder: Path, name: str, colour: int, size: tuple[int, int] = (32, 20)) -> str:
    Image.new("RGB", size, (colour, colour, colour)).save(folder / name)
    return str(folder / name)


def manifest(uris: Sequence[str]) -> pa.Table:
    rows = [{"image_id": number, "uri": uri, "etag": "listed", "bytes": 100} for number, uri in enumerate(uris)]
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)


def test_every_image_has_its_row_in_order(tmp_path: Path) -> None:
    uris = [write(tmp_path, f"{number}.png", number * 10, size=(20 + number, 30 - number)) for number in range(20)]
    told: list[tuple[int, int]] = []
    rows = Labeller(SPEC, OneBox(), lambda done, failed: told.append((done, failed)))(manifest(uris))
    assert rows.schema == FILE_SCHEMA
    assert rows["image_id"].to_pylist() == list(range(20))
    assert rows["uri"].to_pylist() == uris
    assert rows["width"].to_pylist() == [20 + number for number in range(20)]
    assert rows["etag"][3].as_py() == local_etag(Path(uris[3]).stat())  # what was read, not what was listed
    scores = [instances[0]["score"] for instances in rows["instances"].to_pylist()]
    assert scores == pytest.approx([number * 10 / 255 for number in range(20)])
    assert (sum(done for done, _ in told), sum(failed for _, failed in told)) == (20, 0)


def test_each_failure_has_its_status_and_the_rest_are_labelled(tmp_path: Path) -> None:
    good, thirteen, large = write(tmp_path, "a.png", 50), write(tmp_path, "b.png", 13), write(tmp_path, "c.png", 1, (200, 100))
    (tmp_path / "d.png").write_bytes(Path(good).read_bytes()[:60])
    (tmp_path / "e.png").write_text("not an image")
    uris = [
        good,
        thirteen,
        large,
        str(tmp_path / "d.png"),
        str(tmp_path / "e.png"),
        str(tmp_path / "absent"),
        "ftp://x/y",
        good,
    ]
    rows = Labeller(SPEC, OneBox())(manifest(uris)).to_pylist()
    assert [row["status"] for row in rows] == [
        Status.OK,
        Status.MODEL_ERROR,
        Status.TOO_LARGE,
        Status.DECODE_ERROR,
        Status.DECODE_ERROR,
        Status.MISSING,
        Status.FETCH_ERROR,
        Status.OK,
    ]
    assert [bool(row["error"]) for row in rows] == [False, *[True] * 6, False]
    assert rows[1]["error"] == "RuntimeError: thirteen"
    assert [len(row["instances"]) for row in rows] == [1, 0, 0, 0, 0, 0, 0, 1]
    assert (rows[3]["width"], rows[3]["height"]) == (32, 20)  # its header was fine
    assert rows[5]["etag"] == "listed"


def test_images_of_like_shape_go_together(tmp_path: Path) -> None:
    sizes = [(64, 20), (20, 64)] * 8
    model = OneBox()
    Labeller(SPEC, model)(manifest([write(tmp_path, f"{n}.png", 100 + n, size) for n, size in enumerate(sizes)]))
    assert [len(set(batch)) for batch in model.batches] == [1, 1]


def test_an_empty_block_gives_no_rows() -> None:
    assert Labeller(SPEC, OneBox())(manifest([])).num_rows == 0


def test_a_long_block_is_written_in_parts(tmp_path: Path) -> None:
    uris = [write(tmp_path, f"{number}.png", number, size=(20 + number % 2, 30)) for number in range(20)]
    labeller = Labeller(SPEC, OneBox())
    parts = list(labeller.parts(manifest(uris), seconds=0))
    assert len(parts) == 20
    [whole] = labeller.parts(manifest(uris))
    assert whole["image_id"].to_pylist() == list(range(20))
    together = pa.concat_tables(parts).sort_by("image_id")
    assert together.drop_columns("labelled_at").equals(whole.drop_columns("labelled_at"))


def test_what_another_worker_wrote_of_a_block_is_not_labelled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [write(tmp_path, f"{number}.png", number, size=(20 + number % 3, 30)) for number in range(12)]
    table, block = open_table(Storage(), str(tmp_path / "table")), manifest(uris)
    monkeypatch.setattr(labeller_module, "write_block", dying_after(3))
    labeller = Labeller(SPEC, OneBox())
    monkeypatch.setattr(labeller, "parts", partial(labeller.parts, seconds=0))
    with pytest.raises(Died):
        labelled_and_written(labeller, block, table, "night")
    before = {image for file in finished(table, "night") for image in file.image_ids}
    assert len(before) == 3
    monkeypatch.undo()

    successor = OneBox()
    report = labelled_and_written(Labeller(SPEC, successor), block, table, "night", begun_before=True)
    [ids] = report["image_ids"].to_pylist()
    assert set(ids) | before == set(range(12))
    assert not set(ids) & before
    assert sum(map(len, successor.batches)) == 9
    again = labelled_and_written(Labeller(SPEC, OneBox()), block, table, "night", begun_before=True)
    assert again.num_rows == 0


class Died(BaseException):
    """The process is gone."""


def dying_after(parts: int) -> Callable[..., Finished]:
    """`write_block` that works for a number of parts."""
    written: list[Finished] = []

    def write_some(*arguments: Any) -> Finished:
        if len(written) == parts:
            raise Died
        written.append(write_block(*arguments))
        return written[-1]

    return write_some


def test_a_part_that_cannot_be_written_ends_the_block_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [write(tmp_path, f"{number}.png", number) for number in range(6)]
    table, unwritten = open_table(Storage(), str(tmp_path / "table")), list[pa.Table]()
    written: list[Finished] = []

    def full(*arguments: Any) -> Finished:
        if len(written) == 2:
            raise StorageError("no space left")
        written.append(write_block(*arguments))
        return written[-1]

    monkeypatch.setattr(labeller_module, "write_block", full)
    labeller = Labeller(SPEC, OneBox())
    monkeypatch.setattr(labeller, "parts", partial(labeller.parts, seconds=0))
    report = labelled_and_written(labeller, manifest(uris), table, "night", unwritten.append)
    assert report["error"].to_pylist() == [None, None, "StorageError"]
    assert [rows["image_id"].to_pylist() for rows in unwritten] == [[2]]
    with pytest.raises(StorageError, match="no space left"):
        reported(report)


def test_the_next_images_are_fetched_while_some_are_labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labeller_module, "FETCH_WINDOW_IMAGES", 2)
    fetched = threading.Event()
    real = labeller_module.fetch

    def fetch(storage: Storage, uris: Sequence[str], **limits: Any) -> Any:
        found = real(storage, uris, **limits)
        if uris == wanted[2:4]:
            fetched.set()
        return found

    class Waiting(OneBox):
        def predict(self, images: Sequence[torch.Tensor], options: PredictOptions = DEFAULT) -> list[Instances]:
            assert fetched.wait(30), "the second window is fetched only after the first is labelled"
            return super().predict(images, options)

    monkeypatch.setattr(labeller_module, "fetch", fetch)
    wanted = [write(tmp_path, f"{number}.png", number) for number in range(5)]
    assert Labeller(SPEC, Waiting())(manifest(wanted))["status"].to_pylist() == ["ok"] * 5


def test_overlapping_calls_share_one_model(tmp_path: Path) -> None:
    uris = [write(tmp_path, f"{number}.png", number) for number in range(12)]
    labeller = Labeller(SPEC, OneBox())
    results: list[pa.Table] = []
    threads = [threading.Thread(target=lambda: results.append(labeller(manifest(uris)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [table["status"].to_pylist() for table in results] == [["ok"] * 12] * 3


def test_an_image_that_hangs_its_decoder_is_crashed_and_the_rest_are_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = [write(tmp_path, f"{number}.png", number) for number in range(6)]
    hangs = Path(uris[2]).read_bytes()
    forever = threading.Event()
    real = labeller_module.decode

    def decode(data: bytes, *rest: Any) -> Decoded:
        if data == hangs:
            forever.wait(30)
        return real(data, *rest)

    monkeypatch.setattr(labeller_module, "decode", decode)
    rows = Labeller(replace(SPEC, decode_timeout_s=0.3, decode_threads=1), OneBox())(manifest(uris)).to_pylist()
    forever.set()
    assert [row["status"] for row in rows] == ["ok", "ok", "crashed", "ok", "ok", "ok"]
    assert rows[2]["error"] == "decoding did not end within 0.3 s"


@pytest.mark.parametrize("most", [1, 2, 3])
def test_images_that_do_not_fit_together_are_tried_in_halves(tmp_path: Path, most: int) -> None:
    class SmallMemory(OneBox):
        def predict(self, images: Sequence[torch.Tensor], options: PredictOptions = DEFAULT) -> list[Instances]:
            if len(images) > most:
                raise torch.OutOfMemoryError("too many")
            return super().predict(images, options)

    model = SmallMemory()
    rows = Labeller(SPEC, model)(manifest([write(tmp_path, f"{n}.png", n) for n in range(5)]))
    assert rows["status"].to_pylist() == ["ok"] * 5
    assert [len(batch) for batch in model.batches] == {1: [1] * 5, 2: [2, 1, 2], 3: [2, 3]}[most]


def test_windows_hold_to_their_limits() -> None:
    windows = list(_windows([5, 5, 5, 50, 1, 1, 1, 1], lambda item: item, most=10, count=3))
    assert windows == [[5, 5], [5], [50], [1, 1, 1], [1]]


def test_labels_do_not_depend_on_the_block(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(9):
        size = (96, 64) if number % 3 else (64, 96)
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    uris = [str(tmp_path / f"{number}.png") for number in range(9)]
    torch.manual_seed(1)
    model = create_model("tiny")
    spec = replace(SPEC, predict=PredictOptions(score_threshold=0.0, max_detections=10, batch_size=4))
    together = Labeller(spec, model)(manifest(uris))
    one_by_one = [Labeller(replace(spec, predict=spec.predict.model_copy(update={"batch_size": 1})), model)]
    alone: list[dict[str, Any]] = [one_by_one[0](manifest(uris).slice(number, 1)).to_pylist()[0] for number in range(9)]
    assert sum(len(row["instances"]) for row in alone) > 20
    for grouped, single in zip(together.to_pylist(), alone, strict=True):
        assert_same_labels(grouped, single)


def assert_same_labels(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal but for the last bit of a float: a matrix product of more rows may sum in another order."""
    assert one["status"] == other["status"]
    assert one["rles"] == other["rles"]
    for a, b in zip(one["instances"], other["instances"], strict=True):
        assert (a["category_id"], a["area"]) == (b["category_id"], b["area"])
        assert a["score"] == pytest.approx(b["score"], abs=1e-6)
        assert list(a["box"].values()) == pytest.approx(list(b["box"].values()), abs=1e-4)


def test_another_detector_labels_through_the_door_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's own model, as an installed package brings it: its checkpoint in, rows of the table out."""
    monkeypatch.syspath_prepend(str(second_detector.install(tmp_path)))
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8)).resize((80, 64)).save(tmp_path / f"{number}.png")
    model = load_detector(second_detector.checkpoint())
    spec = replace(SPEC, model_id=model.model_id, predict=PredictOptions(score_threshold=0.0))
    rows = Labeller(spec, model)(manifest([str(tmp_path / f"{number}.png") for number in range(3)])).to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert {row["model_id"] for row in rows} == {model.model_id}
    direct = second_detector.load(second_detector.checkpoint(), torch.device("cpu"))
    for number, row in enumerate(rows):
        image = torch.from_numpy(np.array(Image.open(tmp_path / f"{number}.png"))).permute(2, 0, 1)
        (expected,) = direct.predict([image], spec.predict)
        assert len(expected) == 5
        assert [instance["score"] for instance in row["instances"]] == expected.scores.tolist()
        assert [instance["category_id"] for instance in row["instances"]] == expected.labels.tolist()
        assert {instance["category"] for instance in row["instances"]} <= {"cup", "plate"}
        assert [instance["area"] for instance in row["instances"]] == rle_areas(row) == expected.areas.tolist()
        assert sum(rle_areas(row)) > 0


def rle_areas(row: dict[str, Any]) -> list[int]:
    size = [row["height"], row["width"]]
    return [int(pycocotools.mask.area({"size": size, "counts": counts})) for counts in row["rles"]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": np.array([1234])}, r"labels \[1234\] are none of its categories"),
        ({"boxes": np.zeros((1, 4))}, r"boxes are float64 \(1, 4\), not an array of float32 \(1, 4\)"),
        ({"boxes": torch.zeros(1, 4)}, "boxes are Tensor, not an array"),
        ({"areas": np.array([1, 2])}, r"areas are int64 \(2,\)"),
        ({"keypoints": np.zeros((2, 4, 3), np.float32)}, r"keypoints are float32 \(2, 4, 3\), not .* \(1, 4, 3\)"),
        ({"rles": []}, "0 masks for 1 instances"),
        ({"size": (7, 7)}, r"has the size \(7, 7\), the image \(20, 32\)"),
    ],
)
def test_an_answer_of_another_form_is_the_models_error(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    """No such answer reaches the table, and no other image has to pay for it."""

    class Wrong(OneBox):
        def _find(self, image: torch.Tensor) -> Instances:
            found = super()._find(image)
            return replace(found, **changes) if bool((image == 99).all()) else found

    model: Detector = Wrong()
    uris = [write(tmp_path, f"{colour}.png", colour) for colour in (50, 99)]
    rows = Labeller(SPEC, model)(manifest(uris)).to_pylist()
    assert [row["status"] for row in rows] == [Status.OK, Status.MODEL_ERROR]
    assert re.search(reason, rows[1]["error"])


def test_a_missing_answer_is_the_models_error(tmp_path: Path) -> None:
    class Silent(OneBox):
        def predict(self, images: Sequence[torch.Tensor], options: PredictOptions = DEFAULT) -> list[Instances]:
            return []

    (row,) = Labeller(SPEC, Silent())(manifest([write(tmp_path, "a.png", 50)])).to_pylist()
    assert (row["status"], row["error"]) == (Status.MODEL_ERROR, "ValueError: the detector gave 0 answers for 1 images")
