"""The canvas follows from the image alone, and is torchvision's or Detectron2's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from masklake.model.config import ModelConfig
from masklake.model.errors import ConfigError
from masklake.model.presets import PRESETS
from masklake.model.transform import canvas_size, check_image, make_canvas, resize_like_pillow, resized_size
from masklake.model.weights.detectron2 import conventions

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
    ("size", "target"),
    [
        ((48, 64), (80, 107)),
        ((108, 192), (75, 133)),
        ((300, 400), (80, 107)),
        ((37, 501), (90, 90)),
        ((5, 3), (50, 30)),
        ((40, 30), (40, 57)),
        ((1, 1), (3, 5)),
    ],
)
def test_resizing_like_pillow_gives_pillows_bytes(size: tuple[int, int], target: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = Image.fromarray(image.numpy()).resize(target[::-1], Image.Resampling.BILINEAR)
    assert np.array_equal(resize_like_pillow(image.permute(2, 0, 1), target).permute(1, 2, 0).numpy(), np.array(expected))


@pytest.mark.parametrize(
    ("size", "torchvision", "detectron2"),
    [((480, 640), (800, 1066), (800, 1067)), ((1080, 1920), (749, 1333), (750, 1333)), ((640, 480), (1066, 800), (1067, 800))],
)
def test_the_two_systems_round_sizes_differently(
    size: tuple[int, int], torchvision: tuple[int, int], detectron2: tuple[int, int]
) -> None:
    assert resized_size(size, 800, FULL) == torchvision
    assert resized_size(size, 800, conventions(FULL)) == detectron2
    assert canvas_size(size, conventions(PRESETS["maskrcnn_resnet50_c4"])) == detectron2


def test_detectron2s_networks_take_blue_green_red_of_0_to_255() -> None:
    image = torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].expand(3, 32, 32)
    canvas = make_canvas([image], conventions(FULL), 32, CPU)
    expected = torch.tensor([30 - 103.53, 20 - 116.28, 10 - 123.675])
    torch.testing.assert_close(canvas.pixels[0, :, 5, 5], expected)


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
