"""What the paper compares and what it found: tables 2b to 2e, 5 and 6 and sections 4.2 and 4.4 of He et al., Mask R-CNN
(arXiv:1703.06870v3), each beside the small models that `benchmarks.ablations` trains for it.

The models of a table differ in the fields that it is about and in nothing else. Their layers are narrower than `tiny`'s, so
that dozens of trainings fit into an hour of one CPU core; what makes each line of the paper's tables is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from masklake.jobs.shapes import CATEGORIES
from masklake.model.config import ModelConfig
from masklake.model.phases import PHASES, Phase
from masklake.model.presets import PRESETS
from masklake.pipeline.coco.reading import parse_coco

MASK = ("mask AP", "mask AP50", "mask AP75")
BOX = ("box AP", "box AP50", "box AP75")
KEYPOINT = ("keypoint AP", "keypoint AP50", "keypoint AP75")
METRICS = (*BOX, *MASK, *KEYPOINT)


PROPOSALS = Phase("rpn")
"""Learnt first, once for all variants of a seed: the RPN, and the backbone that all start from (ImageNet's in the paper)."""
SEPARATE = (Phase("detector", "own"),)
"""Then the detector, on the proposals of an RPN that keeps that backbone as its own and stays as it is (section 3.1)."""
SHARED = (*SEPARATE, *PHASES["four_step"][2:])
"""And then an RPN for the detector's own maps, and the branches for that (section 4.4)."""


@dataclass(frozen=True)
class Variant:
    """One line of a table.

    paper: its figures, in the order of the table's metrics; None where the paper has none. phases: what is learnt behind
    PROPOSALS.
    """

    name: str
    config: ModelConfig
    paper: tuple[float | None, ...]
    phases: tuple[Phase, ...] = SEPARATE


@dataclass(frozen=True)
class Table:
    """One comparison.

    source: where the paper has it and on what. metrics: columns, of METRICS. fields: those of `ModelConfig`, and "phases", that
    its variants differ in. variants: in the paper's order; the last is what it recommends. remark: what it says in words.
    """

    key: str
    title: str
    source: str
    metrics: tuple[str, ...]
    fields: frozenset[str]
    variants: tuple[Variant, ...]
    remark: str = ""


# -- the models --------------------------------------------------------------------------------------------------------

SHAPES = parse_coco({"images": [], "annotations": [], "categories": CATEGORIES}, "masklake.jobs.shapes").categories
ARROW = tuple(category for category in SHAPES if category.keypoints)
"""The one kind of shape with keypoints: what the person category is in tables 5 and 6."""

FPN = PRESETS["tiny"].changed(
    categories=SHAPES,
    keypoint=False,
    backbone={**PRESETS["tiny"].backbone.model_dump(), "widths": (32, 64, 96, 64)},
    fpn_channels=48,
    rpn_pre_nms_train=200,
    rpn_post_nms_train=100,
    rpn_pre_nms_test=200,
    rpn_post_nms_test=100,
    roi_samples=64,
    box_hidden=128,
    mask_channels=(32, 32),
    mask_deconv_channels=32,
    keypoint_channels=(48, 48),
)
C4 = FPN.changed(features="c4", anchor_sizes=((16, 24, 36),), roi_samples=32, box_layers=0, mask_channels=())
"""Stride 16, the fifth stage on each region (figure 4, left)."""
C5 = FPN.changed(features="c5", anchor_sizes=((16, 24, 36),), roi_samples=32)
"""Stride 32, the heads of figure 4, right ("as the res5 head is not applicable")."""
POSE = FPN.changed(categories=ARROW, mask=False, keypoint=True)


# -- the tables --------------------------------------------------------------------------------------------------------


def softmax_or_sigmoid() -> Table:
    """Table 2b."""
    return Table(
        key="2b",
        title="Multinomial vs. independent masks",
        source="Table 2b, ResNet-50-C4",
        metrics=MASK,
        fields=frozenset({"mask_output"}),
        variants=(
            Variant("softmax", C4.changed(mask_output="softmax"), (24.8, 44.1, 25.1)),
            Variant("sigmoid", C4, (30.3, 51.2, 31.5)),
        ),
    )


def region_layers_at_stride_16() -> Table:
    """Table 2c."""
    lines = (
        ("RoIPool, max", "pool", "max", (26.9, 48.8, 26.4)),
        ("RoIWarp, max", "warp", "max", (27.2, 49.2, 27.1)),
        ("RoIWarp, ave", "warp", "avg", (27.1, 48.9, 27.1)),
        ("RoIAlign, max", "align", "max", (30.2, 51.0, 31.8)),
        ("RoIAlign, ave", "align", "avg", (30.3, 51.2, 31.5)),
    )
    return Table(
        key="2c",
        title="RoI layers on features of stride 16",
        source="Table 2c, ResNet-50-C4",
        metrics=MASK,
        fields=frozenset({"roi_pool", "roi_pool_mode"}),
        variants=tuple(
            Variant(name, C4.changed(roi_pool=pool, roi_pool_mode=mode), paper) for name, pool, mode, paper in lines
        ),
    )


def region_layers_at_stride_32() -> Table:
    """Table 2d."""
    return Table(
        key="2d",
        title="RoI layers on features of stride 32",
        source="Table 2d, ResNet-50-C5",
        metrics=(*MASK, *BOX),
        fields=frozenset({"roi_pool", "roi_pool_mode"}),
        variants=(
            Variant("RoIPool", pooled(C5), (23.6, 46.5, 21.6, 28.2, 52.7, 26.9)),
            Variant("RoIAlign", C5, (30.9, 51.8, 32.1, 34.0, 55.3, 36.4)),
        ),
    )


def region_layers_on_the_pyramid() -> Table:
    """Section 4.2, "RoIAlign"; RoIAlign's own masks are table 2a's."""
    return Table(
        key="fpn",
        title="RoI layers on the pyramid",
        source="Section 4.2 and table 2a, ResNet-50-FPN",
        metrics=(*MASK, "box AP"),
        fields=frozenset({"roi_pool", "roi_pool_mode"}),
        variants=(
            Variant("RoIPool", pooled(FPN), (None, None, None, None)),
            Variant("RoIAlign", FPN, (33.6, 55.2, 35.3, None)),
        ),
        remark="RoIAlign gains 1.5 mask AP and 0.5 box AP.",
    )


def mask_branches() -> Table:
    """Table 2e: layers of 1024 in the paper, of 128 here."""
    return Table(
        key="2e",
        title="Mask branch: fully connected vs. fully convolutional",
        source="Table 2e, ResNet-50-FPN",
        metrics=MASK,
        fields=frozenset({"mask_head", "mask_hidden"}),
        variants=(
            Variant("MLP, two hidden layers", FPN.changed(mask_head="mlp", mask_hidden=(128,) * 2), (31.5, 53.7, 32.8)),
            Variant("MLP, three hidden layers", FPN.changed(mask_head="mlp", mask_hidden=(128,) * 3), (31.5, 54.0, 32.6)),
            Variant("FCN", FPN, (33.6, 55.2, 35.3)),
        ),
    )


def class_specific_or_agnostic() -> Table:
    """Section 4.2, "Class-Specific vs. Class-Agnostic Masks"."""
    return Table(
        key="agnostic",
        title="Class-agnostic vs. class-specific masks",
        source="Section 4.2, ResNet-50-C4",
        metrics=("mask AP",),
        fields=frozenset({"mask_output"}),
        variants=(
            Variant("class-agnostic", C4.changed(mask_output="agnostic"), (29.7,)),
            Variant("class-specific", C4, (30.3,)),
        ),
    )


def tasks_together() -> Table:
    """Table 5: its person is our arrow."""
    lines = (
        ("Faster R-CNN", False, False, (52.5, None, None)),
        ("Mask R-CNN, mask-only", True, False, (53.6, 45.8, None)),
        ("Mask R-CNN, keypoint-only", False, True, (50.7, None, 64.2)),
        ("Mask R-CNN, keypoint & mask", True, True, (52.0, 45.1, 64.7)),
    )
    return Table(
        key="5",
        title="Multi-task learning of box, mask and keypoint",
        source="Table 5, ResNet-50-FPN, person",
        metrics=("box AP", "mask AP", "keypoint AP"),
        fields=frozenset({"mask", "keypoint"}),
        variants=tuple(Variant(name, POSE.changed(mask=mask, keypoint=point), paper) for name, mask, point, paper in lines),
    )


def region_layers_for_keypoints() -> Table:
    """Table 6."""
    return Table(
        key="6",
        title="RoI layers for keypoints, on the pyramid",
        source="Table 6, ResNet-50-FPN, person",
        metrics=KEYPOINT,
        fields=frozenset({"roi_pool", "roi_pool_mode"}),
        variants=(Variant("RoIPool", pooled(POSE), (59.8, 86.2, 66.7)), Variant("RoIAlign", POSE, (64.2, 86.6, 69.7))),
    )


def shared_features() -> Table:
    """Section 4.4, "Inference"."""
    return Table(
        key="rpn",
        title="Proposals from features of their own vs. shared ones",
        source="Section 4.4, ResNet-101-FPN",
        metrics=("mask AP", "box AP"),
        fields=frozenset({"phases"}),
        variants=(Variant("separate", FPN, (None, None)), Variant("shared", FPN, (None, None), SHARED)),
        remark="Sharing features by 4-step training reaches statistically the same mask AP.",
    )


def pooled(config: ModelConfig) -> ModelConfig:
    """The same with RoIPool, which keeps the greatest pixel of a bin."""
    return config.changed(roi_pool="pool", roi_pool_mode="max")


def _tables() -> Iterator[Table]:
    yield softmax_or_sigmoid()
    yield class_specific_or_agnostic()
    yield region_layers_at_stride_16()
    yield region_layers_at_stride_32()
    yield region_layers_on_the_pyramid()
    yield mask_branches()
    yield tasks_together()
    yield region_layers_for_keypoints()
    yield shared_features()


TABLES = {table.key: table for table in _tables()}
