"""Recognises other networks by the names of their weights, so that an error message can say what a file is."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from masklake.model.config import BackboneConfig

_MARKS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf"((module|model|net|detr|_orig_mod)\.)*({pattern})"), what)
    for pattern, what in (
        (r"transformer\.(encoder|decoder)\.layers\.|class_embed\.|model\.query_position_embeddings", "a DETR"),
        (r"sem_seg_head\.|criterion\.empty_weight|pixel_decoder\.", "a MaskFormer"),
        (r"image_encoder\.|mask_decoder\.|prompt_encoder\.", "a Segment Anything model"),
        (r"\d+\.(conv\.weight|bn\.weight|cv\d\.|m\.\d+\.|anchors)|module_list\.\d+\.", "a YOLO model"),
        (r"(rpn_head|roi_head|bbox_head|mask_head\.convs\.\d\.conv|backbone\.layer\d)\.", "a model of MMDetection"),
        (r"roi_heads\.box_predictor\.\d\.", "a cascade of Detectron2 (Cascade R-CNN)"),
        (r"(stem\.conv1|res[2-5]\.\d+)\.", "a backbone alone, of Detectron2's ImageNet files"),
        (r"(conv1|res_conv1|res2_\d_branch2\w+)_(w|b|bn_s)$", "weights of Caffe2 (Detectron)"),
        (r"head\.(classification_head|regression_head)\.", "a one-stage detector of torchvision (RetinaNet, FCOS or SSD)"),
        (r"backbone\.(0|features)\.|backbone\.body\.\d+\.", "a detector on a MobileNet or VGG of torchvision"),
        (r"features\.\d+\.", "a classifier of another family (VGG, MobileNet, EfficientNet or ConvNeXt)"),
        (r"(down|up|inc|outc)\d*\.|encoder\d*\.\d+\.double_conv", "a U-Net"),
        (r"(visual|vision_model|text_model|patch_embed|cls_token|embeddings|blocks\.\d+\.attn)", "a vision transformer"),
        (r"(transformer\.h|model\.layers|encoder\.layer|bert)\.", "a language model"),
        (r"(exp_avg|param_groups|momentum_buffer)", "an optimiser's state"),
    )
)
_DETECTOR = re.compile(r"(rpn|proposal_generator|roi_heads|box_head)\.")
_CASCADE = "a cascade of Detectron2 (Cascade R-CNN)"

_NAMES = {
    (True, (2, 2, 2, 2)): "ResNet-18",
    (True, (3, 4, 6, 3)): "ResNet-34",
    (False, (3, 4, 6, 3)): "ResNet-50",
    (False, (3, 4, 23, 3)): "ResNet-101",
    (False, (3, 8, 36, 3)): "ResNet-152",
}


def other_network(state: Mapping[str, Tensor]) -> str | None:
    """Returns a description of the network of a state dict that cannot be converted, or None if it is not known."""
    detector = any(_DETECTOR.match(key) for key in state)
    for pattern, what in _MARKS:
        if any(pattern.match(key) for key in state) and (not detector or what == _CASCADE):
            return what
    return None


def residual_network(state: Mapping[str, Tensor]) -> str:
    """Returns the name of the network of a classifier's state dict (`conv1.`, `layer1.0.`), such as `ResNet-50`, `ResNeXt-101
    32x8d` or `Wide ResNet-50`.
    """
    blocks = [re.match(r"layer([1-4])\.(\d+)\.", key) for key in state]
    found = [(int(match[1]), int(match[2])) for match in blocks if match]
    depths = [1 + max((block for stage, block in found if stage == number), default=-1) for number in (1, 2, 3, 4)]
    basic = "layer1.0.conv3.weight" not in state
    spatial = state.get("layer1.0.conv2.weight")
    width, inputs = spatial.shape[:2] if spatial is not None and spatial.dim() == 4 else (64, 64)
    return _name(basic, (depths[0], depths[1], depths[2], depths[3]), width // max(inputs, 1), inputs)


def backbone_name(config: BackboneConfig) -> str:
    """Returns the name of a configuration's backbone, as in `residual_network`."""
    return _name(config.block == "basic", config.depths, config.groups, config.group_width)


def _name(basic: bool, depths: tuple[int, int, int, int], groups: int, width: int) -> str:
    name = (
        _NAMES.get((basic, depths)) or f"a residual network of {', '.join(map(str, depths))} {'basic' if basic else ''} blocks"
    )
    if groups > 1:
        return f"{name.replace('ResNet', 'ResNeXt')} {groups}x{width}d"
    return name if width == 64 else f"Wide {name}"
