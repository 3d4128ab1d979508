"""Mask R-CNN (He et al. 2017), the detector that MaskLake trains and labels with."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from masklake.model.build import build_network
from masklake.model.config import Category, ModelConfig, PredictOptions, TrainedPart
from masklake.model.devices import arithmetic, resolved, sent
from masklake.model.errors import ConfigError
from masklake.model.fields import Precision, Task
from masklake.model.heads.keypoint import keypoint_loss, keypoint_targets
from masklake.model.heads.mask import mask_targets
from masklake.model.identity import model_id
from masklake.model.inference import Settings, detect, propose, resolve, to_instances
from masklake.model.inference_network import DTYPES, fingerprint, for_inference
from masklake.model.instances import Instances, Target
from masklake.model.network import Network
from masklake.model.proposals.rpn import Regions
from masklake.model.rois.targets import Samples, TargetSpec, Truth, sample_regions, truth_on_canvas
from masklake.model.sampling import SampleRule
from masklake.model.transform import Canvas, Size, canvas_size, check_image, filled_up, make_canvas
from masklake.model.wording import agreeing, counted_of

DEFAULT_OPTIONS = PredictOptions()


class MaskRCNN(nn.Module):
    """Detects objects and, if `config` has the branches, segments each with a mask and locates its keypoints.

    `forward` returns the training losses, `predict` the detections; both run the parts in `network`. `set_trained_part` selects
    which of the two stages is trained; both by default.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.network = build_network(config)
        self._target_spec = TargetSpec(
            model=config.preset,
            class_of={category.id: index for index, category in enumerate(config.categories, start=1)},
            masks="mask" in config.tasks,
            keypoints=config.num_keypoints,
            keypoint_offset=config.keypoint_offset,
        )
        iou = config.roi_foreground_iou
        self._sampling = SampleRule(iou, iou, config.roi_samples, config.roi_positive_fraction)
        self._category_ids = np.array([0, *(category.id for category in config.categories)], dtype=np.int64)
        self._has_keypoints = torch.tensor([False, *(bool(category.keypoints) for category in config.categories)])
        self._prepared: dict[Precision, tuple[object, Network]] = {}
        self._trainable = frozenset(name for name, weight in self.network.named_parameters() if weight.requires_grad)
        self._trained: TrainedPart = "joint"
        self._fixed: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.network.keypoint_counts.device

    @property
    def model_id(self) -> str:
        """The preset's name and 12 hex digits over configuration and weights; identifies this model in every row of a table."""
        return model_id(self.config, self.network.state_dict())

    @property
    def categories(self) -> tuple[Category, ...]:
        """Categories by class: class i + 1 is `categories[i]`."""
        return self.config.categories

    @property
    def tasks(self) -> frozenset[Task]:
        """Tasks that the model has branches for."""
        return self.config.tasks

    def batch_key(self, size: Size) -> tuple[int, int]:
        """Returns (H, W) of the canvas for an image of `size`, (height, width) in pixels, at inference."""
        return canvas_size(size, self.config)

    def settings(self, options: PredictOptions) -> dict[str, Any]:
        """Returns every setting that changes what `predict` finds, by name. Raises ConfigError for a task without a branch."""
        return {"precision": resolved(options.precision, self.device), **vars(resolve(options, self.config))}

    def set_trained_part(self, part: TrainedPart, fixed_backbone: bool = False) -> Self:
        """Selects the part that `forward` trains from now on; the weights and statistics of all other parts stay identical, bit
        by bit.

        "joint": both stages, without gradients through the coordinates of proposals (Ren et al. 2015, section 3.2, approximate
        joint training). "rpn": the RPN and its backbone, by the losses of the proposals alone. "detector": the rest, by the
        losses of the second stage, on proposals from the targets or from the unchanged RPN (Mask R-CNN, section 3.1).

        fixed_backbone: no backbone is trained (steps 3 and 4 of the 4-step training). Stages that the configuration freezes
        stay frozen in any case. `model.phases` has the sequences of the paper.
        """
        parts = frozenset(name for name, _ in self.network.named_children())
        first = {"rpn", "rpn_backbone" if self.config.rpn_backbone == "own" else "backbone"}
        second = parts - {"rpn", "rpn_backbone"}
        learning = {"joint": parts, "rpn": first, "detector": second}[part]
        self._trained = part
        self._fixed = parts - (learning - {"backbone", "rpn_backbone"} if fixed_backbone else learning)
        for name, weight in self.network.named_parameters():
            weight.requires_grad_(name in self._trainable and name.partition(".")[0] not in self._fixed)
            weight.grad = None  # a gradient of an earlier phase would still count in the clipped norm
        return self.train(self.training)

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Returns the losses of section 3 (L_cls + L_box + L_mask, and that of section 5 for keypoints) and of the first stage.

        images: uint8 RGB (3, H, W) of any sizes; targets: one per image, in its pixels. Returns scalars by name, those of the
        trained part; their sum is the objective. Raises ConfigError for images and targets that do not fit each other or the
        model.
        """
        if len(images) != len(targets) or not images:
            raise ConfigError(f"training needs at least one image and one target per image: {len(images)} and {len(targets)}")
        network, config = self.network, self.config
        canvas = self._canvas(images, random.choice(config.min_sizes))
        truths = truth_on_canvas(targets, canvas, self._target_spec)

        if self._trained == "rpn":
            maps = network.proposal_maps(canvas.pixels)
            return network.rpn.losses(maps, network.rpn.head(maps), canvas.size, [truth.boxes for truth in truths])
        features = network.backbone(canvas.pixels)
        if self._trained == "detector":
            return self._detector_losses(features, self._fixed_proposals(features, canvas, truths), truths)
        maps = network.proposal_maps(canvas.pixels, features)
        proposed = network.rpn.head(maps)
        proposals = network.rpn.propose(maps, proposed, canvas.size, canvas.sizes)
        losses = network.rpn.losses(maps, proposed, canvas.size, [truth.boxes for truth in truths])
        return losses | self._detector_losses(features, proposals, truths)

    def _fixed_proposals(self, features: Sequence[Tensor], canvas: Canvas, truths: Sequence[Truth]) -> Regions:
        """Returns the proposals for a detector that is trained alone: those in the targets, else those of the unchanged RPN."""
        given = [truth.proposals for truth in truths if truth.proposals is not None]
        if len(given) == len(truths):
            images = torch.arange(len(given)).repeat_interleave(torch.tensor([len(boxes) for boxes in given]))
            return Regions(torch.cat(given), sent(images, canvas.pixels.device))
        if given:
            some = f"{counted_of(len(given), len(truths), 'target')} {agreeing(len(given), 'has', 'have')} proposals"
            raise ConfigError(f"{some}: give them to all of a batch, or to none")
        if self.config.rpn_backbone == "shared" and "backbone" not in self._fixed:
            raise ConfigError(
                "the detector cannot learn alone on proposals of a backbone that learns with it, since the RPN would no longer "
                'fit its maps: give the targets proposals, fix the backbone, or give the RPN its own (rpn_backbone = "own")'
            )
        with torch.no_grad():
            return propose(self.network, canvas, features)

    def _detector_losses(self, features: Sequence[Tensor], proposals: Regions, truths: Sequence[Truth]) -> dict[str, Tensor]:
        """Returns the losses of the second stage on regions sampled from the proposals and the ground truth."""
        network, config = self.network, self.config
        samples = sample_regions(proposals, truths, self._sampling)
        box_input = network.box_input(features, samples.regions)
        logits, deltas = network.box_head(box_input)
        positive = samples.rows(samples.classes > 0)
        losses = network.box_head.losses(logits, deltas, samples.labels, positive, samples.regions.boxes, samples.goals)
        if "mask" in config.tasks:
            # With C4 both heads continue from the fifth stage.
            shared = box_input[samples.rows(samples.outlined)] if config.features == "c4" else None
            losses["mask"] = self._mask_loss(features, shared, samples.chosen(samples.outlined), truths)
        if "keypoint" in config.tasks:
            with_keypoints = samples.chosen(self._has_keypoints[samples.classes])
            losses["keypoint"] = config.keypoint_loss_weight * self._keypoint_loss(features, with_keypoints, truths)
        return losses

    def _mask_loss(
        self, features: Sequence[Tensor], shared: Tensor | None, samples: Samples, truths: Sequence[Truth]
    ) -> Tensor:
        """Returns L_mask over the positive regions whose instance has a mask; targets are sampled in the images' own pixels."""
        head = self.network.mask_head
        regions = self.network.mask_input(features, samples.regions) if shared is None else shared
        targets = [regions.new_zeros(0, head.side, head.side, dtype=torch.float32)]
        for image, truth in enumerate(truths):
            here = samples.images == image
            if truth.masks is not None and len(truth.masks):
                boxes = samples.regions.boxes[samples.rows(here)] * truth.ratio.repeat(2)
                targets.append(mask_targets(truth.masks, boxes, samples.index[here], head.side))
        return head.loss(regions, samples.labels, torch.cat(targets))

    def _keypoint_loss(self, features: Sequence[Tensor], samples: Samples, truths: Sequence[Truth]) -> Tensor:
        """Returns the cross-entropy of the one-hot heat maps over the positive regions whose class has keypoints."""
        logits = self.network.keypoint_head(self.network.keypoint_input(features, samples.regions))
        truth = [
            truth.keypoints[sent(samples.index[samples.images == image], logits.device)]
            for image, truth in enumerate(truths)
            if truth.keypoints is not None
        ]
        return keypoint_loss(logits, *keypoint_targets(torch.cat(truth), samples.regions.boxes, logits.shape[-1]))

    def predict(self, images: Sequence[Tensor], options: PredictOptions = DEFAULT_OPTIONS) -> list[Instances]:
        """Returns the detections of each image, in order.

        images: uint8 RGB (3, H, W) of any sizes, on the host. Images with equal canvases share a batch, up to
        `options.batch_size` (on a CPU they run one by one); no image changes the result of another. Training mode makes no
        difference. Raises ConfigError for other images, or options that this model does not support.
        """
        for image in images:
            check_image(image)
        settings = resolve(options, self.config)
        precision = resolved(options.precision, self.device)
        network, size = self._network_for(precision), self._batch_size(options)
        results: dict[int, Instances] = {}
        with torch.inference_mode(), arithmetic(precision, self.device):
            for indices in self._batches(images, size):
                batch = [images[index] for index in indices]
                results.update(zip(indices, self._predict_batch(network, batch, settings, precision, size), strict=True))
        return [results[index] for index in range(len(images))]

    def propose(self, images: Sequence[Tensor]) -> list[NDArray[np.float32]]:
        """Returns the proposals of each image, as many as in training: float32 (P, 4), xyxy in pixels of the image, best first.

        images: as for `predict`. The result fits `Target.proposals`.
        """
        network = self._network_for("fp32")
        proposals: list[NDArray[np.float32]] = []
        network.rpn.train()  # its mode only determines the number of proposals
        try:
            with torch.inference_mode(), arithmetic("fp32", self.device):
                for image in images:
                    canvas = self._canvas([image], self.config.min_sizes[-1])
                    boxes = propose(network, canvas).boxes * canvas.ratios.flip(1).repeat(1, 2)
                    proposals.append(boxes.cpu().numpy())
        finally:
            network.rpn.eval()
        return proposals

    def _predict_batch(
        self, network: Network, images: Sequence[Tensor], settings: Settings, precision: Precision, places: int
    ) -> list[Instances]:
        """Runs one batch. places: number of images in a full batch.

        A GPU's library chooses its algorithms by the number of images, so fewer images would give other last bits. Blank images
        fill the empty places, up to the point where regions are sampled.
        """
        canvas = self._canvas(images, self.config.min_sizes[-1])
        canvas = replace(canvas, pixels=filled_up(canvas.pixels, places).to(DTYPES[precision]))
        found = detect(network, canvas, self.config, settings)
        originals = [(image.shape[-2], image.shape[-1]) for image in images]
        return to_instances(found, canvas, originals, self._category_ids, self.config, settings.mask_threshold)

    def _canvas(self, images: Sequence[Tensor], min_size: int) -> Canvas:
        for image in images:
            check_image(image)
        return make_canvas(images, self.config, min_size, self.device)

    def _batch_size(self, options: PredictOptions) -> int:
        """Returns the number of images to run together; one on a CPU.

        There, convolutions choose their algorithm by the batch size, so the last bits of a result would depend on the rest of
        its batch. A batch is no faster either (`tiny` at 160 pixels, one core: 36 ms per image alone, 39 ms in batches of 4 or
        8), because the maps of one image already exceed the caches.
        """
        return 1 if self.device.type == "cpu" else options.batch_size

    def _batches(self, images: Sequence[Tensor], batch_size: int) -> Iterator[list[int]]:
        """Yields indices of images with the same canvas size, at most `batch_size` together."""
        by_canvas: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            by_canvas[self.batch_key((image.shape[-2], image.shape[-1]))].append(index)
        for indices in by_canvas.values():
            for start in range(0, len(indices), batch_size):
                yield indices[start : start + batch_size]

    def train(self, mode: bool = True) -> Self:
        """Sets the mode as in torch, but norms of parts that are not trained keep their statistics; drops the network prepared
        for inference.

        The RPN has no norms. Its mode determines its number of proposals, which does not depend on whether it is trained.
        """
        self._prepared.clear()
        super().train(mode)
        for name in self._fixed - {"rpn"}:
            self.network.get_submodule(name).eval()
        return self

    def _network_for(self, precision: Precision) -> Network:
        """Returns the network prepared for inference; it is prepared once, and again when a weight has changed.

        In training mode it is prepared every time: torch's fused optimisers change weights without incrementing a version.
        """
        if self.training:
            return cast(Network, for_inference(self.network, precision))
        state = fingerprint(self.network)
        if precision not in self._prepared or self._prepared[precision][0] != state:
            self._prepared[precision] = (state, cast(Network, for_inference(self.network, precision)))
        return self._prepared[precision][1]
