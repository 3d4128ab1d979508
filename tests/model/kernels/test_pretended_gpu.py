"""A model on the pretended GPU with the project's own kernels, in Triton's interpreter: what only CUDA tensors choose."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from masklake.model.config import Category, ModelConfig, PredictOptions
from masklake.model.instances import Instances, Target
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.presets import PRESETS
from tests.pretend_cuda import pretend_cuda

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")

NARROW = {
    "categories": (Category(id=1, name="disk"),),
    "keypoint": False,
    "fpn_channels": 16,
    "box_hidden": 16,
    "mask_channels": (8,),
    "mask_deconv_channels": 8,
    "rpn_post_nms_train": 8,
    "rpn_post_nms_test": 8,
    "roi_samples": 8,
}


def small_model() -> MaskRCNN:
    torch.manual_seed(0)
    return MaskRCNN(ModelConfig.model_validate(PRESETS["tiny"].model_copy(update=NARROW).model_dump()))


def found_on(device: str, image: Tensor) -> Instances:
    options = PredictOptions(score_threshold=0.0, max_detections=3, batch_size=1)
    return small_model().to(device).eval().predict([image], options)[0]


def gradients_on(device: str, image: Tensor) -> tuple[dict[str, float], list[Tensor]]:
    masks = torch.zeros(1, 48, 48, dtype=torch.uint8)
    masks[0, 8:40, 8:40] = 1
    model = small_model().to(device).train()
    losses = model([image], [Target(torch.tensor([[8.0, 8, 40, 40]]), torch.tensor([1]), masks)])
    torch.stack(list(losses.values())).sum().backward()
    return {name: float(loss.detach()) for name, loss in losses.items()}, [
        weight.grad.cpu() for weight in model.parameters() if weight.grad is not None
    ]


def test_labels_and_gradients_of_the_kernels_are_the_cpus(picture: Callable[..., Tensor]) -> None:
    image = picture(48, 48, 1)
    expected, (losses, gradients) = found_on("cpu", image), gradients_on("cpu", image)
    with pretend_cuda(kernels=True) as log:
        found = found_on("cuda", image)
        predicting = dict(log.kernels)
        log.clear()
        losses_there, gradients_there = gradients_on("cuda", image)
        training = dict(log.kernels)
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3, atol=1e-4)
    assert found.rles == expected.rles
    assert losses_there == pytest.approx(losses, rel=1e-3)
    for one, other in zip(gradients_there, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)
    # Boxes and masks; counting the edges of masks, then writing them; proposals and detections. In training also the masks'
    # targets, and no detections.
    assert predicting == {"_forward_kernel": 2, "_walk_kernel": 2, "_survivors_kernel": 2}
    assert training == {"_forward_kernel": 3, "_backward_kernel": 2, "_survivors_kernel": 1}
