"""The 3x3 convolution of fewer multiplications, against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from masklake.model.kernels import winograd
from masklake.model.kernels.winograd import WinogradConv


@pytest.mark.parametrize("shape", [(1, 40, 56), (1, 13, 19), (3, 14, 14), (40, 14, 14), (2, 1, 1), (1, 1, 200), (0, 14, 14)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_convolution(shape: tuple[int, int, int], bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(128, 144, 3, padding=1, bias=bias)
    x = torch.randn(shape[0], 128, *shape[1:]).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        exact = functional.conv2d(
            x.double(), conv.weight.double(), None if conv.bias is None else conv.bias.double(), padding=1
        )
        found = WinogradConv(conv)(x)
        assert found.shape == exact.shape
        if len(found):
            error, torchs = (found - exact).abs().mean(), (conv(x) - exact).abs().mean()
            assert error < 4 * torchs + 1e-9


def test_bands_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = WinogradConv(nn.Conv2d(128, 128, 3, padding=1))
    x = torch.randn(3, 128, 30, 22)
    whole = layer(x)
    for tiles in (1, 11, 40, 200, 400):
        monkeypatch.setattr(winograd, "TILES_PER_BAND", tiles)
        torch.testing.assert_close(layer(x), whole)


def test_it_is_for_wide_plain_convolutions() -> None:
    assert WinogradConv.fits(nn.Conv2d(128, 128, 3, padding=1))
    others = (
        nn.Conv2d(128, 128, 3),
        nn.Conv2d(128, 128, 3, padding=1, stride=2),
        nn.Conv2d(128, 128, 3, padding=2, dilation=2),
        nn.Conv2d(128, 128, 3, padding=1, groups=2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.Conv2d(128, 128, 1),
    )
    assert not any(WinogradConv.fits(other) for other in others)
