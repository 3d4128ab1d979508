"""Region proposal network: the first stage (Ren et al. 2015; section 3 "Faster R-CNN", section 3.1).

A shared head scores every anchor of every pyramid level as object or background and refines it. The best ones after suppression
are the proposals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from masklake.model.backbones.backbone import map_channels
from masklake.model.boxes import clip_boxes, decode_boxes, encode_boxes, has_area, suppress, wide_enough
from masklake.model.config import ModelConfig
from masklake.model.layers import init_bias
from masklake.model.proposals.anchors import anchors_at, cell_anchors, level_strides
from masklake.model.sampling import match, sample


@dataclass(frozen=True)
class Regions:
    """Boxes of a batch in one table: boxes float32 (R, 4), xyxy canvas pixels; images int64 (R,), sorted ascending."""

    boxes: Tensor
    images: Tensor


class RPNHead(nn.Module):
    """3x3 convolutions, then objectness and box deltas for each anchor of a cell, shared by all levels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels, anchors = map_channels(config), len(config.anchor_sizes[0]) * len(config.anchor_ratios)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(config.rpn_convs))
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

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.head = RPNHead(config)
        for level, sizes in enumerate(config.anchor_sizes):
            cells = cell_anchors(sizes, config.anchor_ratios, config.anchor_rounding, config.anchor_order)
            self.register_buffer(f"cells{level}", cells, persistent=False)

    def _levels(self, features: Sequence[Tensor], canvas: tuple[int, int]) -> list[tuple[Tensor, int, tuple[int, int]]]:
        """Returns for each level the arguments of `anchors_at`: cell anchors, the map's width, the stride."""
        shapes = [(level.shape[-2], level.shape[-1]) for level in features]
        strides = level_strides(self.config, canvas, shapes)
        return [
            (self.get_buffer(f"cells{index}"), width, stride)
            for index, ((_, width), stride) in enumerate(zip(shapes, strides, strict=True))
        ]

    def propose(
        self, features: Sequence[Tensor], outputs: Sequence[tuple[Tensor, Tensor]], canvas: tuple[int, int], sizes: Tensor
    ) -> Regions:
        """Returns the best boxes of each image.

        outputs: of the head; canvas: (H, W) pixels; sizes: float32 (B, 2), each image's height and width on the canvas.
        """
        config = self.config
        before, after = (
            (config.rpn_pre_nms_train, config.rpn_post_nms_train)
            if self.training
            else (config.rpn_pre_nms_test, config.rpn_post_nms_test)
        )
        boxes, logits, levels = self._best_of_levels(features, outputs, canvas, before)
        boxes, chances = clip_boxes(boxes, sizes[:, None]), logits.sigmoid()
        scores = chances if config.rpn_rank == "probability" else logits
        least = 0.0 if self.training else config.rpn_score_threshold
        real = wide_enough(boxes, config.rpn_min_side) & has_area(boxes) & scores.isfinite()
        images = torch.arange(len(boxes), device=boxes.device).repeat_interleave(len(levels))
        levels, boxes, real = levels.repeat(len(boxes)), boxes.flatten(0, 1), (real & (chances >= least)).flatten()
        keep = suppress(boxes, scores.flatten(), levels, images, config.rpn_nms_iou, real, after)
        return Regions(boxes[keep], images[keep])

    def _best_of_levels(
        self, features: Sequence[Tensor], outputs: Sequence[tuple[Tensor, Tensor]], canvas: tuple[int, int], count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the `count` most likely anchors of each level, shifted by their deltas.

        boxes float32 (B, P, 4), objectness logits float32 (B, P), level int64 (P,).
        """
        moves, anchors, logits, levels = [], [], [], []
        for index, (level, (objectness, deltas)) in enumerate(zip(self._levels(features, canvas), outputs, strict=True)):
            cells, width, stride = level
            top, where = objectness.detach().float().topk(min(count, objectness.shape[1]), dim=1)
            moves.append(deltas.detach().gather(1, where[..., None].expand(-1, -1, 4)))
            anchors.append(anchors_at(where, cells, width, stride))
            logits.append(top)
            levels.append(torch.full((top.shape[1],), index, device=top.device))
        together, config = torch.cat(anchors, dim=1), self.config
        boxes = decode_boxes(torch.cat(moves, dim=1), together, config.rpn_delta_weights, config.delta_clamp)
        return boxes, torch.cat(logits, dim=1), torch.cat(levels)

    def losses(
        self,
        features: Sequence[Tensor],
        outputs: Sequence[tuple[Tensor, Tensor]],
        canvas: tuple[int, int],
        truth: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Returns binary cross-entropy and smooth L1 on sampled anchors. truth: for each image float32 (G, 4), canvas
        pixels.
        """
        config = self.config
        anchors = torch.cat(
            [
                anchors_at(torch.arange(objectness.shape[1], device=objectness.device), *level)
                for level, (objectness, _) in zip(self._levels(features, canvas), outputs, strict=True)
            ]
        )
        objectness = torch.cat([o for o, _ in outputs], dim=1).float()
        deltas = torch.cat([d for _, d in outputs], dim=1).float()
        logits, labels, moves, goals = [], [], [], []
        matches = [
            match(boxes, anchors, config.rpn_foreground_iou, config.rpn_background_iou, keep_best=True) for boxes in truth
        ]
        samples = sample(matches, config.rpn_samples, config.rpn_positive_fraction)
        for image, (boxes, matched, (positive, negative)) in enumerate(zip(truth, matches, samples, strict=True)):
            drawn = torch.cat([positive, negative])
            logits.append(objectness[image, drawn])
            labels.append((matched[drawn] >= 0).float())
            moves.append(deltas[image, positive])
            goals.append(encode_boxes(boxes[matched[positive]], anchors[positive], config.rpn_delta_weights))
        drawn_logits = torch.cat(logits)
        box_loss = functional.smooth_l1_loss(torch.cat(moves), torch.cat(goals), beta=config.smooth_l1_beta, reduction="sum")
        return {
            "rpn_objectness": functional.binary_cross_entropy_with_logits(drawn_logits, torch.cat(labels)),
            "rpn_box": box_loss / max(len(drawn_logits), 1),
        }
