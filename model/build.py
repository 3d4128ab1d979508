"""Builds the network of a configuration from its parts. The parts do not know the configuration."""

from __future__ import annotations

from functools import partial

from masklake.model.backbones.backbone import PyramidBackbone, SingleMapBackbone
from masklake.model.backbones.fpn import FeaturePyramid
from masklake.model.backbones.resnet import STAGES, ResNet, make_stage, stage_channels
from masklake.model.boxes import BoxCoder
from masklake.model.config import ModelConfig
from masklake.model.heads.box import BoxHead
from masklake.model.heads.keypoint import KeypointHead
from masklake.model.heads.mask import ConvMaskHead, FullyConnectedMaskHead, MaskHead
from masklake.model.layers import Norm
from masklake.model.network import Network
from masklake.model.proposals.anchors import Anchors
from masklake.model.proposals.rpn import ProposalCounts, RegionProposalNetwork, RPNHead
from masklake.model.rois.features import RegionFeatures
from masklake.model.sampling import SampleRule


def build_network(config: ModelConfig) -> Network:
    """Returns Mask R-CNN (section 3): backbone, region proposal network, features of regions, and a head for each task.

    The weights are random, initialised part by part in this order.
    """
    c4 = config.features == "c4"
    backbone = build_backbone(config)
    features = partial(
        RegionFeatures,
        strides=config.roi_strides,
        canonical_size=config.roi_canonical_size,
        canonical_level=config.roi_canonical_level,
        level_rule=config.roi_level_rule,
        pool=config.roi_pool,
        mode=config.roi_pool_mode,
        sampling_ratio=config.roi_sampling_ratio,
        aligned=config.roi_aligned,
    )
    return Network(
        backbone=backbone,
        rpn=build_rpn(config, backbone.channels),
        box_features=features(bins=config.box_pool),
        roi_stage=make_stage(config.backbone, STAGES - 1, config.roi_stage_stride) if c4 else None,
        box_head=build_box_head(config),
        mask_features=features(bins=config.mask_pool),
        mask_head=build_mask_head(config) if "mask" in config.tasks else None,
        keypoint_features=features(bins=config.keypoint_pool),
        keypoint_head=build_keypoint_head(config, backbone.channels) if "keypoint" in config.tasks else None,
        keypoint_counts=[len(category.keypoints) for category in config.categories],
        rpn_backbone=build_backbone(config) if config.rpn_backbone == "own" else None,
    )


def build_backbone(config: ModelConfig) -> PyramidBackbone | SingleMapBackbone:
    """Returns the backbone for `config.features`."""
    if config.features == "fpn":
        body = ResNet(config.backbone)
        return PyramidBackbone(body, FeaturePyramid(body.channels, config.fpn_channels, head_norm(config)))
    stages = STAGES - 1 if config.features == "c4" else STAGES
    return SingleMapBackbone(ResNet(config.backbone, stages, dilate_last=config.features == "dc5"))


def build_rpn(config: ModelConfig, channels: int) -> RegionProposalNetwork:
    """Returns the region proposal network for maps of that many channels."""
    anchors = Anchors(
        sizes=config.anchor_sizes,
        ratios=config.anchor_ratios,
        rounding=config.anchor_rounding,
        order=config.anchor_order,
        strides=config.rpn_strides if config.anchor_stride == "fixed" else None,
    )
    return RegionProposalNetwork(
        head=RPNHead(channels, anchors.per_cell, config.rpn_convs),
        anchors=anchors,
        coder=BoxCoder(config.rpn_delta_weights, config.delta_clamp),
        in_training=ProposalCounts(config.rpn_pre_nms_train, config.rpn_post_nms_train),
        at_inference=ProposalCounts(config.rpn_pre_nms_test, config.rpn_post_nms_test),
        nms_iou=config.rpn_nms_iou,
        min_side=config.rpn_min_side,
        rank=config.rpn_rank,
        score_threshold=config.rpn_score_threshold,
        sampling=SampleRule(
            config.rpn_foreground_iou, config.rpn_background_iou, config.rpn_samples, config.rpn_positive_fraction
        ),
        smooth_l1_beta=config.smooth_l1_beta,
    )


def build_box_head(config: ModelConfig) -> BoxHead:
    """Returns the head that classifies regions and refines their boxes."""
    return BoxHead(
        channels=region_channels(config),
        bins=config.box_bins,
        classes=config.num_classes,
        convs=config.box_channels,
        hidden=[config.box_hidden] * config.box_layers,
        norm=head_norm(config),
        coder=BoxCoder(config.box_delta_weights, config.delta_clamp),
        smooth_l1_beta=config.smooth_l1_beta,
    )


def build_mask_head(config: ModelConfig) -> MaskHead:
    """Returns the mask head for `config.mask_head`. With C4 it works on the same regions as the box head."""
    channels, classes = region_channels(config), config.num_classes
    bins = config.box_bins if config.features == "c4" else config.mask_pool
    if config.mask_head == "mlp":
        return FullyConnectedMaskHead(
            channels, bins, classes, config.mask_output, hidden=config.mask_hidden, side=config.mask_side
        )
    return ConvMaskHead(
        channels,
        bins,
        classes,
        config.mask_output,
        convs=config.mask_channels,
        deconv=config.mask_deconv_channels,
        norm=head_norm(config),
        side=config.mask_resize,
    )


def build_keypoint_head(config: ModelConfig, channels: int) -> KeypointHead:
    """Returns the keypoint head for regions of that many channels: those of the backbone's maps, with C4, too."""
    return KeypointHead(channels, config.keypoint_channels, config.num_keypoints, head_norm(config))


def region_channels(config: ModelConfig) -> int:
    """Returns the number of channels of a region in the input of the box and mask heads: with C4 of the fifth stage."""
    return config.fpn_channels if config.features == "fpn" else stage_channels(config.backbone, STAGES - 1)


def head_norm(config: ModelConfig) -> Norm:
    """Returns the norm after the convolutions of the pyramid and the heads."""
    return Norm(config.head_norm, 1e-5, config.backbone.norm_groups)
