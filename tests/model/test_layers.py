"""Layers that compute the results of torch's own in another way."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from masklake.model.backbones.fpn import add_upsampled
from masklake.model.layers import Pointwise


@pytest.mark.parametrize("bias", [True, False])
def test_a_pointwise_layer_is_the_convolution(bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(12, 20, 1, bias=bias)
    x = torch.randn(2, 12, 7, 9).to(memory_format=torch.channels_last)
    found = Pointwise.of(conv)(x)
    torch.testing.assert_close(found, conv(x))
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_other_convolutions_are_left_alone() -> None:
    assert Pointwise.fits(nn.Conv2d(8, 8, 1))
    for other in (nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, stride=2), nn.Conv2d(8, 8, 1, groups=2), nn.Linear(8, 8)):
        assert not Pointwise.fits(other)


@pytest.mark.parametrize("size", [(8, 12), (7, 12), (9, 13)])
@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
def test_adding_the_level_above_repeats_its_nearest_values(size: tuple[int, int], memory: torch.memory_format) -> None:
    torch.manual_seed(0)
    finer, coarser = torch.randn(2, 3, *size).to(memory_format=memory), torch.randn(2, 3, 4, 6).to(memory_format=memory)
    expected = finer + functional.interpolate(coarser, size=size, mode="nearest")
    assert torch.equal(add_upsampled(finer.clone(memory_format=torch.preserve_format), coarser), expected)
