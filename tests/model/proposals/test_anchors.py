"""Anchors are torchvision's, computed one by one."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from masklake.model.presets import PRESETS
from masklake.model.proposals.anchors import anchors_at, cell_anchors, level_strides


@pytest.mark.parametrize("canvas", [(800, 1344), (832, 800), (64, 96)])
def test_every_anchor_equals_torchvisions(canvas: tuple[int, int]) -> None:
    config = PRESETS["maskrcnn_resnet50_fpn"]
    shapes = [(canvas[0] // s, canvas[1] // s) for s in (4, 8, 16, 32)]
    shapes.append(tuple(-(-side // 2) for side in shapes[-1]))
    oracle = AnchorGenerator(config.anchor_sizes, (config.anchor_ratios,) * 5)
    images = ImageList(torch.zeros(1, 3, *canvas), [canvas])
    expected = oracle(images, [torch.zeros(1, 8, *shape) for shape in shapes])[0]

    levels = zip(config.anchor_sizes, shapes, level_strides(None, canvas, shapes), strict=True)
    ours = [
        anchors_at(torch.arange(3 * h * w), cell_anchors(sizes, config.anchor_ratios, rounding=True), w, stride)
        for sizes, (h, w), stride in levels
    ]
    assert torch.equal(torch.cat(ours), expected)


def test_p6_of_an_800_pixel_canvas_has_stride_61() -> None:
    config = PRESETS["maskrcnn_resnet50_fpn"]
    assert level_strides(None, (800, 1344), [(13, 21)] * 5)[-1] == (61, 64)
    assert level_strides(config.rpn_strides, (800, 1344), [(13, 21)] * 5)[-1] == (64, 64)


def test_unrounded_cells_keep_their_area_and_ratio() -> None:
    cells = cell_anchors((24, 48), (0.5, 2.0), rounding=False)
    width, height = (cells[:, 2:] - cells[:, :2]).unbind(1)
    torch.testing.assert_close(width * height, torch.tensor([24.0, 48, 24, 48]) ** 2)
    torch.testing.assert_close(height / width, torch.tensor([0.5, 0.5, 2, 2]))
