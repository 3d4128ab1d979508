"""The public API: its names and options, its imports, and its results for tables and models."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pydantic import BaseModel

import masklake
from masklake import prediction
from masklake.jobs import label as label_command
from masklake.jobs import train as train_command
from masklake.jobs.label import LabelOptions
from masklake.jobs.training.options import TrainOptions
from masklake.model import PredictOptions
from masklake.model.config import Task
from masklake.model.errors import MaskLakeError
from masklake.options import AugmentationKeywords, RecipeKeywords, StorageKeywords
from masklake.pipeline.images.decode import DecodeLimits, decode
from masklake.pipeline.inputs.listing import InputSpec
from masklake.pipeline.storage.options import StorageOptions
from masklake.pipeline.training.augmentation import Augmentation
from masklake.pipeline.training.recipe import Recipe
from tests.masklake.conftest import SIZE, bitmap, encoded

# -- names and options -------------------------------------------------------------------------------------------------


def test_every_public_name_is_there() -> None:
    assert {name for name in masklake.__all__ if not hasattr(masklake, name)} == set()
    assert set(masklake.__all__) <= set(dir(masklake))
    with pytest.raises(AttributeError, match="'masklake' has no attribute 'lable'"):
        masklake.lable  # noqa: B018


def test_every_error_is_public() -> None:
    def below(kind: type[MaskLakeError]) -> set[type[MaskLakeError]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    assert {name for name in masklake.__all__ if name.endswith("Error")} == {kind.__name__ for kind in below(MaskLakeError)}


@pytest.mark.slow
def test_importing_it_loads_no_heavy_library() -> None:
    heavy = "('torch', 'ray', 'numpy', 'pyarrow', 'duckdb')"
    code = f"import sys, masklake; masklake.label; masklake.ConfigError; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.slow
def test_reading_and_predicting_need_no_ray(table: str, checkpoint: Path) -> None:
    code = (
        f"import sys, masklake; masklake.open_table({table!r}).masks('a.png'); masklake.load_model({str(checkpoint)!r}); "
        "print('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


NESTED = {"input", "storage", "predict", "limits"}
"""Fields of LabelOptions and TrainOptions that the API spreads over parameters of their own."""

FREER: Mapping[str, Any] = {
    "tasks": Collection[Task] | None,
    "recipe": RecipeKeywords | None,
    "augmentation": AugmentationKeywords | None,
    "model": Mapping[str, Any] | None,
    "max_dets": Sequence[int],
    "milestones": Sequence[float],
}
"""What a caller may give for a field, where that is more than the field's own type."""


def fields(*models: type[BaseModel]) -> dict[str, tuple[set[Any], Any]]:
    """What may be given for each field of the models, and its default."""
    found = {}
    for model in models:
        hints = get_type_hints(model)
        for name, field in model.model_fields.items():
            default = "required" if field.is_required() else field.default
            found[name] = members(FREER.get(name, hints[name])), default
    return found


def members(kind: Any) -> set[Any]:
    """The alternatives of a type; where text may name a place a path may, too."""
    if get_origin(kind) in (Union, UnionType):
        return set().union(*map(members, get_args(kind))) - {os.PathLike[str]}
    return {("literal", value) for value in get_args(kind)} if get_origin(kind) is Literal else {kind}


def parameters(function: Callable[..., Any]) -> dict[str, tuple[set[Any], Any]]:
    """The same of a function's parameters."""
    hints = get_type_hints(function, vars(sys.modules[function.__module__]) | {"LabelReport": None, "TrainReport": None})
    signature = inspect.signature(function).parameters
    return {
        name: (members(hints[name]), "required" if parameter.default is parameter.empty else parameter.default)
        for name, parameter in signature.items()
        if name != "storage"
    }


def test_label_has_the_options_of_the_command() -> None:
    expected = fields(LabelOptions, InputSpec, PredictOptions, DecodeLimits)
    expected = {name: field for name, field in expected.items() if name not in NESTED}
    expected["source"] = expected.pop("uri")
    expected["precision"] = expected["precision"][0], LabelOptions.model_fields["predict"].default.precision
    assert parameters(masklake.label) == expected


def test_train_has_the_options_of_the_command() -> None:
    expected = {name: field for name, field in fields(TrainOptions).items() if name not in NESTED}
    for name in ("recipe", "model", "augmentation"):  # None stands for no changes
        assert expected[name][1] in ({}, Augmentation())
        expected[name] = expected[name][0], None
    assert parameters(masklake.train) == expected


def test_predict_has_the_options_of_the_model() -> None:
    signature = inspect.signature(masklake.Predictor.predict).parameters
    hints = get_type_hints(masklake.Predictor.predict, {**vars(prediction), "Picture": Any, "Instances": Any})
    given = {name: (members(hints[name]), parameter.default) for name, parameter in list(signature.items())[2:]}
    assert given == fields(PredictOptions)


@pytest.mark.parametrize(
    ("keywords", "model"), [(StorageKeywords, StorageOptions), (RecipeKeywords, Recipe), (AugmentationKeywords, Augmentation)]
)
def test_shared_keywords_are_the_fields_of_their_model(keywords: Any, model: type[BaseModel]) -> None:
    given = {name: members(kind) for name, kind in get_type_hints(keywords).items()}
    assert given == {name: kinds for name, (kinds, _) in fields(model).items()}


def test_label_hands_every_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[LabelOptions] = []
    monkeypatch.setattr(label_command, "run", heard.append)
    values = {
        "column": "image",
        "precision": "bf16",
        "score_threshold": 0.1,
        "nms_iou": 0.2,
        "max_detections": 3,
        "mask_threshold": 0.4,
        "tasks": ["box"],
        "batch_size": 5,
        "max_bytes": 6,
        "max_pixels": 7,
        "max_side": 8,
        "tick": "nine",
        "if_running": "wait",
        "retry_failed": True,
        "device": "cpu",
        "workers": 10,
        "price_per_hour": 10.5,
        "block_rows": 11,
        "address": "twelve",
        "progress": False,
        "region": "north",
    }
    assert set(values) == set(parameters(masklake.label)) - {"source", "table", "weights"} | {"region"}
    masklake.label(Path("photos"), "table", weights="w", **values)
    (options,) = heard
    given = options.model_dump()
    given |= given.pop("input") | given.pop("storage") | given.pop("predict") | given.pop("limits")
    expected = values | {"uri": "photos", "table": "table", "weights": "w", "tasks": frozenset(["box"])}
    assert {name: given[name] for name in expected} == expected


def test_train_hands_every_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[TrainOptions] = []
    monkeypatch.setattr(train_command, "run", heard.append)
    values = {
        "name": "n",
        "images": "i",
        "val": "v",
        "val_images": "vi",
        "preset": "p",
        "tasks": {"mask"},
        "learn": "detector",
        "proposals": "q",
        "weights": "w",
        "reset_predictors": True,
        "workers": 2,
        "device": "cuda",
        "threads": 3,
        "seed": 4,
        "recipe": {"epochs": 5},
        "model": {"fpn_channels": 6},
        "augmentation": {"crop": 64},
        "evaluate_every": 7,
        "max_dets": [8],
        "keep": "best",
        "allow_missing": True,
        "max_unusable": 0.9,
        "keep_empty": True,
        "max_failures": 10,
        "address": "a",
        "anonymous": True,
    }
    assert set(values) == set(parameters(masklake.train)) - {"train", "output"} | {"anonymous"}
    masklake.train("t.json", Path("out"), **values)
    (options,) = heard
    given = options.model_dump()
    given |= given.pop("storage")
    given["augmentation"] = {"crop": given["augmentation"]["crop"]}
    assert {name: given[name] for name in values} == values | {"max_dets": (8,)}
    assert (options.train, options.output) == ("t.json", "out")


def test_bad_options_are_refused_by_name() -> None:
    with pytest.raises(masklake.ConfigError, match=r"labelling options: predict\.score_threshold: input should be less than"):
        masklake.label("photos", "table", weights="w", score_threshold=2)
    with pytest.raises(masklake.ConfigError, match=r"training options: seed: input should be greater than or equal to 0"):
        masklake.train("t.json", "out", name="n", seed=-1)
    with pytest.raises(masklake.ConfigError, match=r"storage options: endpoint: no such option"):
        masklake.open_table("table", endpoint="http://localhost")  # type: ignore[call-arg]


# -- tables ------------------------------------------------------------------------------------------------------------


def test_an_answer_comes_in_every_form(table: str) -> None:
    sql = "SELECT uri[-5:] AS name, score FROM current_detections WHERE score >= $least ORDER BY score DESC"
    answer = masklake.open_table(Path(table)).query(sql, {"least": 0.1})
    rows = [("a.png", pytest.approx(0.9)), ("a.png", pytest.approx(0.3))]
    assert len(answer) == 2
    assert [tuple(row.values()) for row in answer] == rows
    assert list(zip(*answer.to_arrow().to_pydict().values(), strict=True)) == rows
    assert pa.table(answer) == answer.to_arrow()  # by Arrow's C stream
    pandas = pytest.importorskip("pandas")
    frame = answer.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.itertuples(index=False, name=None)) == rows


def test_an_answer_comes_as_a_polars_frame(table: str) -> None:
    polars = pytest.importorskip("polars")
    frame = masklake.open_table(table).query("SELECT score FROM current_detections").to_polars()
    assert isinstance(frame, polars.DataFrame)
    assert frame["score"].to_list() == pytest.approx([0.9, 0.3])


def test_a_frame_of_a_library_that_is_not_there(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = masklake.open_table(table).query("SELECT 1 AS one FROM images")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"polars is not installed: pip install polars, or use to_arrow\(\)"):
        answer.to_polars()
    with pytest.raises(ModuleNotFoundError, match="pandas is not installed"):
        answer.to_pandas()


def test_masks_are_those_that_were_encoded(table: str) -> None:
    opened = masklake.open_table(table)
    masks = opened.masks("a.png")
    assert (masks.dtype, masks.shape) == (np.bool_, (2, *SIZE))
    np.testing.assert_array_equal(masks, [bitmap(0), bitmap(1)])
    np.testing.assert_array_equal(opened.masks(str(Path(table).parent / "a.png"), min_score=0.5), [bitmap(0)])
    assert opened.masks("b.png").shape == (0, *SIZE)
    with pytest.raises(masklake.InputNotFoundError, match=r"c\.png: is not in the table"):
        opened.masks("c.png")


def test_show_draws_the_likely_instances(table: str) -> None:
    opened = masklake.open_table(table)
    drawn = {score: np.asarray(opened.show("a.png", min_score=score)) for score in (0.0, 0.5, 1.0)}
    assert drawn[0.5].shape == (SIZE[0] * 16, SIZE[1] * 16, 3)
    np.testing.assert_array_equal(np.asarray(opened.show("a.png")), drawn[0.5])
    assert (drawn[1.0] == 128).all()
    assert (drawn[0.0] != 128).sum() > (drawn[0.5] != 128).sum() > 0
    moved = Path(table).parent / "moved"
    moved.mkdir()
    (Path(table).parent / "a.png").rename(moved / "a.png")
    with pytest.raises(masklake.InputNotFoundError, match="is not there any more"):
        opened.show("a.png")
    np.testing.assert_array_equal(np.asarray(opened.show("a.png", images=moved)), drawn[0.5])


def test_a_place_without_a_table_is_refused_at_once(tmp_path: Path, table: str) -> None:
    with pytest.raises(masklake.TableError, match="does not exist"):
        masklake.open_table(tmp_path / "nothing")
    with pytest.raises(masklake.QueryError, match="no_such_column"):
        masklake.open_table(table).query("SELECT no_such_column FROM images")


# -- models ------------------------------------------------------------------------------------------------------------


def test_every_kind_of_image_gives_the_same_instances(checkpoint: Path, tmp_path: Path) -> None:
    detector = masklake.load_model(checkpoint)
    coarse = np.random.default_rng(3).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    stored = Image.fromarray(coarse).resize((96, 64), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = 6  # upright it is 64 pixels wide and 96 high
    stored.save(tmp_path / "turned.png", exif=exif)
    as_labelled = decode((tmp_path / "turned.png").read_bytes()).image
    assert as_labelled is not None
    array = as_labelled.permute(1, 2, 0).numpy()
    bgr = array[:, :, ::-1].copy()
    images = [Image.open(tmp_path / "turned.png"), array, as_labelled, bgr[:, :, ::-1], Image.fromarray(array)]
    (expected,) = detector.model.predict([as_labelled], PredictOptions(score_threshold=0.0, max_detections=5))
    assert (expected.size, len(expected)) == ((96, 64), 5)
    for found in detector.predict(images, score_threshold=0.0, max_detections=5):
        assert found.size == expected.size
        np.testing.assert_array_equal(found.boxes, expected.boxes)
        np.testing.assert_array_equal(found.scores, expected.scores)
        assert found.rles == expected.rles
    assert set(expected.labels.tolist()) <= set(detector.category_names)
    assert detector.model_id == detector.model.model_id


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), "takes a list of images, not ndarray"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "takes a list of images, not Tensor"),
        (Image.new("RGB", (8, 8)), r"takes a list of images, not Image: write predict\(\[image\]\)"),
        ("a.png", "takes a list of images, not str"),
        ([np.zeros((8, 8, 3))], r"images\[0\]: an array must be uint8 RGB \(H, W, 3\), not float64 \(8, 8, 3\)"),
        ([np.zeros((3, 8, 8), np.uint8)], r"not uint8 \(3, 8, 8\)"),
        ([torch.zeros(8, 8, 3, dtype=torch.uint8)], r"must be a uint8 RGB tensor \(3, H, W\)"),
        ([Image.new("RGB", (8, 8)), "a.png"], r"images\[1\]: give a PIL image, .* not str"),
    ],
)
def test_other_images_are_refused(checkpoint: Path, images: Any, message: str) -> None:
    with pytest.raises(masklake.ConfigError, match=message):
        masklake.load_model(checkpoint).predict(images)


def test_an_image_that_cannot_be_decoded_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    Image.fromarray(bitmap(1).astype(np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-200])
    with pytest.raises(masklake.ConfigError, match=r"images\[0\]: cannot be decoded \(.*truncated"):
        masklake.load_model(checkpoint).predict([Image.open(tmp_path / "cut.png")])


def test_weights_that_are_none(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(masklake.CheckpointError, match=r"no checkpoint at .*nothing"):
        masklake.load_model(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(masklake.CheckpointError, match="is not a MaskLake checkpoint"):
        masklake.load_model(tmp_path / "text")
    with pytest.raises(masklake.ConfigError, match="'gpu' is not a torch device"):
        masklake.load_model(checkpoint, device="gpu")


def test_masks_are_decoded_as_pycocotools_does() -> None:
    mask = bitmap(5)
    decoded = masklake.decode_mask(encoded(mask), SIZE)
    assert decoded.dtype == np.bool_
    np.testing.assert_array_equal(decoded, mask)
    np.testing.assert_array_equal(masklake.decode_mask(encoded(mask).decode(), SIZE), mask)


@pytest.mark.parametrize("counts", [b"", b"\xff", encoded(np.ones((3, 3), bool)), b"o" * 13 + b"0"])
def test_what_is_no_mask_of_the_size_is_refused(counts: bytes) -> None:
    with pytest.raises(masklake.ConfigError, match=r"not a mask of an image of 40 x 60 pixels \(H x W\)"):
        masklake.decode_mask(counts, SIZE)
