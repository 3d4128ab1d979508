"""The box branch: classification and box regression of a region (Fast R-CNN; figure 4, right)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from masklake.model.boxes import BoxCoder
from masklake.model.layers import ConvNorm, Norm


class BoxHead(nn.Module):
    """Hidden layers (convolutions, if any, then fully connected ones or the mean), class logits, and a box for each class.

    The two predictors may have a higher precision than the rest, since scores and boxes come directly from them.
    """

    def __init__(
        self,
        channels: int,
        bins: int,
        classes: int,
        convs: Sequence[int],
        hidden: Sequence[int],
        norm: Norm,
        coder: BoxCoder,
        smooth_l1_beta: float,
    ) -> None:
        """channels, bins: of a region; classes: with the background; convs, hidden: widths of the 3x3 convolutions and of the
        fully connected layers behind them; norm: of the convolutions; coder: of the deltas.
        """
        super().__init__()
        self.coder = coder
        self.smooth_l1_beta = smooth_l1_beta
        self.convs = nn.ModuleList(ConvNorm(c_in, c_out, 3, 1, norm) for c_in, c_out in itertools.pairwise((channels, *convs)))
        width = convs[-1] if convs else channels
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise((width * bins**2, *hidden)))
        features = hidden[-1] if hidden else width
        self.cls_score = nn.Linear(features, classes)
        self.bbox_pred = nn.Linear(features, classes * 4)

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
        """Layers that inference keeps in float32 at any precision."""
        return self.cls_score, self.bbox_pred

    def losses(
        self, logits: Tensor, deltas: Tensor, labels: Tensor, positive: Tensor, boxes: Tensor, goals: Tensor
    ) -> dict[str, Tensor]:
        """Returns cross-entropy over the classes and smooth L1 over the positives' own class (section 3: L_cls + L_box).

        logits (R, classes); deltas (R, classes, 4); labels int64 (R,), 0 for background; positive: int64, rows of the others;
        boxes float32 (R, 4), the regions; goals float32 (R, 4), their ground truth, ignored for background.
        """
        targets = self.coder.encode(goals[positive], boxes[positive])
        moves = deltas[positive, labels[positive]].float()
        box_loss = functional.smooth_l1_loss(moves, targets, beta=self.smooth_l1_beta, reduction="sum")
        count = max(len(labels), 1)
        return {
            "classifier": functional.cross_entropy(logits.float(), labels, reduction="sum") / count,
            "box": box_loss / count,
        }
