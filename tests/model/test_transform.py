"""The canvas follows from the image alone, and is torchvision's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from model.config import ModelConfig
from model.errors import ConfigError
from model.presets import PRESETS
from model.transform import canvas_size, check_image, make_canvas, resized_size

FULL = PRESETS["maskrcnn_resnet50_fpn"]
CPU = torch.device("cpu")


def oracle(config: ModelConfig) -> GeneralizedRCNNTransform:
    return GeneralizedRCNNTransform(config.min_sizes[-1], config.max_size, config.image_mean, config.image_std).eval()


@pytest.mark.parametrize("size", [(480, 640), (640, 427), (1080, 1920), (100, 900), (333, 500)])
def test_pixels_and_sizes_are_torchvisions(size: tuple[int, int], picture: Callable[..., Tensor]) -> None:
    image = picture(*size)
    expected, _ = oracle(FULL)([image.float() / 255])
    canvas = make_canvas([image], FULL, 800, CPU)
    assert canvas.size == tuple(expected.tensors.shape[-2:]) == canvas_size(size, FULL)
    assert tuple(canvas.sizes[0].int().tolist()) == expected.image_sizes[0]
    torch.testing.assert_close(canvas.pixels, expected.tensors, rtol=0, atol=2e-5)


@given(st.integers(1, 12_000), st.integers(1, 12_000))
def test_a_canvas_fits_its_image_and_its_limits(height: int, width: int) -> None:
    resized = resized_size((height, width), 800, FULL)
    canvas = canvas_size((height, width), FULL)
    assert all(1 <= side <= 1333 for side in resized)
    assert all(side % 32 == 0 and 0 <= side - inner < 32 for side, inner in zip(canvas, resized, strict=True))


def test_tiny_keeps_small_images_as_they_are_and_shrinks_large_ones() -> None:
    tiny = PRESETS["tiny"]
    assert resized_size((128, 250), 256, tiny) == (128, 250)
    assert resized_size((256, 300), 256, tiny) == (256, 300)
    assert resized_size((512, 600), 256, tiny) == (256, 300)


def test_images_of_a_batch_lie_beside_each_other_on_zeros(picture: Callable[..., Tensor]) -> None:
    tiny, images = PRESETS["tiny"], [picture(64, 96), picture(40, 100)]
    canvas = make_canvas(images, tiny, 256, CPU)
    assert canvas.size == (64, 128)
    assert canvas.sizes.tolist() == [[64, 96], [40, 100]]
    assert canvas.pixels[1, :, 40:].abs().max() == 0
    assert canvas.pixels[0, :, :, 96:].abs().max() == 0
    alone = make_canvas(images[1:], tiny, 256, CPU)
    assert torch.equal(canvas.pixels[1:, :, :40, :100], alone.pixels[:, :, :40, :100])


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(1, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, dtype=torch.uint8),
        torch.zeros(3, 0, 8, dtype=torch.uint8),
    ],
)
def test_anything_but_uint8_rgb_is_refused(image: Tensor) -> None:
    with pytest.raises(ConfigError, match="uint8 RGB"):
        check_image(image)
