"""The configuration of a model, as one frozen value: categories, layers, and every numerical convention, with unit and source.

A checkpoint contains its `ModelConfig`, so its numbers equal those of the system that the weights come from. The defaults are
torchvision's conventions and the paper's sizes (He et al., Mask R-CNN, 2017; section numbers refer to it). "Canvas" is the
resized image, padded at its right and bottom: the pixels that the network sees.
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
KeypointScore = Literal["logit", "probability"]

Positive = Annotated[int, Field(gt=0)]
Channels = Annotated[int, Field(gt=0, le=8192)]
"""Number of channels of a layer. The upper limit keeps an untrusted checkpoint from making its reader request all memory."""
Side = Annotated[int, Field(gt=0, le=65_535)]
"""Side of a canvas, in pixels."""
Factor = Annotated[float, Field(gt=0)]
INT32 = (-(2**31), 2**31 - 1)
"""Range of a category id, which the table stores in 32 bits."""


class _Frozen(BaseModel):
    """Base class of values: hashable, compared by content. Rejects unknown fields (misspelt options), NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Category(_Frozen):
    """A category of objects in a data set.

    id: from the data set; it may be 0 or negative, and must fit 32 bits. keypoints: names, in the order of the annotations;
    empty for categories without keypoints. flip_pairs: keypoint indices that a mirror image swaps (left and right eye).
    skeleton: pairs of keypoint indices, from 0, joined by a line in drawings.
    """

    id: int = Field(ge=INT32[0], le=INT32[1])
    name: str
    keypoints: tuple[str, ...] = ()
    flip_pairs: tuple[tuple[int, int], ...] = ()
    skeleton: tuple[tuple[int, int], ...] = ()


class BackboneConfig(_Frozen):
    """A residual network (ResNet: He et al. 2016; ResNeXt: Xie et al. 2017) with four stages of strides 4, 8, 16 and 32."""

    block: Literal["bottleneck", "basic"] = "bottleneck"
    depths: tuple[Positive, Positive, Positive, Positive] = (3, 4, 6, 3)
    widths: tuple[Channels, Channels, Channels, Channels] = (64, 128, 256, 512)
    """Channels of each stage's 3x3 convolutions in a plain ResNet; a bottleneck has four times as many output channels."""
    groups: int = Field(default=1, gt=0, le=128)
    """Cardinality of the 3x3 convolutions: 32 or 64 in a ResNeXt."""
    group_width: int = Field(default=64, gt=0, le=128)
    """Channels of a group in the first stage (4 in "32x4d"); 64 with one group is a plain ResNet."""
    stride_in: Literal["1x1", "3x3"] = "3x3"
    """The convolution of a bottleneck that has the stride: the first in the original ResNet and Detectron2's R50 and R101."""
    stem_channels: Channels = 64
    stem_kernel: int = Field(default=7, gt=0, le=31)
    """Kernel size in pixels; the stem has stride 2 and is followed by a max pool of stride 2."""
    norm: NormKind = "frozen"
    """`frozen`: batch statistics of the pre-training, as in the paper; `group`: trains from scratch at any batch size."""
    norm_eps: float = Field(default=1e-5, ge=0)
    """Epsilon of the norm layers. 0.0 for torchvision's COCO_V1 weights (mask, keypoint and box), 1e-5 otherwise."""
    norm_groups: int = Field(default=8, gt=0)
    """Number of groups of a `group` norm."""
    frozen_stages: int = Field(default=2, ge=0, le=5)
    """How many of stem and stages 1 to 4 are not trained (torchvision: `trainable_backbone_layers=3`)."""


class ModelConfig(_Frozen):
    """The configuration of a Mask R-CNN. The default of a new field must be added to `model.identity.FIRST_DEFAULTS`."""

    preset: str
    categories: tuple[Category, ...] = Field(min_length=1)
    """Class i + 1 of the classifier is `categories[i]`; class 0 is the background."""
    mask: bool = True
    """Whether the model has a mask branch (section 3)."""
    keypoint: bool = False
    """Whether the model has a keypoint branch (section 5), provided that a category has keypoints."""
    backbone: BackboneConfig = BackboneConfig()
    features: FeatureKind = "fpn"
    """Feature maps for regions and proposals (section 3 "Network Architecture", section 4.1, table 2): the pyramid P2..P6; C4,
    with the fifth stage on each region (figure 4, left); C5 of stride 32; or dilated C5 of stride 16 (DC5).
    """
    fpn_channels: Channels = 256
    head_norm: NormKind = "none"
    """Norm after the convolutions of the pyramid and of the branches; `group` helps training from scratch (He et al. 2019)."""

    # The canvas (section 3.1).
    image_channels: Literal["rgb", "bgr"] = "rgb"
    """Order of channels in the network's input; images are always passed as RGB."""
    image_divisor: float = Field(default=255.0, gt=0)
    """Divisor of the bytes: 255 for values of 0..1, 1 for values of 0..255."""
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the divided values, in the order of `image_channels`."""
    image_std: tuple[Factor, Factor, Factor] = (0.229, 0.224, 0.225)
    resize: Literal["bilinear_floor", "pil"] = "bilinear_floor"
    """`bilinear_floor`: float bilinear without antialiasing, after normalising; sizes are rounded down. `pil`: on bytes, as in
    Pillow: antialiased when shrinking; sizes are rounded to the nearest.
    """
    min_sizes: tuple[Side, ...] = Field(default=(800,), min_length=1)
    """Shorter side of the canvas, in pixels: inference uses the last value, training any of them."""
    max_size: Side = 1333
    """Maximum of the longer side, in pixels."""
    upscale: bool = True
    """If False, images smaller than `min_sizes` keep their size."""
    canvas_divisor: int = Field(default=32, gt=0)
    """Pixels; the canvas is padded with zeros to a multiple of it."""

    # Anchors and proposals (section 3.1; Ren et al. 2015; Lin et al. 2017, FPN).
    anchor_sizes: tuple[Annotated[tuple[Positive, ...], Field(min_length=1)], ...] = ((32,), (64,), (128,), (256,), (512,))
    """Canvas pixels, for each of P2..P6, or for the single map of other features: 5 scales (section 3.1; FPN, section 4.1)."""
    anchor_ratios: tuple[Factor, ...] = Field(default=(0.5, 1.0, 2.0), min_length=1)
    """Height / width: 3 ratios (section 3.1)."""
    anchor_rounding: bool = True
    """Whether the corners of cell anchors are rounded to whole pixels."""
    anchor_order: Literal["ratio", "size"] = "ratio"
    """Primary order of the anchors in a cell."""
    anchor_stride: Literal["canvas_over_map", "fixed"] = "canvas_over_map"
    """`canvas_over_map`: canvas height // map height (P6 at 800 pixels: 61); `fixed`: 4, 8, 16, 32, 64."""
    rpn_convs: int = Field(default=1, gt=0, le=100)
    """Number of 3x3 convolutions in the proposal head (two in torchvision's V2)."""
    rpn_backbone: RpnBackbone = "shared"
    """Source of the RPN's maps: the detector's backbone (Ren et al. 2015, section 3.2), or a backbone of its own: section 3.1's
    RPN, which "does not share features with Mask R-CNN".
    """
    rpn_pre_nms_train: int = Field(default=2000, gt=0)
    """Number of best anchors per level before suppression, in training."""
    rpn_pre_nms_test: int = Field(default=1000, gt=0)
    """Number of best anchors per level before suppression, at inference."""
    rpn_post_nms_train: int = Field(default=2000, gt=0)
    """Number of proposals per image after suppression, in training (Ren et al. 2015, section 3.3)."""
    rpn_post_nms_test: int = Field(default=1000, gt=0)
    """Number of proposals per image after suppression, at inference: 1000 with FPN, 300 with C4 (section 3.1)."""
    rpn_nms_iou: float = Field(default=0.7, ge=0, le=1)
    """IoU of suppression within a level (Ren et al. 2015, section 3.3)."""
    rpn_rank: Literal["probability", "logit"] = "probability"
    """Value by which proposals are ranked: close to 1, probabilities of different logits are equal."""
    rpn_score_threshold: float = Field(default=0.0, ge=0, lt=1)
    """Minimum objectness (a probability) of a proposal at inference."""
    rpn_min_side: float = Field(default=1e-3, ge=0)
    """Canvas pixels; proposals with a shorter side or without an area are dropped."""
    rpn_foreground_iou: float = Field(default=0.7, ge=0, le=1)
    rpn_background_iou: float = Field(default=0.3, ge=0, le=1)
    """An anchor is positive if its IoU with an object is at least `rpn_foreground_iou`, or if no anchor overlaps that object
    more; negative if its IoU is below `rpn_background_iou`; otherwise it is not sampled (Ren et al. 2015, section 3.1.2)."""
    rpn_samples: int = Field(default=256, gt=0)
    """Number of anchors per image in the loss, at most `rpn_positive_fraction` of them positive (Ren et al. 2015, section
    3.1.3).
    """
    rpn_positive_fraction: float = Field(default=0.5, gt=0, le=1)
    rpn_delta_weights: tuple[Factor, Factor, Factor, Factor] = (1.0, 1.0, 1.0, 1.0)
    """Factors of dx, dy, dw, dh in the box parametrisation."""
    delta_clamp: float = Field(default=4.135166556742356, gt=0)
    """Maximum of dw, dh before exp: log(1000 / 16)."""

    # Regions of interest (section 3 "RoIAlign", 3.1; FPN equation 1).
    roi_canonical_size: float = Field(default=224.0, gt=0)
    """Side of the square, in canvas pixels, that is assigned to `roi_canonical_level`."""
    roi_canonical_level: int = 4
    roi_level_rule: Literal["torchvision", "detectron2"] = "torchvision"
    """floor(4 + log2(sqrt(area) / 224) + 1e-6), or floor(4 + log2(sqrt(area) / 224 + 1e-8)): they differ at exact powers of
    two.
    """
    roi_pool: PoolKind = "align"
    """RoIAlign; RoIPool, which rounds regions and bins to feature pixels; or RoIWarp, which rounds only regions (table 2c)."""
    roi_pool_mode: Literal["avg", "max"] = "avg"
    """How a bin combines its samples (RoIWarp, RoIAlign) or pixels (RoIPool, originally "max")."""
    roi_aligned: bool = False
    """Whether RoIAlign shifts by half a pixel."""
    roi_sampling_ratio: int = Field(default=2, ge=0)
    """Sampling points along each side of an output bin; 0: as many as the bin has pixels."""
    roi_samples: int = Field(default=512, gt=0)
    """Number of training RoIs per image, N: 512 with FPN, 64 with C4 (section 3.1)."""
    roi_positive_fraction: float = Field(default=0.25, gt=0, le=1)
    """Maximum share of positive RoIs: positive to negative 1:3 (section 3.1)."""
    roi_foreground_iou: float = Field(default=0.5, ge=0, le=1)
    """Minimum IoU of a positive RoI with an object; others are negative (section 3.1)."""

    # Heads (figure 4, right; section 5).
    box_pool: int = Field(default=7, gt=0, le=64)
    """Bins per side. With C4 features the fifth stage runs on them, and its output is also used for masks."""
    roi_stage_stride: Literal[1, 2] = 1
    """Stride of the fifth stage on a region: 1 on 7 x 7 bins in the paper's figure 4, 2 on 14 x 14 bins in Detectron2."""
    box_channels: tuple[Channels, ...] = ()
    """Channels of the 3x3 convolutions before the fully connected layers (none in the paper; four of 256 in torchvision's
    V2).
    """
    box_layers: int = Field(default=2, ge=0, le=100)
    """Number of fully connected layers before the predictors; with none, they use the mean over the bins, as in a ResNet
    (C4).
    """
    box_hidden: Channels = 1024
    """Width of the fully connected layers."""
    box_delta_weights: tuple[Factor, Factor, Factor, Factor] = (10.0, 10.0, 5.0, 5.0)
    smooth_l1_beta: float = Field(default=1 / 9, gt=0)
    """Difference at which the smooth L1 losses of the boxes change from quadratic to linear."""
    mask_pool: int = Field(default=14, gt=0, le=64)
    """Bins per side of a region in the input of the mask branch."""
    mask_head: Literal["fcn", "mlp"] = "fcn"
    """Convolutions, or fully connected layers that predict all m x m pixels at once (table 2e)."""
    mask_output: MaskOutput = "sigmoid"
    """One mask per class without competition; a softmax over the classes at each pixel (table 2b); or one mask for all
    classes.
    """
    mask_channels: tuple[Channels, ...] = (256, 256, 256, 256)
    """Channels of the 3x3 convolutions (`fcn`)."""
    mask_deconv_channels: Channels = 256
    """Channels of the deconvolution after them (`fcn`)."""
    mask_hidden: tuple[Channels, ...] = (1024, 1024)
    """Widths of the fully connected layers before the last one (`mlp`)."""
    mask_side: int = Field(default=28, gt=0, le=512)
    """m, side of the mask in pixels (`mlp`)."""
    mask_resize: int | None = Field(default=None, gt=0, le=512)
    """m, to which the logits of a convolutional head are resized. None: the size after its deconvolution, twice the bins (28,
    or 14 with C4 features).
    """
    keypoint_pool: int = Field(default=14, gt=0, le=64)
    """Bins per side of a region in the input of the keypoint branch; the heat maps are four times as wide (56)."""
    keypoint_channels: tuple[Channels, ...] = Field(default=(512,) * 8, min_length=1)
    """Channels of the 3x3 convolutions."""
    keypoint_loss_weight: float = Field(default=1.0, ge=0)
    """Weight of the keypoint loss, which starts at log(56 * 56) = 8, ten times the others."""
    keypoint_score: KeypointScore = "logit"
    """Score of the best pixel of the resized heat map: its logit, or its probability over the pixels of the map before
    resizing.
    """
    keypoint_offset: float = 0.0
    """Shift from a data set's keypoints to the model's, in pixels: added to the ground truth, subtracted from predictions. 0.5
    if a keypoint at 3 means the centre of pixel 3."""

    # What is reported (section 3.1, Inference).
    score_threshold: float = Field(default=0.05, ge=0, le=1)
    """Minimum score of a detection; the paper gives no number, 0.05 is from its authors' program (Detectron)."""
    nms_iou: float = Field(default=0.5, ge=0, le=1)
    """IoU of suppression within a class; the paper gives no number, 0.5 is Detectron's."""
    max_detections: int = Field(default=100, gt=0)
    """Maximum number of detections per image; the branches for masks and keypoints run on these alone (section 3.1)."""
    box_min_side: float = Field(default=1e-2, ge=0)
    """Canvas pixels; detections with a shorter side are dropped before suppression."""
    clip_to_image: bool = False
    """Whether boxes are clipped once more to the original image at the end, and those without an area are dropped."""
    mask_threshold: float = Field(default=0.5, ge=0, le=1)
    """Probability above which a pixel belongs to the mask."""
    paste: PasteKind = "torchvision"
    """How an m x m mask is pasted into the image. `torchvision`: pad by 1, enlarge the box by (m + 2) / m, truncate it to
    integers, resize bilinearly, `>`. `detectron2`: sample bilinearly at the centres of pixels in the real-valued box, zero
    outside the mask, `>=`.
    """

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
        """Returns the configuration with fields replaced and validated (`model_copy` does not validate)."""
        return type(self).model_validate({**self.model_dump(), **fields})

    @property
    def rpn_strides(self) -> tuple[int, ...]:
        """Canvas pixels between the cells of each map for proposals."""
        return {"fpn": (4, 8, 16, 32, 64), "c4": (16,), "c5": (32,), "dc5": (16,)}[self.features]

    @property
    def roi_strides(self) -> tuple[int, ...]:
        """Canvas pixels between the cells of each map for regions: all but P6."""
        return self.rpn_strides[:4]

    @property
    def box_bins(self) -> int:
        """Bins per side in the input of the box branch: after the fifth stage with C4 features."""
        return -(-self.box_pool // self.roi_stage_stride) if self.features == "c4" else self.box_pool

    @property
    def num_classes(self) -> int:
        """Number of classes, including the background."""
        return len(self.categories) + 1

    @property
    def num_keypoints(self) -> int:
        """K: the maximum number of keypoints of a category; 0 without a keypoint branch."""
        return max(len(category.keypoints) for category in self.categories) if self.keypoint else 0

    @property
    def tasks(self) -> frozenset[Task]:
        """Tasks that the model has branches for."""
        tasks: set[Task] = {"box"}
        if self.mask:
            tasks.add("mask")
        if self.num_keypoints:
            tasks.add("keypoint")
        return frozenset(tasks)

    @property
    def category_names(self) -> dict[int, str]:
        """Names by category id, for every id that the model can return."""
        return {category.id: category.name for category in self.categories}


class PredictOptions(BaseModel, PredictFields, frozen=True):
    """Options of `Detector.predict`. None: the model's own value."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
