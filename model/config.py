"""What a model is, as one frozen value: categories, layers, and every numerical convention, each with its unit and source.

A checkpoint carries its `ModelConfig`, so the numbers come out as in the system that the weights come from. The defaults
are torchvision's conventions and the paper's sizes (He et al., Mask R-CNN, 2017; section numbers refer to it). "Canvas" is
the resized image, padded at its right and bottom: the pixels that the network sees.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from masklake.model.fields import PredictFields, Task

NormKind = Literal["frozen", "batch", "group", "none"]
FeatureKind = Literal["fpn", "c4", "c5", "dc5"]
PoolKind = Literal["align", "pool", "warp"]
MaskOutput = Literal["sigmoid", "softmax", "agnostic"]
RpnBackbone = Literal["shared", "own"]
TrainedPart = Literal["joint", "rpn", "detector"]
PasteKind = Literal["torchvision", "detectron2"]

Positive = Annotated[int, Field(gt=0)]
Channels = Annotated[int, Field(gt=0, le=8192)]
"""Of a layer. A checkpoint says its own sizes: one that is not from us must not make the reader ask for all memory."""
Side = Annotated[int, Field(gt=0, le=65_535)]
"""Pixels of a canvas."""
Factor = Annotated[float, Field(gt=0)]
INT32 = (-(2**31), 2**31 - 1)
"""Range of a category's id: the table stores it in 32 bits."""


class _Frozen(BaseModel):
    """A value: hashable, compared by content, refuses unknown fields (a misspelt option must not be ignored) and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Category(_Frozen):
    """One kind of object of a data set.

    id: the data set's own; it may be 0 or negative, and must fit 32 bits.
    keypoints: names, in the order of the annotations; empty for categories that have none.
    flip_pairs: keypoint indices that change places when the image is mirrored (left and right eye).
    skeleton: keypoint indices, from 0, joined by a line when drawn.
    """

    id: int = Field(ge=INT32[0], le=INT32[1])
    name: str
    keypoints: tuple[str, ...] = ()
    flip_pairs: tuple[tuple[int, int], ...] = ()
    skeleton: tuple[tuple[int, int], ...] = ()


class BackboneConfig(_Frozen):
    """A residual network (ResNet: He et al. 2016; ResNeXt: Xie et al. 2017) of four stages, strides 4, 8, 16 and 32."""

    block: Literal["bottleneck", "basic"] = "bottleneck"
    depths: tuple[Positive, Positive, Positive, Positive] = (3, 4, 6, 3)
    widths: tuple[Channels, Channels, Channels, Channels] = (64, 128, 256, 512)
    """Channels of a stage's 3x3 convolutions in a plain ResNet; a bottleneck puts out four times as many."""
    groups: int = Field(default=1, gt=0, le=128)
    """Cardinality of the 3x3 convolutions: 32 or 64 in a ResNeXt."""
    group_width: int = Field(default=64, gt=0, le=128)
    """Channels of a group in the first stage (4 in "32x4d"); 64 with one group is the plain ResNet."""
    stride_in: Literal["1x1", "3x3"] = "3x3"
    """The convolution of a bottleneck that has the stride: the first in the original ResNet and Detectron2's R50 and R101."""
    stem_channels: Channels = 64
    stem_kernel: int = Field(default=7, gt=0, le=31)
    """Pixels; the stem has stride 2 and a stride 2 max pool behind it."""
    norm: NormKind = "frozen"
    """`frozen`: batch statistics of the pre-training, as the paper uses; `group`: trains from scratch at any batch size."""
    norm_eps: float = Field(default=1e-5, ge=0)
    """Added to the variance. 0.0 for torchvision's COCO_V1 weights (mask, keypoint and box), 1e-5 otherwise."""
    norm_groups: int = Field(default=8, gt=0)
    """Groups of a `group` norm."""
    frozen_stages: int = Field(default=2, ge=0, le=5)
    """How many of stem, stage 1..4 are not trained (torchvision: `trainable_backbone_layers=3`)."""


class ModelConfig(_Frozen):
    """One instantiation of Mask R-CNN. A new field's default also goes into `model.identity.FIRST_DEFAULTS`."""

    preset: str
    categories: tuple[Category, ...] = Field(min_length=1)
    """Class i + 1 of the classifier is `categories[i]`; class 0 is the background."""
    mask: bool = True
    """Has a mask branch (section 3)."""
    keypoint: bool = False
    """Has a keypoint branch (section 5), provided that some category has keypoints."""
    backbone: BackboneConfig = BackboneConfig()
    features: FeatureKind = "fpn"
    """Where regions and proposals come from (section 3 "Network Architecture", section 4.1, table 2): the pyramid P2..P6; C4,
    with the fifth stage run on each region (figure 4, left); C5 of stride 32; or dilated C5 of stride 16 (DC5)."""
    fpn_channels: Channels = 256
    head_norm: NormKind = "none"
    """Behind the convolutions of the pyramid and of the branches; `group` helps training from scratch (He et al. 2019)."""

    # The canvas (section 3.1).
    image_channels: Literal["rgb", "bgr"] = "rgb"
    """The order in which the network takes them; images come as RGB all the same."""
    image_divisor: float = Field(default=255.0, gt=0)
    """What bytes are divided by first: 255 for values of 0..1, 1 for values of 0..255."""
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Of the divided values, in the order of `image_channels`."""
    image_std: tuple[Factor, Factor, Factor] = (0.229, 0.224, 0.225)
    resize: Literal["bilinear_floor", "pil"] = "bilinear_floor"
    """`bilinear_floor`: float bilinear without antialiasing, after normalising; sizes are rounded down. `pil`: of bytes, as
    Pillow does it: antialiased when shrinking; sizes are rounded to the nearest."""
    min_sizes: tuple[Side, ...] = Field(default=(800,), min_length=1)
    """Pixels of the canvas' shorter side: inference takes the last, training any."""
    max_size: Side = 1333
    """Pixels that the longer side may not exceed."""
    upscale: bool = True
    """False: images smaller than `min_sizes` keep their size."""
    canvas_divisor: int = Field(default=32, gt=0)
    """Pixels: the canvas is padded with zeros to a multiple of it."""

    # Anchors and proposals (section 3.1; Ren et al. 2015; Lin et al. 2017, FPN).
    anchor_sizes: tuple[Annotated[tuple[Positive, ...], Field(min_length=1)], ...] = ((32,), (64,), (128,), (256,), (512,))
    """Canvas pixels, for each of P2..P6, or for the one map of the other features: 5 scales (section 3.1; FPN, section 4.1)."""
    anchor_ratios: tuple[Factor, ...] = Field(default=(0.5, 1.0, 2.0), min_length=1)
    """Height over width: 3 ratios (section 3.1)."""
    anchor_rounding: bool = True
    """Corners of the cell anchors are rounded to whole pixels."""
    anchor_order: Literal["ratio", "size"] = "ratio"
    """What the anchors of a cell are sorted by first."""
    anchor_stride: Literal["canvas_over_map", "fixed"] = "canvas_over_map"
    """`canvas_over_map`: canvas height // map height (P6 at 800 pixels: 61); `fixed`: 4, 8, 16, 32, 64."""
    rpn_convs: int = Field(default=1, gt=0, le=100)
    """3x3 convolutions of the proposal head (two in torchvision's V2)."""
    rpn_backbone: RpnBackbone = "shared"
    """Where the proposals' maps come from: the detector's backbone (Ren et al. 2015, section 3.2), or one of the proposal
    network's own, of the same kind: section 3.1's RPN that "does not share features with Mask R-CNN"."""
    rpn_pre_nms_train: int = Field(default=2000, gt=0)
    """Best anchors of each level, before suppression."""
    rpn_pre_nms_test: int = Field(default=1000, gt=0)
    """As before, at inference."""
    rpn_post_nms_train: int = Field(default=2000, gt=0)
    """Proposals of an image, after suppression (Ren et al. 2015, section 3.3)."""
    rpn_post_nms_test: int = Field(default=1000, gt=0)
    """As before, at inference: 1000 with FPN, 300 with C4 (section 3.1). Suppression, within a level, is by `rpn_nms_iou`: 0.7
    (Ren et al. 2015, section 3.3)."""
    rpn_nms_iou: float = Field(default=0.7, ge=0, le=1)
    rpn_rank: Literal["probability", "logit"] = "probability"
    """What proposals are ranked by: close to 1, probabilities of different logits are equal."""
    rpn_score_threshold: float = Field(default=0.0, ge=0, lt=1)
    """Least objectness (a probability) of a proposal at inference."""
    rpn_min_side: float = Field(default=1e-3, ge=0)
    """Canvas pixels; proposals with a shorter side are dropped, and those without an area."""
    rpn_foreground_iou: float = Field(default=0.7, ge=0, le=1)
    rpn_background_iou: float = Field(default=0.3, ge=0, le=1)
    """An anchor is an object from IoU `rpn_foreground_iou` with one on, or where none overlaps that object more; background
    below this; no sample between (Ren et al. 2015, section 3.1.2)."""
    rpn_samples: int = Field(default=256, gt=0)
    """Anchors of an image in the loss, at most `rpn_positive_fraction` of them positive (Ren et al. 2015, section 3.1.3)."""
    rpn_positive_fraction: float = Field(default=0.5, gt=0, le=1)
    rpn_delta_weights: tuple[Factor, Factor, Factor, Factor] = (1.0, 1.0, 1.0, 1.0)
    """Factors of dx, dy, dw, dh in the box parametrisation."""
    delta_clamp: float = Field(default=4.135166556742356, gt=0)
    """Greatest dw, dh before exp: log(1000 / 16)."""

    # Regions of interest (section 3 "RoIAlign", 3.1; FPN equation 1).
    roi_canonical_size: float = Field(default=224.0, gt=0)
    """Canvas pixels of the square that belongs to `roi_canonical_level`."""
    roi_canonical_level: int = 4
    roi_level_rule: Literal["torchvision", "detectron2"] = "torchvision"
    """floor(4 + log2(sqrt(area) / 224) + 1e-6), or floor(4 + log2(sqrt(area) / 224 + 1e-8)): exact powers of two differ."""
    roi_pool: PoolKind = "align"
    """RoIAlign; RoIPool, which rounds regions and bins to feature pixels; RoIWarp, which rounds regions alone (table 2c)."""
    roi_pool_mode: Literal["avg", "max"] = "avg"
    """What a bin keeps of its samples (RoIWarp, RoIAlign) or pixels (RoIPool, by origin "max")."""
    roi_aligned: bool = False
    """RoIAlign's half-pixel shift."""
    roi_sampling_ratio: int = Field(default=2, ge=0)
    """Sampling points of an output bin along each side; 0: as many as the bin has pixels."""
    roi_samples: int = Field(default=512, gt=0)
    """Training RoIs of an image, N: 512 with FPN, 64 with C4 (section 3.1)."""
    roi_positive_fraction: float = Field(default=0.25, gt=0, le=1)
    """Of them at most: positive to negative 1:3 (section 3.1)."""
    roi_foreground_iou: float = Field(default=0.5, ge=0, le=1)
    """An RoI is positive from this IoU with an object on, else negative (section 3.1)."""

    # Heads (figure 4, right; section 5).
    box_pool: int = Field(default=7, gt=0, le=64)
    """Bins. With C4 features the fifth stage runs on them, and the masks come from its output too."""
    roi_stage_stride: Literal[1, 2] = 1
    """Of the fifth stage on a region: 1 on 7 x 7 bins in the paper's figure 4, 2 on 14 x 14 bins in Detectron2."""
    box_channels: tuple[Channels, ...] = ()
    """Of the 3x3 convolutions before the fully connected layers (none in the paper; four of 256 in torchvision's V2)."""
    box_layers: int = Field(default=2, ge=0, le=100)
    """Fully connected layers before the predictors; none: they read the mean over the bins, as in a ResNet (C4)."""
    box_hidden: Channels = 1024
    """Their width."""
    box_delta_weights: tuple[Factor, Factor, Factor, Factor] = (10.0, 10.0, 5.0, 5.0)
    smooth_l1_beta: float = Field(default=1 / 9, gt=0)
    """Where the box losses turn from quadratic to linear."""
    mask_pool: int = Field(default=14, gt=0, le=64)
    """Bins that the mask branch gets of a region."""
    mask_head: Literal["fcn", "mlp"] = "fcn"
    """Convolutions, or fully connected layers that predict all m x m pixels at once (table 2e)."""
    mask_output: MaskOutput = "sigmoid"
    """One mask a class without competition; a softmax over the classes at each pixel (table 2b); or one for all classes."""
    mask_channels: tuple[Channels, ...] = (256, 256, 256, 256)
    """Of the 3x3 convolutions (`fcn`)."""
    mask_deconv_channels: Channels = 256
    """Of the deconvolution behind them (`fcn`)."""
    mask_hidden: tuple[Channels, ...] = (1024, 1024)
    """Widths of the fully connected layers before the last one (`mlp`)."""
    mask_side: int = Field(default=28, gt=0, le=512)
    """m, pixels of the mask's side (`mlp`)."""
    mask_resize: int | None = Field(default=None, gt=0, le=512)
    """m, to which a convolutional head's logits are resized. None is what its deconvolution makes, twice the bins: 28, or 14
    with C4 features."""
    keypoint_pool: int = Field(default=14, gt=0, le=64)
    """Bins; the heat maps are four times as wide (56)."""
    keypoint_channels: tuple[Channels, ...] = Field(default=(512,) * 8, min_length=1)

    keypoint_loss_weight: float = Field(default=1.0, ge=0)
    """Factor of the keypoint loss in the objective: it starts at log(56 * 56) = 8, ten times the others."""
    keypoint_score: Literal["logit", "probability"] = "logit"
    """Of the best pixel of the resized heat map; its probability is normalised over the pixels of the map before resizing."""
    keypoint_offset: float = 0.0
    """Pixels from a data set's keypoints to the model's: added to what it learns from, taken off what it finds. 0.5 where a
    keypoint at pixel 3 means the middle of that pixel."""

    # What is reported (section 3.1, Inference).
    score_threshold: float = Field(default=0.05, ge=0, le=1)
    """Least score of a detection; the paper names none, 0.05 is its authors' program's (Detectron)."""
    nms_iou: float = Field(default=0.5, ge=0, le=1)
    """Of suppression within a class (section 3.1 names no number; Detectron's)."""
    max_detections: int = Field(default=100, gt=0)
    """Of an image, the best; the branches for masks and keypoints run on these alone (section 3.1)."""
    box_min_side: float = Field(default=1e-2, ge=0)
    """Canvas pixels; detections with a shorter side are dropped before suppression."""
    clip_to_image: bool = False
    """Boxes are cut once more to the original image, and those left without an area are dropped, after everything else."""
    mask_threshold: float = Field(default=0.5, ge=0, le=1)
    """A pixel belongs to the mask above this probability."""
    paste: PasteKind = "torchvision"
    """How an m x m mask becomes pixels. `torchvision`: pad by 1, grow the box by (m + 2) / m, truncate it to integers,
    bilinear, `>`. `detectron2`: bilinear at the pixels' centres in the real-valued box, zero outside the mask, `>=`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        ids = [category.id for category in self.categories]
        if len(set(ids)) != len(ids):
            raise ValueError("two categories have the same id")
        for category in self.categories:
            count = len(category.keypoints)
            if any(not 0 <= i < count for pair in category.flip_pairs + category.skeleton for i in pair):
                raise ValueError(f"flip_pairs or skeleton of category {category.name!r} name a keypoint that it does not have")
        if len(self.anchor_sizes) != len(self.rpn_strides):
            levels = "each of P2..P6" if self.features == "fpn" else f"the one map of {self.features} features"
            raise ValueError(f"anchor_sizes needs one entry for {levels}")
        if len({len(sizes) for sizes in self.anchor_sizes}) != 1:
            raise ValueError("anchor_sizes needs equally many sizes at every level: the proposal head is shared by them")
        if self.rpn_background_iou > self.rpn_foreground_iou:
            raise ValueError("rpn_background_iou is above rpn_foreground_iou: an anchor would be both")
        return self

    def changed(self, **fields: Any) -> Self:
        """The configuration with fields replaced, checked again (`model_copy` does not check)."""
        return type(self).model_validate({**self.model_dump(), **fields})

    @property
    def rpn_strides(self) -> tuple[int, ...]:
        """Canvas pixels between the cells of each map that proposals come from."""
        return {"fpn": (4, 8, 16, 32, 64), "c4": (16,), "c5": (32,), "dc5": (16,)}[self.features]

    @property
    def roi_strides(self) -> tuple[int, ...]:
        """Canvas pixels between the cells of each map that regions are pooled from: all but P6."""
        return self.rpn_strides[:4]

    @property
    def box_bins(self) -> int:
        """Bins a side of what the box branch gets: after the fifth stage where the features are C4."""
        return -(-self.box_pool // self.roi_stage_stride) if self.features == "c4" else self.box_pool

    @property
    def num_classes(self) -> int:
        """Classes of the classifier, the background among them."""
        return len(self.categories) + 1

    @property
    def num_keypoints(self) -> int:
        """K: the most keypoints that a category has; 0 when the model has no keypoint branch."""
        return max(len(category.keypoints) for category in self.categories) if self.keypoint else 0

    @property
    def tasks(self) -> frozenset[Task]:
        """What the model can answer."""
        tasks: set[Task] = {"box"}
        if self.mask:
            tasks.add("mask")
        if self.num_keypoints:
            tasks.add("keypoint")
        return frozenset(tasks)

    @property
    def category_names(self) -> dict[int, str]:
        """Names by category id, for every id that the model can put out."""
        return {category.id: category.name for category in self.categories}


class PredictOptions(BaseModel, PredictFields, frozen=True):
    """How a detector's `predict` runs. None takes the model's own value."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
