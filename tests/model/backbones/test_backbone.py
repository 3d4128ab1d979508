"""Backbones against torchvision's residual networks, with the same seeded weights."""

from __future__ import annotations

import pytest
import torch
import torchvision

from masklake.model.backbones.resnet import STAGES, ResNet, make_stage
from masklake.model.build import build_backbone, region_channels
from masklake.model.config import BackboneConfig, ModelConfig
from masklake.model.presets import PRESETS
from masklake.model.weights.torchvision import our_name

NAMES = ("resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d")


def config_of(name: str) -> BackboneConfig:
    return PRESETS[f"maskrcnn_{name}_fpn"].backbone


@pytest.mark.parametrize("name", NAMES)
def test_stages_are_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(weights=None).eval()
    ours = ResNet(config_of(name)).eval()
    state = {our_name(f"backbone.body.{key}"): tensor for key, tensor in theirs.state_dict().items()}
    wanted = ours.state_dict()
    ours.load_state_dict({key: state[f"backbone.body.{key}"] for key in wanted})
    image = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        for stage, found in enumerate(ours(image), start=1):
            x = getattr(theirs, f"layer{stage}")(x)
            torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))


@pytest.mark.parametrize(
    ("kind", "stride", "channels"), [("fpn", 4, 256), ("c4", 16, 1024), ("c5", 32, 2048), ("dc5", 16, 2048)]
)
def test_maps_have_the_strides_and_channels_that_the_rest_expects(kind: str, stride: int, channels: int) -> None:
    config = PRESETS[f"maskrcnn_resnet50_{kind}"]
    with torch.inference_mode():
        backbone = build_backbone(config).eval()
        maps = backbone(torch.zeros(1, 3, 64, 128))
    assert [tuple(level.shape[-2:]) for level in maps[:4]] == [(64 // s, 128 // s) for s in config.roi_strides]
    assert len(maps) == len(config.rpn_strides)
    assert (config.roi_strides[0], maps[0].shape[1]) == (stride, channels) == (stride, backbone.channels)
    assert region_channels(config) == {"fpn": 256}.get(kind, 2048)


def test_a_dilated_stage_sees_as_far_as_the_strided_one_at_twice_the_resolution() -> None:
    """Without its padding's influence, every second pixel of the dilated stage is the strided stage's own."""
    torch.manual_seed(0)
    config = BackboneConfig(depths=(1, 1, 1, 1), widths=(4, 8, 16, 32), stem_channels=8)
    strided, dilated = (make_stage(config, STAGES - 1, stride, dilation) for stride, dilation in ((2, 1), (1, 2)))
    dilated.load_state_dict(strided.state_dict())
    assert [block.spatial[0].dilation for block in dilated] == [(2, 2)]
    x = torch.randn(1, 64, 8, 8)
    assert strided(x).shape == (1, 128, 4, 4)
    assert dilated(x).shape == (1, 128, 8, 8)
    # The strided 3x3 convolution reads neighbours one pixel away, the dilated one two: equal where both read one value.
    flat = torch.ones(1, 64, 12, 12)
    torch.testing.assert_close(strided(flat)[..., 2:4, 2:4], dilated(flat)[..., 4:8:2, 4:8:2])


def test_the_stride_can_be_in_the_first_convolution() -> None:
    stage = make_stage(BackboneConfig(stride_in="1x1"), 1, stride=2)
    assert (stage[0].reduce[0].stride, stage[0].spatial[0].stride) == ((2, 2), (1, 1))
    stage = make_stage(BackboneConfig(), 1, stride=2)
    assert (stage[0].reduce[0].stride, stage[0].spatial[0].stride) == ((1, 1), (2, 2))


def test_anchor_sizes_must_fit_the_maps() -> None:
    with pytest.raises(ValueError, match="the one map of c4 features"):
        ModelConfig.model_validate({**PRESETS["maskrcnn_resnet50_fpn"].model_dump(), "features": "c4"})
