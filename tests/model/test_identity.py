"""Names of models do not change: three of them are pinned, and only what a model uses enters its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

from masklake.model.config import BackboneConfig, Category, ModelConfig
from masklake.model.create import create_model
from masklake.model.identity import FIRST_DEFAULTS, canonical_json, differing, model_id
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.presets import PRESETS
from masklake.model.weights.checkpoint import dumps, load_checkpoint
from masklake.model.weights.detectron2 import conventions

SMALL: dict[str, Any] = {
    "backbone": {"depths": (1, 1, 1, 1), "widths": (8, 8, 8, 8), "stem_channels": 8},
    "fpn_channels": 8,
    "box_hidden": 8,
    "mask_channels": (8,),
    "mask_deconv_channels": 8,
}


def counted(config: ModelConfig) -> MaskRCNN:
    """A model whose weights are numbers from 0 to 1 by place: no generator of random numbers has a say in them."""
    model = MaskRCNN(config)
    with torch.no_grad():
        for tensor in model.network.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_((torch.arange(tensor.numel()) % 251).reshape(tensor.shape) / 251)
    return model


def of_torchvision() -> ModelConfig:
    return PRESETS["maskrcnn_resnet50_fpn"].changed(**SMALL)


def of_detectron2() -> ModelConfig:
    return conventions(PRESETS["maskrcnn_resnet50_c4"].changed(**{**SMALL, "mask_channels": ()}))


def of_ours() -> ModelConfig:
    arrow = Category(id=20, name="flèche", keypoints=("tip", "left", "right"), flip_pairs=((1, 2),), skeleton=((0, 1), (0, 2)))
    categories = (Category(id=3, name="disk"), arrow)
    return PRESETS["tiny"].changed(categories=categories, rpn_backbone="own", mask_resize=30, score_threshold=0.1)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (of_torchvision, "maskrcnn_resnet50_fpn-ad6627f923e5"),
        (of_detectron2, "maskrcnn_resnet50_c4-c5d6b1e933a0"),
        (of_ours, "tiny-3888091d4543"),
    ],
)
def test_a_models_name_never_moves(config: Any, name: str) -> None:
    """Whoever has to change a name here makes every bucket be labelled again."""
    assert counted(config()).model_id == name


@pytest.mark.parametrize("kind", [ModelConfig, BackboneConfig, Category])
def test_every_field_has_the_default_it_was_introduced_with(kind: type[BaseModel]) -> None:
    nested = {"backbone"}
    optional = {name for name, field in kind.model_fields.items() if not field.is_required()} - nested
    assert optional == FIRST_DEFAULTS[kind.__name__].keys(), "a new field needs a line in FIRST_DEFAULTS: its default"


class Category2(Category):
    """A later version's category."""

    colour: str = "red"


class Grown(ModelConfig):
    """A later version: new fields, one of them nested, and another default."""

    categories: tuple[Category2, ...]  # type: ignore[assignment]
    soft_nms: bool = False
    score_threshold: float = 0.5


def grown(**changes: Any) -> Grown:
    return Grown.model_validate({**of_ours().model_dump(), **changes})


def test_a_later_version_knows_a_model_by_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FIRST_DEFAULTS, "Grown", {**FIRST_DEFAULTS["ModelConfig"], "soft_nms": False})  # type: ignore[attr-defined]
    monkeypatch.setitem(FIRST_DEFAULTS, "Category2", {**FIRST_DEFAULTS["Category"], "colour": "red"})  # type: ignore[attr-defined]
    state = counted(of_ours()).network.state_dict()
    name = model_id(of_ours(), state)
    assert model_id(grown(), state) == name
    assert model_id(grown(soft_nms=True), state) != name
    blue = [{**category.model_dump(), "colour": "blue"} for category in of_ours().categories]
    assert model_id(grown(categories=blue), state) != name
    old = of_ours().changed(score_threshold=0.05)  # what was the default is now a value like any other
    assert model_id(grown(score_threshold=0.05), state) == model_id(old, state)
    assert model_id(grown(score_threshold=0.5), state) == model_id(of_ours().changed(score_threshold=0.5), state)


def test_each_field_that_differs_counts() -> None:
    assert differing(PRESETS["maskrcnn_resnet50_fpn_v2"], FIRST_DEFAULTS).keys() == {
        *("preset", "categories", "backbone", "head_norm", "rpn_convs", "box_channels", "box_layers")
    }
    assert differing(BackboneConfig(norm="batch"), FIRST_DEFAULTS) == {"norm": "batch"}
    state: dict[str, Tensor] = {}
    base = of_ours()
    tail = base.categories[1].model_copy(update={"skeleton": ((0, 1),)})
    others = [
        base.changed(categories=base.categories[::-1]),
        base.changed(categories=(base.categories[0], tail)),
        base.changed(image_std=(0.229, 0.224, 0.2250001)),
        base.changed(backbone={**base.backbone.model_dump(), "norm_eps": 0.0}),
        base.changed(anchor_sizes=((12,), (24,), (48,), (96,), (193,))),
    ]
    assert len({model_id(config, state) for config in (base, *others)}) == 1 + len(others)


def test_a_value_has_one_spelling() -> None:
    facts = {"a": 1.0, "b": (0.1, 2), "c": {"y": frozenset({"mask", "box"}), "x": True}}
    assert canonical_json(facts) == b'{"a":1,"b":[0.1,2],"c":{"x":true,"y":["box","mask"]}}'
    assert canonical_json(dict(reversed(facts.items()))) == canonical_json(facts)


def test_a_trained_models_name_is_that_of_its_file() -> None:
    """Norms that count their batches: the count is not kept by a file's reader."""
    backbone = {**PRESETS["tiny"].backbone.model_dump(), "norm": "batch"}
    model = create_model(PRESETS["tiny"].changed(backbone=backbone))
    model.network.backbone.train()(torch.zeros(1, 3, 64, 64))
    assert int(model.network.state_dict()["backbone.body.stem.1.num_batches_tracked"]) == 1
    assert load_checkpoint(dumps(model)).model_id == model.model_id
