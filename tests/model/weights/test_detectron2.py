"""With Detectron2's weights the outputs are Detectron2's, whose arithmetic is written out here, image by image."""

from __future__ import annotations

import io
import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms, roi_align

from masklake.model import create_model, load_checkpoint, save_checkpoint
from masklake.model.boxes import BoxCoder
from masklake.model.build import build_network
from masklake.model.coco_categories import PERSON
from masklake.model.config import Category, ModelConfig, PredictOptions
from masklake.model.errors import CheckpointError
from masklake.model.inference import Detections, resolve, select, to_instances
from masklake.model.instances import Instances, Target
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.presets import PRESETS
from masklake.model.proposals.anchors import cell_anchors
from masklake.model.proposals.rpn import Regions
from masklake.model.rois.targets import TargetSpec, truth_on_canvas
from masklake.model.transform import Canvas, make_canvas
from masklake.model.weights.detectron2 import conventions

State = dict[str, Tensor]

MISSING_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = [number for number in range(1, 91) if number not in MISSING_IDS]
SHORT, LONG = 256, 427
"""Pixels of the canvas' sides."""
PIXEL_MEAN = torch.tensor([103.53, 116.28, 123.675])[:, None, None]
RESNEXT_STD = torch.tensor([57.375, 57.12, 58.395])[:, None, None]


# -- the oracle --------------------------------------------------------------------------------------------------------


@dataclass
class Oracle:
    """A Detectron2 detector as functions of its state dict; one image at a time."""

    state: State
    features: str
    short: int
    long: int

    def canvas(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """uint8 RGB (3, H, W) -> (1, 3, h', w') and the image's size on it."""
        height, width = image.shape[1:]
        scale = self.short / min(height, width)
        size = [self.short, scale * width] if height < width else [scale * height, self.short]
        if max(size) > self.long:
            size = [side * self.long / max(size) for side in size]
        h, w = (int(side + 0.5) for side in size)
        resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((w, h), Image.Resampling.BILINEAR)
        bgr = torch.from_numpy(np.array(resized)[:, :, ::-1].copy()).permute(2, 0, 1).float()
        pixels = (bgr - PIXEL_MEAN) / (RESNEXT_STD if self.groups > 1 else 1.0)
        divisor = 32 if self.features == "fpn" else 1
        return F.pad(pixels, (0, -w % divisor, 0, -h % divisor))[None], (h, w)

    @property
    def groups(self) -> int:
        weight = next(tensor for key, tensor in self.state.items() if key.endswith("res2.0.conv2.weight"))
        return weight.shape[0] // weight.shape[1]

    def conv(self, x: Tensor, name: str, stride: int = 1, pad: int = 0, dilation: int = 1, groups: int = 1) -> Tensor:
        weights = self.state
        x = F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), stride, pad, dilation, groups)
        if f"{name}.norm.weight" not in weights:
            return x
        mean, var, weight, bias = (weights[f"{name}.norm.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def stage(self, x: Tensor, name: str, stride: int, dilation: int = 1) -> Tensor:
        for number in itertools.count():
            block, step = f"{name}.{number}", stride if number == 0 else 1
            if f"{block}.conv1.weight" not in self.state:
                return x
            in_1x1, in_3x3 = (step, 1) if self.groups == 1 else (1, step)
            y = self.conv(x, f"{block}.conv1", in_1x1).relu()
            y = self.conv(y, f"{block}.conv2", in_3x3, dilation, dilation, self.groups).relu()
            shortcut = self.conv(x, f"{block}.shortcut", step) if f"{block}.shortcut.weight" in self.state else x
            x = (self.conv(y, f"{block}.conv3") + shortcut).relu()
        raise AssertionError

    def backbone(self, canvas: Tensor) -> list[Tensor]:
        prefix = "backbone.bottom_up." if self.features == "fpn" else "backbone."
        x = F.max_pool2d(self.conv(canvas, f"{prefix}stem.conv1", 2, 3).relu(), 3, 2, 1)
        maps = []
        for number in range(2, 5 if self.features == "c4" else 6):
            dilated = number == 5 and self.features == "dc5"
            x = self.stage(x, f"{prefix}res{number}", 1 if number == 2 or dilated else 2, 2 if dilated else 1)
            maps.append(x)
        if self.features != "fpn":
            return maps[-1:]
        top, levels = None, []
        for number, level in zip((5, 4, 3, 2), reversed(maps), strict=True):
            lateral = self.conv(level, f"backbone.fpn_lateral{number}")
            top = lateral if top is None else lateral + F.interpolate(top, scale_factor=2.0, mode="nearest")
            levels.insert(0, self.conv(top, f"backbone.fpn_output{number}", pad=1))
        return [*levels, F.max_pool2d(levels[-1], 1, 2)]

    def rpn(self, features: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """For each level logits (H*W*A,) and deltas (H*W*A, 4)."""
        outputs = []
        for level in features:
            hidden = self.conv(level, "proposal_generator.rpn_head.conv", pad=1).relu()
            logits = self.conv(hidden, "proposal_generator.rpn_head.objectness_logits")[0]
            deltas = self.conv(hidden, "proposal_generator.rpn_head.anchor_deltas")[0]
            anchors = logits.shape[0]
            deltas = deltas.view(anchors, 4, *deltas.shape[1:]).permute(2, 3, 0, 1)
            outputs.append((logits.permute(1, 2, 0).flatten(), deltas.reshape(-1, 4)))
        return outputs

    def anchors(self, features: list[Tensor]) -> list[Tensor]:
        strides = {"fpn": (4, 8, 16, 32, 64), "c4": (16,), "dc5": (16,)}[self.features]
        sizes = [(32 * 2**level,) for level in range(5)] if self.features == "fpn" else [(32, 64, 128, 256, 512)]
        result = []
        for level, stride, of_level in zip(features, strides, sizes, strict=True):
            cells = []
            for size, ratio in itertools.product(of_level, (0.5, 1.0, 2.0)):
                w = math.sqrt(size**2 / ratio)
                cells.append([-w / 2, -w * ratio / 2, w / 2, w * ratio / 2])
            y, x = torch.meshgrid(*(torch.arange(side) * float(stride) for side in level.shape[2:]), indexing="ij")
            shifts = torch.stack([x, y, x, y], dim=2).view(-1, 1, 4)
            result.append((shifts + torch.tensor(cells)).view(-1, 4))
        return result

    def proposals(self, features: list[Tensor], size: tuple[int, int]) -> Tensor:
        boxes, scores, levels = [], [], []
        for number, ((logits, deltas), anchors) in enumerate(zip(self.rpn(features), self.anchors(features), strict=True)):
            top, place = logits.topk(min(len(logits), 1000 if self.features == "fpn" else 6000))
            boxes.append(shifted(anchors[place], deltas[place], (1.0, 1.0, 1.0, 1.0)))
            scores.append(top)
            levels.append(torch.full_like(place, number))
        box, score, level = inside(torch.cat(boxes), size), torch.cat(scores), torch.cat(levels)
        real = (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])
        box, score, level = box[real], score[real], level[real]
        return box[batched_nms(box, score, level, 0.7)[:1000]]

    def regions(self, features: list[Tensor], boxes: Tensor, bins: int) -> Tensor:
        if self.features != "fpn":
            return roi_align(features[0], [boxes], bins, 1 / 16, 0, aligned=True)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        level = torch.floor(4 + torch.log2(area.sqrt() / 224 + 1e-8)).clamp(2, 5) - 2
        pooled = torch.zeros(len(boxes), features[0].shape[1], bins, bins)
        for number in range(4):
            chosen = level == number
            pooled[chosen] = roi_align(features[number], [boxes[chosen]], bins, 1 / 2 ** (2 + number), 0, aligned=True)
        return pooled

    def box_head(self, features: list[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, classes + 1), the background last, and deltas (R, classes * 4)."""
        if self.features == "c4":
            hidden = self.stage(self.regions(features, boxes, 14), "roi_heads.res5", 2).mean(dim=(2, 3))
        else:
            hidden = self.regions(features, boxes, 7).flatten(1)
            for layer in ("fc1", "fc2"):
                hidden = self.linear(hidden, f"roi_heads.box_head.{layer}").relu()
        return tuple(self.linear(hidden, f"roi_heads.box_predictor.{layer}") for layer in ("cls_score", "bbox_pred"))

    def detections(self, features: list[Tensor], boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (N, 4) on the canvas, scores, contiguous classes."""
        logits, deltas = self.box_head(features, boxes)
        scores = logits.softmax(dim=1)[:, :-1]
        moved = shifted(boxes[:, None], deltas.view(len(boxes), -1, 4), (10.0, 10.0, 5.0, 5.0))
        region, label = (scores > 0.05).nonzero(as_tuple=True)
        box, score = inside(moved[region, label], size), scores[region, label]
        keep = batched_nms(box, score, label, 0.5)[:100]
        return box[keep], score[keep], label[keep]

    def masks(self, features: list[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        if self.features == "c4":
            x = self.stage(self.regions(features, boxes, 14), "roi_heads.res5", 2)
        else:
            x = self.regions(features, boxes, 14)
            for number in range(1, 5):
                x = self.conv(x, f"roi_heads.mask_head.mask_fcn{number}", pad=1).relu()
        weight, bias = (self.state[f"roi_heads.mask_head.deconv.{kind}"] for kind in ("weight", "bias"))
        x = self.conv(F.conv_transpose2d(x, weight, bias, stride=2).relu(), "roi_heads.mask_head.predictor")
        return x[torch.arange(len(x)), labels].sigmoid()

    def keypoints(self, features: list[Tensor], boxes: Tensor) -> Tensor:
        """(N, K, 3): x and y on the canvas, score."""
        x = self.regions(features, boxes, 14)
        for number in range(1, 9):
            x = self.conv(x, f"roi_heads.keypoint_head.conv_fcn{number}", pad=1).relu()
        weight, bias = (self.state[f"roi_heads.keypoint_head.score_lowres.{kind}"] for kind in ("weight", "bias"))
        x = F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
        maps = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        points = []
        for heat, box in zip(maps, boxes, strict=True):
            w, h = (box[2:] - box[:2]).clamp(min=1).tolist()
            large = F.interpolate(heat[None], (math.ceil(h), math.ceil(w)), mode="bicubic", align_corners=False)[0].flatten(1)
            best, place = large.max(dim=1)
            column, row = place % math.ceil(w), place // math.ceil(w)
            score = 1 / (heat - best[:, None, None]).exp().sum(dim=(1, 2))
            at_x, at_y = (column + 0.5) * (w / math.ceil(w)) + box[0], (row + 0.5) * (h / math.ceil(h)) + box[1]
            points.append(torch.stack([at_x, at_y, score], dim=1))
        return torch.stack(points)

    def predict(self, image: Tensor) -> dict[str, Tensor]:
        """boxes, scores, classes, and `masks` (N, H, W) and `keypoints`, as far as there are, in the image's pixels."""
        canvas, (h, w) = self.canvas(image)
        features = self.backbone(canvas)
        boxes, scores, labels = self.detections(features, self.proposals(features, (h, w)), (h, w))
        height, width = image.shape[1:]
        moved = inside(boxes * torch.tensor([width / w, height / h] * 2), (height, width))
        real = (moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])
        found = {"boxes": moved[real], "scores": scores[real], "classes": labels[real]}
        if "roi_heads.mask_head.deconv.weight" in self.state:
            found["masks"] = sampled(self.masks(features, boxes, labels)[real], moved[real], (height, width))
        if "roi_heads.keypoint_head.score_lowres.weight" in self.state:
            points = self.keypoints(features, boxes)[real]
            found["keypoints"] = points * torch.tensor([width / w, height / h, 1.0])
        return found


def shifted(boxes: Tensor, deltas: Tensor, weights: tuple[float, ...]) -> Tensor:
    """(..., 4) boxes moved and scaled by (..., 4) deltas."""
    dx, dy, dw, dh = (deltas / torch.tensor(weights)).unbind(-1)
    w, h = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    x, y = boxes[..., 0] + w / 2 + dx * w, boxes[..., 1] + h / 2 + dy * h
    limit = math.log(1000 / 16)
    w, h = w * dw.clamp(max=limit).exp(), h * dh.clamp(max=limit).exp()
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1)


def inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    x, y = boxes[..., 0::2].clamp(0, size[1]), boxes[..., 1::2].clamp(0, size[0])
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def sampled(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Probabilities (N, H, W): the small masks sampled at the centre of every pixel."""
    pasted = []
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        x = (torch.arange(size[1]) + 0.5 - x0) / (x1 - x0) * 2 - 1
        y = (torch.arange(size[0]) + 0.5 - y0) / (y1 - y0) * 2 - 1
        grid = torch.stack([x.expand(size[0], -1), y[:, None].expand(-1, size[1])], dim=2)
        pasted.append(F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0])
    return torch.stack(pasted)


# -- seeded weights under Detectron2's names ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What a seeded detector is made of; `stem` and `inner` are channels, `res2_out` those that the first stage puts out."""

    features: str
    mask: bool = True
    keypoint: bool = False
    depths: tuple[int, ...] = (1, 2, 1, 1)
    stem: int = 16
    inner: int = 8
    res2_out: int = 32
    groups: int = 1
    fpn: int = 32
    hidden: int = 64
    mask_channels: int = 16
    keypoint_channels: int = 16

    @property
    def classes(self) -> int:
        return 1 if self.keypoint else 80


class Seeded:
    """Collects weights layer by layer, scaled so that activations keep their size."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.state: State = {}

    def uniform(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=self.generator) * (high - low) + low

    def layer(self, name: str, c_out: int, *c_in: int, gain: float = 1.0) -> None:
        """A convolution (c_in, k, k) or linear layer (c_in,) with a bias."""
        self.state[f"{name}.weight"] = self.uniform(c_out, *c_in) * gain * math.sqrt(6 / math.prod(c_in))
        self.state[f"{name}.bias"] = self.uniform(c_out) * 0.1

    def normed(self, name: str, c_out: int, c_in: int, kernel: int, gain: float = 1.0) -> None:
        self.layer(name, c_out, c_in, kernel, kernel, gain=gain)
        del self.state[f"{name}.bias"]
        for key, low, high in (
            ("weight", 0.4, 0.7),
            ("bias", -0.2, 0.2),
            ("running_mean", -0.2, 0.2),
            ("running_var", 0.7, 1.3),
        ):
            self.state[f"{name}.norm.{key}"] = self.uniform(c_out, low=low, high=high)

    def stage(self, name: str, depth: int, c_in: int, inner: int, c_out: int, groups: int) -> None:
        for number in range(depth):
            block, entry = f"{name}.{number}", c_in if number == 0 else c_out
            if number == 0:
                self.normed(f"{block}.shortcut", c_out, entry, 1)
            self.normed(f"{block}.conv1", inner, entry, 1)
            self.normed(f"{block}.conv2", inner, inner // groups, 3)
            self.normed(f"{block}.conv3", c_out, inner, 1)


def seeded(shape: Shape) -> State:
    """The state dict of such a detector, with Detectron2's names, as Base-RCNN-{FPN,C4,DilatedC5} have them."""
    make = Seeded()
    prefix = "backbone.bottom_up." if shape.features == "fpn" else "backbone."
    make.normed(f"{prefix}stem.conv1", shape.stem, 3, 7, gain=1 / 60 if shape.groups == 1 else 1.0)
    outs = [shape.res2_out * 2**number for number in range(4)]
    for number, depth in enumerate(shape.depths):
        name = "roi_heads.res5" if number == 3 and shape.features == "c4" else f"{prefix}res{number + 2}"
        c_in = outs[number - 1] if number else shape.stem
        make.stage(name, depth, c_in, shape.inner * 2**number * shape.groups, outs[number], shape.groups)
    maps = {"fpn": shape.fpn, "c4": outs[2], "dc5": outs[3]}[shape.features]
    if shape.features == "fpn":
        for number, channels in enumerate(outs, start=2):
            make.layer(f"backbone.fpn_lateral{number}", shape.fpn, channels, 1, 1)
            make.layer(f"backbone.fpn_output{number}", shape.fpn, shape.fpn, 3, 3)
    anchors = 3 if shape.features == "fpn" else 15
    make.layer("proposal_generator.rpn_head.conv", maps, maps, 3, 3)
    make.layer("proposal_generator.rpn_head.objectness_logits", anchors, maps, 1, 1)
    make.layer("proposal_generator.rpn_head.anchor_deltas", 4 * anchors, maps, 1, 1, gain=0.2)
    hidden = outs[3]
    if shape.features != "c4":
        make.layer("roi_heads.box_head.fc1", shape.hidden, maps * 49)
        make.layer("roi_heads.box_head.fc2", shape.hidden, shape.hidden)
        hidden = shape.hidden
    make.layer("roi_heads.box_predictor.cls_score", shape.classes + 1, hidden)
    make.layer("roi_heads.box_predictor.bbox_pred", 4 * shape.classes, hidden, gain=0.5)
    if shape.mask:
        c_in = outs[3] if shape.features == "c4" else maps
        for number in range(1, 1 if shape.features == "c4" else 5):
            make.layer(f"roi_heads.mask_head.mask_fcn{number}", shape.mask_channels, c_in, 3, 3)
            c_in = shape.mask_channels
        make.layer("roi_heads.mask_head.deconv", c_in, shape.mask_channels, 2, 2)
        make.state["roi_heads.mask_head.deconv.bias"] = make.uniform(shape.mask_channels) * 0.1
        make.layer("roi_heads.mask_head.predictor", shape.classes, shape.mask_channels, 1, 1)
    if shape.keypoint:
        c_in = maps
        for number in range(1, 9):
            make.layer(f"roi_heads.keypoint_head.conv_fcn{number}", shape.keypoint_channels, c_in, 3, 3)
            c_in = shape.keypoint_channels
        make.layer("roi_heads.keypoint_head.score_lowres", c_in, 17, 4, 4, gain=3.0)
        make.state["roi_heads.keypoint_head.score_lowres.bias"] = make.uniform(17) * 0.1
    return make.state


def tuned(oracle: Oracle, image: Tensor) -> None:
    """Scale the predictors so that anchors and regions of `image` differ, as after training, and 60 regions hold something."""
    canvas, size = oracle.canvas(image)
    features, state = oracle.backbone(canvas), oracle.state
    for name, spread in (("objectness_logits", 2.0), ("anchor_deltas", 0.3)):
        values = torch.cat([parts[name == "anchor_deltas"].flatten() for parts in oracle.rpn(features)])
        state[f"proposal_generator.rpn_head.{name}.weight"] *= spread / values.std()
    logits, deltas = oracle.box_head(features, oracle.proposals(features, size))
    factor = 1.5 / logits.std(dim=0).mean()
    state["roi_heads.box_predictor.cls_score.weight"] *= factor
    state["roi_heads.box_predictor.cls_score.bias"] -= logits.mean(dim=0)
    state["roi_heads.box_predictor.cls_score.bias"] *= factor
    logits = (logits - logits.mean(dim=0)) * factor
    lead = logits[:, :-1].max(dim=1).values - logits[:, -1]
    state["roi_heads.box_predictor.cls_score.bias"][-1] += lead.topk(60).values[-1] - math.log(0.05)
    state["roi_heads.box_predictor.bbox_pred.weight"] /= deltas.std()


def narrow(preset: str, shape: Shape) -> ModelConfig:
    """The preset with Detectron2's conventions and the shape's few channels; it takes smaller images."""
    config = conventions(PRESETS[preset])
    backbone = config.backbone.model_copy(
        update={
            "depths": shape.depths,
            "widths": tuple(shape.res2_out // 4 * 2**number for number in range(4)),
            "stem_channels": shape.stem,
            "groups": shape.groups,
            "group_width": 64 * shape.inner * 4 // shape.res2_out,
        }
    )
    changes = {
        "backbone": backbone,
        "fpn_channels": shape.fpn,
        "box_hidden": shape.hidden,
        "mask_channels": (shape.mask_channels,) * len(config.mask_channels),
        "mask_deconv_channels": shape.mask_channels,
        "keypoint_channels": (shape.keypoint_channels,) * 8,
        "min_sizes": (SHORT,),
        "max_size": LONG,
    }
    return ModelConfig.model_validate(config.model_copy(update=changes).model_dump())


def as_pickle(state: State) -> bytes:
    """As the model zoo publishes it."""
    arrays = {key: tensor.numpy() for key, tensor in state.items()}
    return pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo", "matching_heuristics": True}, protocol=2)


SHAPES = {
    "maskrcnn_resnet50_fpn": Shape("fpn"),
    "maskrcnn_resnet50_c4": Shape("c4"),
    "maskrcnn_resnet50_dc5": Shape("dc5"),
    "keypointrcnn_resnet50_fpn": Shape("fpn", mask=False, keypoint=True),
    "maskrcnn_resnext101_32x8d_fpn": Shape("fpn", inner=4, groups=2),
}


@pytest.fixture(scope="module")
def photo(request: pytest.FixtureRequest, picture: Callable[..., Tensor]) -> Tensor:
    """A real image where there is one, else a generated one."""
    try:
        files = sorted((request.getfixturevalue("shared_data") / "coco_mini" / "val2017").glob("*.jpg"))
    except pytest.skip.Exception:
        return picture(333, 500, 3)
    with Image.open(files[1]) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


@pytest.fixture(scope="module")
def oracle_of(photo: Tensor) -> Callable[[str], Oracle]:
    """A narrow detector for a preset, tuned on the photo; built once."""
    built: dict[str, Oracle] = {}

    def build(preset: str) -> Oracle:
        if preset not in built:
            built[preset] = Oracle(seeded(SHAPES[preset]), SHAPES[preset].features, SHORT, LONG)
            with torch.inference_mode():
                tuned(built[preset], photo)
        return built[preset]

    return build


presets = pytest.mark.parametrize("preset", SHAPES)


def network_outputs(model: MaskRCNN, canvas: Tensor, boxes: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Features; logits and deltas of all anchors; class logits and deltas of these boxes."""
    network = model.network
    features = network.backbone(canvas)
    rpn = [part.flatten() for level in network.rpn.head(features) for part in level]
    box = network.box_head(network.box_input(features, Regions(boxes, torch.zeros(len(boxes), dtype=torch.int64))))
    return features, rpn, list(box)


@presets
@torch.inference_mode()
def test_features_and_logits_are_detectron2s(preset: str, photo: Tensor, oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of(preset)
    model = create_model(narrow(preset, SHAPES[preset]), weights=as_pickle(oracle.state))
    expected, size = oracle.canvas(photo)
    canvas = model._canvas([photo], SHORT)
    assert canvas.sizes.tolist() == [list(size)]
    torch.testing.assert_close(canvas.pixels, expected, rtol=0, atol=1e-5)
    their_features = oracle.backbone(expected)
    boxes = oracle.proposals(their_features, size)
    features, rpn, (logits, deltas) = network_outputs(model, canvas.pixels, boxes)
    for ours, theirs in zip(features, their_features, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(rpn, [part.flatten() for level in oracle.rpn(their_features) for part in level], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    their_logits, their_deltas = oracle.box_head(their_features, boxes)
    torch.testing.assert_close(logits, their_logits.roll(1, dims=1), rtol=0, atol=1e-4)
    torch.testing.assert_close(deltas[:, 1:].flatten(1), their_deltas, rtol=0, atol=1e-4)


def assert_equal(expected: dict[str, Tensor], found: Instances, ids: list[int]) -> None:
    """The same detections: 1e-4 of a score, 1e-3 pixels of a box, 0.05 of a keypoint, 1e-3 of a mask pixel's probability."""
    boxes, labels = expected["boxes"].numpy(), np.array(ids)[expected["classes"].numpy()]
    assert len(found) == len(boxes)
    distance = np.abs(boxes[:, None] - found.boxes[None]).max(axis=2)  # scores 1e-7 apart may change places
    distance[labels[:, None] != found.labels[None]] = np.inf
    order = distance.argmin(axis=1)
    assert sorted(order) == list(range(len(found)))
    np.testing.assert_allclose(found.boxes[order], boxes, rtol=0, atol=1e-3)
    np.testing.assert_allclose(found.scores[order], expected["scores"].numpy(), rtol=0, atol=1e-4)
    assert (found.rles is not None) == ("masks" in expected)
    assert (found.keypoints is not None) == ("keypoints" in expected)
    if "masks" in expected:
        different = 0
        for ours, probability in zip(order, expected["masks"].numpy(), strict=True):
            pasted = np.asfortranarray((probability >= 0.5).astype(np.uint8))
            mask = pycocotools.mask.decode({"size": list(pasted.shape), "counts": found.rles[ours]})
            assert np.all(np.abs(probability[mask != pasted] - 0.5) < 1e-3)
            different += found.rles[ours] != pycocotools.mask.encode(pasted)["counts"]
        assert different <= max(2, 0.1 * len(found))
    if "keypoints" in expected:
        theirs = expected["keypoints"].numpy()
        theirs[..., :2] -= 0.5  # as Detectron2 writes COCO's results
        np.testing.assert_allclose(found.keypoints[order][..., 2], theirs[..., 2], rtol=1e-3, atol=1e-6)
        apart = np.abs(found.keypoints[order][..., :2] - theirs[..., :2]).max(axis=2) > 0.05
        assert apart.sum() <= 0.002 * apart.size  # heat maps of two equal peaks


@presets
@torch.inference_mode()
def test_detections_are_detectron2s(
    preset: str, photo: Tensor, picture: Callable[..., Tensor], oracle_of: Callable[[str], Oracle], tmp_path: Path
) -> None:
    """From a file of the model zoo's kind, through our own checkpoint; in batches whose images do not disturb each other."""
    oracle, path = oracle_of(preset), tmp_path / "model_final.pkl"
    path.write_bytes(as_pickle(oracle.state))
    model = create_model(narrow(preset, SHAPES[preset]), weights=path)
    save_checkpoint(model, tmp_path / "ours.safetensors")
    images = [photo, picture(200, 300, 1), photo.flip(2), picture(97, 400, 3)]
    results = load_checkpoint(tmp_path / "ours.safetensors").predict(images)
    ids = [1] if "keypoint" in preset else COCO_IDS
    for image, found in zip(images, results, strict=True):
        assert_equal(oracle.predict(image), found, ids)
    assert len(results[0]) >= 10


def test_at_real_width_by_the_presets_name(photo: Tensor, tmp_path: Path) -> None:
    shape = Shape("fpn", True, False, (3, 4, 6, 3), 64, 64, 256, 1, 256, 1024, 256)
    oracle, strip = Oracle(seeded(shape), "fpn", 800, 1333), photo[:, 200:300]  # a quarter of the pixels, to be fast
    assert len(oracle.state) == 307
    with torch.inference_mode():
        tuned(oracle, strip)
        expected = oracle.predict(strip)
    path = tmp_path / "model_final_f10217.pkl"
    path.write_bytes(as_pickle(oracle.state))
    model = create_model("maskrcnn_resnet50_fpn", weights=path)
    assert model.config == conventions(PRESETS["maskrcnn_resnet50_fpn"])
    found = model.predict([strip])[0]
    assert_equal(expected, found, COCO_IDS)
    assert len(found) >= 10


# -- what a file may hold ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "depths", "count"),
    [
        ("maskrcnn_resnet50_c4", (3, 4, 6, 3), 279),
        ("maskrcnn_resnet50_fpn", (3, 4, 6, 3), 307),
        ("maskrcnn_resnext101_32x8d_fpn", (3, 4, 23, 3), 562),
        ("keypointrcnn_resnet50_fpn", (3, 4, 6, 3), 313),
    ],
)
def test_every_weight_finds_its_place(preset: str, depths: tuple[int, ...], count: int) -> None:
    """As many keys as the files of the zoo have."""
    shape = replace(SHAPES[preset], depths=depths)
    state = seeded(shape)
    assert len(state) == count
    own = create_model(narrow(preset, shape), weights=as_pickle(state)).network.state_dict()
    assert len(own) == count


def as_pth(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_a_pth_with_the_constants_of_old_files_is_the_same(oracle_of: Callable[[str], Oracle]) -> None:
    state = oracle_of("maskrcnn_resnet50_c4").state
    config = narrow("maskrcnn_resnet50_c4", SHAPES["maskrcnn_resnet50_c4"])
    constants = {"pixel_mean": PIXEL_MEAN, "pixel_std": torch.ones(3, 1, 1)}
    constants["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(15, 4)
    saved = as_pth({"model": {**state, **constants}, "iteration": 89999})
    model = create_model(config, weights=saved)
    assert model.model_id == create_model(config, weights=as_pickle({**constants, **state})).model_id


def test_classes_are_the_data_sets_and_the_background_comes_first(oracle_of: Callable[[str], Oracle]) -> None:
    state = oracle_of("maskrcnn_resnet50_fpn").state
    config = narrow("maskrcnn_resnet50_fpn", SHAPES["maskrcnn_resnet50_fpn"])
    assert [category.id for category in config.categories] == COCO_IDS
    own = create_model(config, weights=as_pickle(state)).network.state_dict()
    theirs = {name: state[f"roi_heads.{name}"] for name in ("box_predictor.cls_score.bias", "box_predictor.bbox_pred.bias")}
    assert torch.equal(own["box_head.cls_score.bias"][0], theirs["box_predictor.cls_score.bias"][80])
    assert torch.equal(own["box_head.cls_score.bias"][1:], theirs["box_predictor.cls_score.bias"][:80])
    assert torch.equal(own["box_head.bbox_pred.bias"][4:], theirs["box_predictor.bbox_pred.bias"])
    assert torch.equal(own["mask_head.logits.weight"][1:], state["roi_heads.mask_head.predictor.weight"])
    assert not own["box_head.bbox_pred.weight"][:4].any()


def test_one_mask_for_all_classes_stays_one() -> None:
    state = seeded(SHAPES["maskrcnn_resnet50_fpn"])
    for kind in ("weight", "bias"):
        state[f"roi_heads.mask_head.predictor.{kind}"] = state[f"roi_heads.mask_head.predictor.{kind}"][:1]
    config = narrow("maskrcnn_resnet50_fpn", SHAPES["maskrcnn_resnet50_fpn"])
    own = create_model(config.model_copy(update={"mask_output": "agnostic"}), weights=as_pickle(state)).network.state_dict()
    assert torch.equal(own["mask_head.logits.weight"], state["roi_heads.mask_head.predictor.weight"])


def test_missing_and_foreign_keys_are_listed() -> None:
    state = seeded(SHAPES["maskrcnn_resnet50_fpn"])
    state["roi_heads.cascade.0.weight"] = state.pop("roi_heads.mask_head.deconv.weight")
    config = narrow("maskrcnn_resnet50_fpn", SHAPES["maskrcnn_resnet50_fpn"])
    with pytest.raises(CheckpointError, match=r"it lacks mask_head\.deconv\.weight; the model has no roi_heads\.cascade\.0"):
        create_model(config, weights=as_pickle(state))
    numbers = {**seeded(SHAPES["maskrcnn_resnet50_fpn"]), "roi_heads.mask_head.predictor.bias": torch.tensor(1.0)}
    with pytest.raises(CheckpointError, match=r"of another shape are mask_head\.logits\.bias \(\) instead of \(81,\)"):
        create_model(config, weights=as_pickle(numbers))
    few = (Category(id=1, name="a"), Category(id=2, name="b"))
    with pytest.raises(CheckpointError, match=r"trained on 80 categories, and model .* here has 2; "):
        create_model(config, weights=as_pickle(seeded(SHAPES["maskrcnn_resnet50_fpn"])), categories=few)


# -- conventions -------------------------------------------------------------------------------------------------------


def test_the_conventions_are_the_zoos_configurations() -> None:
    """Base-RCNN-FPN, -C4, -DilatedC5, Base-Keypoint-RCNN-FPN and the X101 configurations."""
    fpn, c4, dc5 = (conventions(PRESETS[f"maskrcnn_resnet50_{kind}"]) for kind in ("fpn", "c4", "dc5"))
    keypoint = conventions(PRESETS["keypointrcnn_resnet50_fpn"])
    resnext = conventions(PRESETS["maskrcnn_resnext101_32x8d_fpn"])

    def counts(config: ModelConfig) -> tuple[int, ...]:
        before, after = "rpn_pre_nms", "rpn_post_nms"
        return tuple(getattr(config, f"{when}_{mode}") for mode in ("train", "test") for when in (before, after))

    assert counts(fpn) == counts(resnext) == (2000, 1000, 1000, 1000)
    assert counts(keypoint) == (2000, 1500, 1000, 1000)
    assert counts(c4) == counts(dc5) == (12000, 2000, 6000, 1000)
    assert [config.canvas_divisor for config in (fpn, c4, dc5)] == [32, 1, 1]
    assert [config.backbone.stride_in for config in (fpn, c4, dc5, resnext)] == ["1x1", "1x1", "1x1", "3x3"]
    assert (fpn.image_std, resnext.image_std) == ((1.0, 1.0, 1.0), (57.375, 57.12, 58.395))
    assert (c4.box_pool, c4.roi_stage_stride, c4.box_layers, dc5.box_pool, dc5.box_layers) == (14, 2, 0, 7, 2)
    assert keypoint.categories == (PERSON,)
    for config in (fpn, c4, dc5, keypoint, resnext):
        assert ModelConfig.model_validate_json(config.model_dump_json()) == config


def test_anchors_of_one_map_are_size_by_size(oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of("maskrcnn_resnet50_c4")
    config = narrow("maskrcnn_resnet50_c4", SHAPES["maskrcnn_resnet50_c4"])
    expected = oracle.anchors([torch.zeros(1, 1, 1, 1)])[0]
    cells = cell_anchors(config.anchor_sizes[0], config.anchor_ratios, config.anchor_rounding, config.anchor_order)
    torch.testing.assert_close(cells, expected, rtol=1e-6, atol=0)


def levels(boxes: Tensor, config: ModelConfig) -> Tensor:
    with torch.device("meta"):
        network = build_network(config)
    return network.box_features.levels(boxes)


def test_a_level_changes_where_detectron2s_does() -> None:
    config = conventions(PRESETS["maskrcnn_resnet50_fpn"])
    sides = torch.tensor([0.0, 111.9999, 112.0, 224.0, 447.99, 448.0, 5000.0])
    boxes = torch.stack([torch.zeros(7), torch.zeros(7), sides, sides], dim=1)
    assert levels(boxes, config).tolist() == [0, 0, 1, 2, 2, 3, 3]
    # 1e-6 behind the logarithm reaches further below a power of two than 1e-8 within it.
    nearly = torch.tensor([[0.0, 0.0, 223.9999, 223.9999]])
    assert levels(nearly, config).tolist() == [1]
    assert levels(nearly, PRESETS["maskrcnn_resnet50_fpn"]).tolist() == [2]


def test_logits_rank_proposals_whose_probabilities_are_one() -> None:
    """Of float32 sigmoids, 20 and 30 are the same."""
    config = narrow("maskrcnn_resnet50_c4", SHAPES["maskrcnn_resnet50_c4"]).model_copy(update={"rpn_post_nms_test": 1})
    features, deltas = [torch.zeros(1, 1, 4, 4)], torch.zeros(1, 240, 4)
    logits = torch.full((1, 240), 20.0)
    logits[0, 15 * 5 + 1] = 30.0  # the square anchor of 32 pixels at the cell (1, 1)
    sizes = torch.tensor([[64.0, 64.0]])
    rpn = MaskRCNN(config).eval().network.rpn
    assert rpn.propose(features, [(logits, deltas)], (64, 64), sizes).boxes.tolist() == [[0, 0, 32, 32]]
    assert float(torch.tensor(20.0).sigmoid()) == 1.0


@pytest.mark.parametrize(("least", "thin"), [(0.0, True), (1e-3, False)])
def test_proposals_stay_however_thin_and_go_when_empty(least: float, thin: bool) -> None:
    config = narrow("maskrcnn_resnet50_c4", SHAPES["maskrcnn_resnet50_c4"])
    assert config.rpn_min_side == 0.0
    deltas = torch.zeros(1, 240, 4)
    deltas[0, 15 * 5 + 1, 2] = -13.0  # exp(-13) of 32 pixels
    deltas[0, 1, 0] = -3.0  # beyond the left border
    rpn = MaskRCNN(config.model_copy(update={"rpn_min_side": least})).eval().network.rpn
    found = rpn.propose([torch.zeros(1, 1, 4, 4)], [(torch.zeros(1, 240), deltas)], (64, 64), torch.tensor([[64.0, 64.0]]))
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    assert sides.min() > 0
    assert bool(sides.min() < 1e-3) == thin


def test_detections_stay_however_thin() -> None:
    regions = Regions(torch.tensor([[10.0, 10, 10.005, 30]]), torch.tensor([0]))
    logits = F.one_hot(torch.tensor([3]), 91).float() * 10
    for config, count in ((conventions(PRESETS["fasterrcnn_resnet50_fpn"]), 1), (PRESETS["fasterrcnn_resnet50_fpn"], 0)):
        settings, sizes = resolve(PredictOptions(), config), torch.tensor([[64.0, 64.0]])
        coder = BoxCoder(config.box_delta_weights, config.delta_clamp)
        found = select(logits, torch.zeros(1, 91, 4), regions, sizes, coder, config.box_min_side, settings)
        assert len(found.boxes) == count


def test_boxes_outside_the_image_are_dropped_at_the_end() -> None:
    """A box that clipping leaves without an area takes part in everything else, and is not reported."""
    config = conventions(PRESETS["fasterrcnn_resnet50_fpn"])
    boxes = torch.tensor([[10.0, 10, 50, 50], [100.0, 0, 100, 20], [0, 0, 200, 80]])
    scores, ones = torch.tensor([0.9, 0.8, 0.7]), torch.ones(3, dtype=torch.int64)
    found = Detections(boxes, scores, classes=ones, images=0 * ones)
    canvas = Canvas(
        torch.zeros(1, 3, 96, 128), torch.tensor([[80.0, 100.0]]), torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.5]])
    )
    result = to_instances(found, canvas, [(40, 50)], np.arange(2), config, 0.5)[0]
    assert result.boxes.tolist() == [[5, 5, 25, 25], [0, 0, 50, 40]]
    assert result.scores.tolist() == pytest.approx([0.9, 0.7])


@pytest.mark.parametrize("preset", ["maskrcnn_resnet50_c4", "maskrcnn_resnet50_fpn"])
def test_a_result_does_not_depend_on_its_batch_mates(
    preset: str, picture: Callable[..., Tensor], oracle_of: Callable[[str], Oracle]
) -> None:
    """Canvases that differ by a pixel are never padded to one."""
    model = create_model(narrow(preset, SHAPES[preset]), weights=as_pickle(oracle_of(preset).state))
    images = [picture(256, 300, 1), picture(256, 301, 2), picture(300, 256, 3), picture(256, 300, 4)]
    batches = sorted(sorted(batch) for batch in model._batches(images, 4))
    assert batches == ([[0, 3], [1], [2]] if preset.endswith("c4") else [[0, 1, 3], [2]])
    together = model.predict(images)
    for image, found in zip(images, together, strict=True):
        alone = model.predict([image])[0]
        np.testing.assert_array_equal(found.boxes, alone.boxes)
        assert found.rles == alone.rles


@pytest.mark.parametrize("preset", SHAPES)
def test_a_step_of_training(preset: str, photo: Tensor, oracle_of: Callable[[str], Oracle]) -> None:
    model = create_model(narrow(preset, SHAPES[preset]), weights=as_pickle(oracle_of(preset).state)).train()
    height, width = photo.shape[1:]
    masks = torch.zeros(1, height, width, dtype=torch.uint8)
    masks[0, 50:200, 40:180] = 1
    target = Target(
        boxes=torch.tensor([[40.0, 50, 180, 200]]),
        labels=torch.tensor([1]),
        masks=masks,
        keypoints=torch.tensor([[[100.0, 120, 2]] * 17]),
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = model([photo, photo[:, :, : width // 2]], [target, target_of_half(target, width // 2)])
    sum(losses.values()).backward()
    optimizer.step()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if name in before)


def target_of_half(target: Target, width: int) -> Target:
    """The same object in the left half of its image."""
    return replace(target, masks=target.masks[:, :, :width])


def test_keypoints_are_learnt_half_a_pixel_further(photo: Tensor) -> None:
    config = narrow("keypointrcnn_resnet50_fpn", SHAPES["keypointrcnn_resnet50_fpn"])
    canvas = make_canvas([photo], config, SHORT, torch.device("cpu"))
    target = Target(torch.tensor([[0.0, 0, 90, 90]]), torch.tensor([1]), keypoints=torch.full((1, 17, 3), 2.0))
    spec = TargetSpec(config.preset, {1: 1}, masks=False, keypoints=17, keypoint_offset=config.keypoint_offset)
    truth = truth_on_canvas([target], canvas, spec)[0]
    ratio = canvas.ratios[0].flip(0)
    torch.testing.assert_close(truth.keypoints[0, 0], torch.cat([2.5 / ratio, torch.tensor([2.0])]))
