"""The box branch: what a region is, and where exactly (Fast R-CNN; figure 4, right)."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional

from masklake.model.backbones.backbone import region_channels
from masklake.model.boxes import encode_boxes
from masklake.model.config import ModelConfig
from masklake.model.layers import ConvNorm, head_norm


class BoxHead(nn.Module):
    """Hidden layers (convolutions, if any, then fully connected ones or the mean), class logits, a box for each class.

    The two predictors may be of a higher precision than the rest: scores and boxes come straight from them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = (region_channels(config), *config.box_channels)
        self.convs = nn.ModuleList(
            ConvNorm(c_in, c_out, 3, 1, head_norm(config)) for c_in, c_out in itertools.pairwise(channels)
        )
        widths = (channels[-1] * config.box_bins**2, *[config.box_hidden] * config.box_layers)
        self.hidden = nn.ModuleList(nn.Linear(c_in, c_out) for c_in, c_out in itertools.pairwise(widths))
        features = config.box_hidden if config.box_layers else channels[-1]
        self.cls_score = nn.Linear(features, config.num_classes)
        self.bbox_pred = nn.Linear(features, config.num_classes * 4)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, 7, 7) -> class logits (R, classes) and deltas (R, classes, 4)."""
        for conv in self.convs:
            regions = functional.relu(conv(regions), inplace=True)
        hidden = regions.flatten(1) if len(self.hidden) else regions.mean(dim=(2, 3))
        for layer in self.hidden:
            hidden = functional.relu(layer(hidden), inplace=True)
        hidden = hidden.to(self.cls_score.weight.dtype)
        return self.cls_score(hidden), self.bbox_pred(hidden).unflatten(1, (-1, 4))

    @property
    def predictors(self) -> tuple[nn.Linear, nn.Linear]:
        """The layers that inference keeps in float32 at any precision."""
        return self.cls_score, self.bbox_pred


def box_losses(
    logits: Tensor, deltas: Tensor, labels: Tensor, positive: Tensor, boxes: Tensor, goals: Tensor, config: ModelConfig
) -> dict[str, Tensor]:
    """Cross-entropy over the classes, smooth L1 over the positives' own class (section 3: L_cls + L_box).

    logits (R, classes), deltas (R, classes, 4); labels int64 (R,), 0 for background; positive: rows of the
    others, int64; boxes float32 (R, 4) the regions; goals float32 (R, 4) their ground truth, ignored for background.
    """
    targets = encode_boxes(goals[positive], boxes[positive], config.box_delta_weights)
    moves = deltas[positive, labels[positive]].float()
    box_loss = functional.smooth_l1_loss(moves, targets, beta=config.smooth_l1_beta, reduction="sum")
    count = max(len(labels), 1)
    return {
        "classifier": functional.cross_entropy(logits.float(), labels, reduction="sum") / count,
        "box": box_loss / count,
    }
