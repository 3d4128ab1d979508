"""torchvision models with seeded weights that behave like trained ones: a chosen number of detections an image.

Pretrained weights cannot be downloaded everywhere, and the cost of labelling depends on how much is found. So the weights are
drawn from a seed, the batch norms take their statistics from real images, the class logits are spread out, and the
background's bias is tuned until an image yields the asked number of detections. The architecture, and with it the
arithmetic, is that of the pretrained model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torchvision
from torch import Tensor, nn

RESIDUAL_SCALE = 0.2
"""Weight of the last norm of a residual block: in trained ResNets it is well below the drawn network's 1."""

LOGIT_SPREAD = 2.0
"""Standard deviation of the class logits over proposals: what a trained predictor shows on COCO, to the order of magnitude."""


@torch.no_grad()
def seeded_state_dict(
    build: Callable[..., nn.Module], images: Sequence[Tensor], detections: float, seed: int = 0
) -> dict[str, Tensor]:
    """The state dict of `build` (a torchvision detection builder), tuned on `images` (float RGB (3, H, W) in 0..1).

    `detections` is the wanted mean number of detections an image, at most the model's cap of 100.
    """
    torch.manual_seed(seed)
    model = build(weights=None, weights_backbone=None).eval()
    batches = [model.transform([image])[0] for image in images]
    calm_residuals(model)
    settle_batch_norms(model, [batch.tensors for batch in batches])
    spread_objectness(model, batches)
    tune_background(model, batches, detections)
    state = model.state_dict()
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def calm_residuals(model: nn.Module) -> None:
    """Makes each block a small change to its input.

    Fifty drawn layers enlarge float32's rounding a hundredfold, torchvision's own as much as ours: no two implementations,
    and no two machines, agree on such a network.
    """
    for name, module in model.backbone.named_modules():
        if name.endswith("bn3"):
            nn.init.constant_(module.weight, RESIDUAL_SCALE)


def settle_batch_norms(model: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Sets the running statistics of the backbone's batch norms to those of `tensors`: activations keep a sane scale."""
    norms = [module for module in model.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    for tensor in tensors:
        model.backbone(tensor)
    for norm in norms:
        norm.eval()


def spread_objectness(model: nn.Module, batches: Sequence[torchvision.models.detection.image_list.ImageList]) -> None:
    """Scales the RPN's class logits to a standard deviation of 1: a drawn predictor ranks by noise otherwise."""
    features = list(model.backbone(batches[0].tensors).values())
    logits = torch.cat([level.flatten() for level in model.rpn.head(features)[0]])
    model.rpn.head.cls_logits.weight.mul_(1.0 / logits.std())


def tune_background(model: nn.Module, batches: Sequence, detections: float) -> None:
    """Spreads the class logits, then bisects the background's bias until the mean count is `detections`."""
    predictor = model.roi_heads.box_predictor
    heads = [box_features(model, batch) for batch in batches]
    spread = torch.cat([predictor.cls_score(features) for features, _, _ in heads]).std(dim=0).mean()
    predictor.cls_score.weight.mul_(LOGIT_SPREAD / spread)
    low, high = -20.0, 40.0
    for _ in range(20):
        middle = (low + high) / 2
        predictor.cls_score.bias[0] = middle
        counts = [count_detections(model, *head) for head in heads]
        low, high = (middle, high) if sum(counts) / len(counts) >= detections else (low, middle)


def box_features(model: nn.Module, batch) -> tuple[Tensor, list[Tensor], list[tuple[int, int]]]:
    """The box head's features, the proposals and the sizes of one image, as torchvision computes them."""
    features = model.backbone(batch.tensors)
    proposals, _ = model.rpn(batch, features)
    pooled = model.roi_heads.box_roi_pool(features, proposals, batch.image_sizes)
    return model.roi_heads.box_head(pooled), proposals, batch.image_sizes


def count_detections(model: nn.Module, features: Tensor, proposals: list[Tensor], sizes: list[tuple[int, int]]) -> int:
    """How many detections survive the score threshold, NMS and the cap."""
    logits, deltas = model.roi_heads.box_predictor(features)
    boxes, _, _ = model.roi_heads.postprocess_detections(logits, deltas, proposals, sizes)
    return len(boxes[0])
