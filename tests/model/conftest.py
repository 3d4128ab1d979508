"""torchvision's models with seeded weights: the oracle, and the source of state dicts in its format."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from masklake.model.config import Category, ModelConfig
from masklake.model.presets import PRESETS

TorchvisionModel = Callable[..., nn.Module]


def randomise_norms(model: nn.Module, generator: torch.Generator) -> None:
    """Statistics as after training: without them folding and eps would go untested."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor, low, high in (
                (part.running_mean, -0.2, 0.2),
                (part.running_var, 0.75, 1.25),
                (part.weight, 0.35, 0.65),
                (part.bias, -0.2, 0.2),
            ):
                tensor.data.uniform_(low, high, generator=generator)


class Calls:
    """What a hostile file holds: a function to call when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def calls() -> type[Calls]:
    """A class whose values, once pickled, call a function where they are unpickled."""
    return Calls


def spread_scores(model: nn.Module, image: Tensor, background: float) -> None:
    """Scale the predictors so that regions of `image` differ, as after training; more background, fewer detections."""
    canvas, _ = model.transform([image.float() / 255])
    features = model.backbone(canvas.tensors)
    proposals, _ = model.rpn(canvas, features)
    heads = model.roi_heads
    pooled = heads.box_head(heads.box_roi_pool(features, proposals, canvas.image_sizes))
    classifier = heads.box_predictor.cls_score
    logits = classifier(pooled)
    factor = 1.5 / logits.std(dim=0).mean()
    classifier.bias.copy_((classifier.bias - logits.mean(dim=0)) * factor)
    classifier.weight.mul_(factor)
    classifier.bias[0] += background
    heads.box_predictor.bbox_pred.weight.mul_(3)
    if heads.has_mask():
        heads.mask_predictor.mask_fcn_logits.weight.mul_(5)


@pytest.fixture(scope="session")
def torchvision_model() -> TorchvisionModel:
    """Builds a detector by torchvision's name, seeded, tuned on an image to report some 10 to 100 detections."""

    def build(name: str, image: Tensor, background: float, min_size: int = 800, max_size: int = 1333) -> nn.Module:
        torch.manual_seed(0)
        builder = getattr(torchvision.models.detection, name)
        model = builder(weights=None, weights_backbone=None, min_size=min_size, max_size=max_size).eval()
        with torch.no_grad():
            randomise_norms(model, torch.Generator().manual_seed(1))
            model.rpn.head.cls_logits.weight.mul_(20)
            model.rpn.head.bbox_pred.weight.mul_(10)
            spread_scores(model, image, background)
        return model

    return build


@pytest.fixture(scope="session")
def state_dict_bytes() -> Callable[[nn.Module], bytes]:
    """A model's state dict as the bytes of a .pth file."""

    def dump(model: nn.Module) -> bytes:
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        return buffer.getvalue()

    return dump


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """`tiny` for three categories with ids that are not consecutive; the last has four keypoints."""
    categories = (
        Category(id=3, name="disk"),
        Category(id=7, name="square"),
        Category(id=20, name="arrow", keypoints=("tip", "left", "right", "tail"), flip_pairs=((1, 2),)),
    )
    return ModelConfig.model_validate({**PRESETS["tiny"].model_dump(), "categories": categories})


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 (3, H, W): soft blobs, so that neighbouring regions differ but not at random."""
    coarse = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)[0]
    return (smooth.clamp(0, 1) * 255).to(torch.uint8)


@pytest.fixture(scope="session", name="picture")
def picture_fixture() -> Callable[..., Tensor]:
    """Draws a picture of (height, width) and a seed."""
    return picture
