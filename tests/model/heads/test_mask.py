"""Mask heads: the convolutional one against torch's own layers, and the meaning of each kind of output (tables 2b, 2e)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from masklake.model.build import build_mask_head
from masklake.model.config import ModelConfig
from masklake.model.heads.mask import ConvMaskHead


def head_of(tiny_config: ModelConfig, **changes: Any) -> Any:
    torch.manual_seed(0)
    head = build_mask_head(tiny_config.model_copy(update=changes))
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.1)
    return head


@pytest.fixture
def regions() -> Tensor:
    return torch.randn(6, 64, 14, 14, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)


LABELS = torch.tensor([1, 2, 3, 1, 2, 3])


def by_layers(head: ConvMaskHead, regions: Tensor) -> Tensor:
    """The head as its layers are drawn in figure 4."""
    for conv in head.convs:
        regions = functional.relu(conv(regions))
    return head.logits(functional.relu(head.deconv(regions)))


def test_matrix_products_do_what_the_layers_do(tiny_config: ModelConfig, regions: Tensor) -> None:
    head = head_of(tiny_config)
    expected = by_layers(head, regions)
    torch.testing.assert_close(head.all_channels(regions), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head(regions, LABELS), expected[torch.arange(6), LABELS], rtol=1e-4, atol=1e-4)


def test_gradients_are_the_layers(tiny_config: ModelConfig, regions: Tensor) -> None:
    head = head_of(tiny_config)
    targets = torch.rand(6, 28, 28, generator=torch.Generator().manual_seed(2))
    head.loss(regions, LABELS, targets).backward()
    found = {name: parameter.grad.clone() for name, parameter in head.named_parameters()}
    head.zero_grad()
    own = by_layers(head, regions)[torch.arange(6), LABELS]
    functional.binary_cross_entropy_with_logits(own, targets).backward()
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["fcn", "mlp"])
def test_a_softmax_head_reports_the_softmax(tiny_config: ModelConfig, regions: Tensor, kind: str) -> None:
    head = head_of(tiny_config, mask_output="softmax", mask_head=kind, mask_hidden=(32,))
    chances = head.all_channels(regions).softmax(dim=1)[torch.arange(6), LABELS]
    torch.testing.assert_close(head(regions, LABELS).sigmoid(), chances)


def test_a_softmax_is_trained_towards_the_class_inside_and_the_background_outside(
    tiny_config: ModelConfig, regions: Tensor
) -> None:
    head = head_of(tiny_config, mask_output="softmax")
    targets = (torch.rand(6, 28, 28, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    expected = functional.cross_entropy(head.all_channels(regions), targets.long() * LABELS[:, None, None])
    torch.testing.assert_close(head.loss(regions, LABELS, targets), expected)


@pytest.mark.parametrize("kind", ["fcn", "mlp"])
def test_a_class_agnostic_head_has_one_mask(tiny_config: ModelConfig, regions: Tensor, kind: str) -> None:
    head = head_of(tiny_config, mask_output="agnostic", mask_head=kind, mask_hidden=(32,))
    assert head.all_channels(regions).shape == (6, 1, 28, 28)
    assert torch.equal(head(regions, LABELS), head(regions, LABELS.flip(0)))


@pytest.mark.parametrize(("layers", "side"), [((32, 32), 28), ((32, 32, 32), 21)])
def test_an_mlp_predicts_any_m(tiny_config: ModelConfig, regions: Tensor, layers: tuple[int, ...], side: int) -> None:
    head = head_of(tiny_config, mask_head="mlp", mask_hidden=layers, mask_side=side)
    assert len(head.hidden) == len(layers)
    assert head(regions, LABELS).shape == (6, side, side)


@pytest.mark.parametrize("output", ["sigmoid", "softmax", "agnostic"])
@pytest.mark.parametrize("side", [1, 21, 27, 40])
def test_a_convolutional_head_predicts_any_m(tiny_config: ModelConfig, regions: Tensor, side: int, output: str) -> None:
    head = head_of(tiny_config, mask_output=output, mask_resize=side)
    expected = functional.interpolate(by_layers(head, regions), (side, side), mode="bilinear")
    torch.testing.assert_close(head.all_channels(regions), expected, rtol=1e-4, atol=1e-4)
    logits = head(regions, LABELS)
    assert logits.shape == (6, side, side)
    if output == "sigmoid":
        torch.testing.assert_close(logits, expected[torch.arange(6), LABELS], rtol=1e-4, atol=1e-4)
    loss = head.loss(regions, LABELS, torch.ones(6, side, side))
    loss.backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in head.parameters())


def test_any_number_of_bins(tiny_config: ModelConfig) -> None:
    head = head_of(tiny_config, mask_pool=9)
    assert head.side == 18
    assert head(torch.zeros(2, 64, 9, 9), LABELS[:2]).shape == (2, 18, 18)


@pytest.mark.parametrize("output", ["sigmoid", "softmax", "agnostic"])
@pytest.mark.parametrize("side", [28, 15])
def test_no_regions_give_a_zero_loss_with_gradients(tiny_config: ModelConfig, output: str, side: int) -> None:
    head = head_of(tiny_config, mask_output=output, mask_resize=side)
    assert head(torch.zeros(0, 64, 14, 14), LABELS[:0]).shape == (0, side, side)
    loss = head.loss(torch.zeros(0, 64, 14, 14), LABELS[:0], torch.zeros(0, side, side))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(parameter.grad is not None for parameter in head.parameters())
