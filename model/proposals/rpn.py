"""Region proposal network: the first stage (Ren et al. 2015; section 3 "Faster R-CNN", section 3.1).

A shared head scores every anchor of every pyramid level as object or background and refines it. The best ones after suppression
are the proposals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from masklake.model.boxes import BoxCoder, clip_boxes, has_area, suppress, wide_enough
from masklake.model.layers import init_bias
from masklake.model.proposals.anchors import Anchors, anchors_at
from masklake.model.sampling import SampleRule


@dataclass(frozen=True)
class Regions:
    """Boxes of a batch in one table: boxes float32 (R, 4), xyxy canvas pixels; images int64 (R,), sorted ascending."""

    boxes: Tensor
    images: Tensor


class ProposalCounts(NamedTuple):
    """Numbers of proposals. per_level: best boxes of each level before suppression; in_all: boxes of an image after it."""

    per_level: int
    in_all: int


class RPNHead(nn.Module):
    """3x3 convolutions, then objectness and box deltas for each anchor of a cell, shared by all levels."""

    def __init__(self, channels: int, anchors: int, convs: int) -> None:
        """channels: of the maps; anchors: number per cell; convs: number of 3x3 convolutions."""
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(convs))
        self.objectness = nn.Conv2d(channels, anchors, 1)
        self.deltas = nn.Conv2d(channels, 4 * anchors, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                init_bias(layer)

    def forward(self, features: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Maps (B, C, H, W) -> for each level objectness (B, H*W*A) and deltas (B, H*W*A, 4)."""
        outputs = []
        for level in features:
            hidden = level
            for conv in self.convs:
                hidden = functional.relu(conv(hidden), inplace=True)
            objectness = self.objectness(hidden).permute(0, 2, 3, 1).flatten(1)
            deltas = self.deltas(hidden).permute(0, 2, 3, 1).reshape(len(level), -1, 4)
            outputs.append((objectness, deltas))
        return outputs


class RegionProposalNetwork(nn.Module):
    """Computes proposals from the pyramid, and the losses of the first stage."""

    def __init__(
        self,
        head: RPNHead,
        anchors: Anchors,
        coder: BoxCoder,
        in_training: ProposalCounts,
        at_inference: ProposalCounts,
        nms_iou: float,
        min_side: float,
        rank: Literal["probability", "logit"],
        score_threshold: float,
        sampling: SampleRule,
        smooth_l1_beta: float,
    ) -> None:
        """nms_iou: of suppression within a level; min_side: minimum side of a proposal, in canvas pixels; rank: the value by
        which proposals are ranked; score_threshold: minimum objectness (a probability) at inference; sampling: of anchors for
        the losses.
        """
        super().__init__()
        self.head = head
        self.anchors = anchors
        self.coder = coder
        self.in_training, self.at_inference = in_training, at_inference
        self.nms_iou = nms_iou
        self.min_side = min_side
        self.rank = rank
        self.score_threshold = score_threshold
        self.sampling = sampling
        self.smooth_l1_beta = smooth_l1_beta

    def propose(
        self, features: Sequence[Tensor], outputs: Sequence[tuple[Tensor, Tensor]], canvas: tuple[int, int], sizes: Tensor
    ) -> Regions:
        """Returns the best boxes of each image.

        outputs: of the head; canvas: (H, W) pixels; sizes: float32 (B, 2), each image's height and width on the canvas.
        """
        counts = self.in_training if self.training else self.at_inference
        boxes, logits, levels = self._best_of_levels(features, outputs, canvas, counts.per_level)
        boxes, chances = clip_boxes(boxes, sizes[:, None]), logits.sigmoid()
        scores = chances if self.rank == "probability" else logits
        least = 0.0 if self.training else self.score_threshold
        real = wide_enough(boxes, self.min_side) & has_area(boxes) & scores.isfinite()
        images = torch.arange(len(boxes), device=boxes.device).repeat_interleave(len(levels))
        levels, boxes, real = levels.repeat(len(boxes)), boxes.flatten(0, 1), (real & (chances >= least)).flatten()
        keep = suppress(boxes, scores.flatten(), levels, images, self.nms_iou, real, counts.in_all)
        return Regions(boxes[keep], images[keep])

    def _best_of_levels(
        self, features: Sequence[Tensor], outputs: Sequence[tuple[Tensor, Tensor]], canvas: tuple[int, int], count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the `count` most likely anchors of each level, shifted by their deltas.

        boxes float32 (B, P, 4), objectness logits float32 (B, P), level int64 (P,).
        """
        moves, anchors, logits, levels = [], [], [], []
        for index, (level, (objectness, deltas)) in enumerate(zip(self.anchors.levels(features, canvas), outputs, strict=True)):
            cells, width, stride = level
            top, where = objectness.detach().float().topk(min(count, objectness.shape[1]), dim=1)
            moves.append(deltas.detach().gather(1, where[..., None].expand(-1, -1, 4)))
            anchors.append(anchors_at(where, cells, width, stride))
            logits.append(top)
            levels.append(torch.full((top.shape[1],), index, device=top.device))
        boxes = self.coder.decode(torch.cat(moves, dim=1), torch.cat(anchors, dim=1))
        return boxes, torch.cat(logits, dim=1), torch.cat(levels)

    def losses(
        self,
        features: Sequence[Tensor],
        outputs: Sequence[tuple[Tensor, Tensor]],
        canvas: tuple[int, int],
        truth: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Returns binary cross-entropy and smooth L1 on sampled anchors. truth: float32 (G, 4) in canvas pixels for each image;
        other arguments as in `propose`.
        """
        anchors = torch.cat(
            [
                anchors_at(torch.arange(objectness.shape[1], device=objectness.device), *level)
                for level, (objectness, _) in zip(self.anchors.levels(features, canvas), outputs, strict=True)
            ]
        )
        objectness = torch.cat([o for o, _ in outputs], dim=1).float()
        deltas = torch.cat([d for _, d in outputs], dim=1).float()
        logits, labels, moves, goals = [], [], [], []
        matches = [self.sampling.match(boxes, anchors, keep_best=True) for boxes in truth]
        samples = self.sampling.sample(matches)
        for image, (boxes, matched, (positive, negative)) in enumerate(zip(truth, matches, samples, strict=True)):
            drawn = torch.cat([positive, negative])
            logits.append(objectness[image, drawn])
            labels.append((matched[drawn] >= 0).float())
            moves.append(deltas[image, positive])
            goals.append(self.coder.encode(boxes[matched[positive]], anchors[positive]))
        drawn_logits = torch.cat(logits)
        box_loss = functional.smooth_l1_loss(torch.cat(moves), torch.cat(goals), beta=self.smooth_l1_beta, reduction="sum")
        return {
            "rpn_objectness": functional.binary_cross_entropy_with_logits(drawn_logits, torch.cat(labels)),
            "rpn_box": box_loss / max(len(drawn_logits), 1),
        }
