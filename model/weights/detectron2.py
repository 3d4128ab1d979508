"""Detectron2's checkpoints: the pickles of its model zoo, their names as ours, and their numerical conventions.

Supports the ResNet and ResNeXt models of the zoo's Base-RCNN configurations (Faster, Mask and Keypoint R-CNN with FPN, C4 and
dilated C5), at Detectron2's commit 02b5c4e. A pickle is a program: here it is run with stand-ins that create arrays of numbers
and nothing else, so that no class or function that an untrusted file names is ever called.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from masklake.model.coco_categories import COCO_CATEGORIES, COCO_RAW_CATEGORIES
from masklake.model.config import ModelConfig
from masklake.model.errors import CheckpointError
from masklake.model.weights.checkpoint import renamed

_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of the oldest format of `torch.save`, which is a pickle, too, but is read by torch."""

_NUMBERS = re.compile(r"[fiu][1248]|b1")

_MARKS = ("proposal_generator.", "backbone.bottom_up.", "backbone.stem.")
_IGNORED = re.compile(r"pixel_(mean|std)$|proposal_generator\.anchor_generator\.cell_anchors\.")
"""Constants that old files hold and new ones do not."""

_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"backbone\.(?:bottom_up\.)?stem\.conv1\.norm\.", "backbone.body.stem.1."),
        (r"backbone\.(?:bottom_up\.)?stem\.conv1\.", "backbone.body.stem.0."),
        (r"proposal_generator\.rpn_head\.conv\.", "rpn.head.convs.0."),
        (r"proposal_generator\.rpn_head\.objectness_logits\.", "rpn.head.objectness."),
        (r"proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.head.deltas."),
        (r"roi_heads\.box_predictor\.", "box_head."),
        (r"roi_heads\.mask_head\.deconv\.", "mask_head.deconv."),
        (r"roi_heads\.mask_head\.predictor\.", "mask_head.logits."),
        (r"roi_heads\.keypoint_head\.score_lowres\.", "keypoint_head.deconv."),
    )
)
_BLOCK = re.compile(r"(?:backbone\.(?:bottom_up\.)?|roi_heads\.(?=res5))res(\d)\.(\d+)\.(conv[123]|shortcut)\.(norm\.)?")
_BLOCK_PARTS = {"conv1": "reduce", "conv2": "spatial", "conv3": "expand", "shortcut": "shortcut"}
_PYRAMID = re.compile(r"backbone\.fpn_(lateral|output)(\d)\.")
_NUMBERED = re.compile(r"roi_heads\.(box_head\.fc|mask_head\.mask_fcn|keypoint_head\.conv_fcn)(\d)\.")
_NUMBERED_PARTS = {"box_head.fc": "box_head.hidden.{}.", "mask_head.mask_fcn": "mask_head.convs.{}.0."}
_NUMBERED_PARTS |= {"keypoint_head.conv_fcn": "keypoint_head.convs.{}.0."}

_ALWAYS: dict[str, Any] = {
    "image_channels": "bgr",
    "image_divisor": 1.0,
    "image_mean": (103.53, 116.28, 123.675),
    "resize": "pil",
    "anchor_rounding": False,
    "anchor_order": "size",
    "anchor_stride": "fixed",
    "rpn_rank": "logit",
    "rpn_post_nms_train": 1000,
    "rpn_post_nms_test": 1000,
    "rpn_min_side": 0.0,
    "roi_level_rule": "detectron2",
    "roi_aligned": True,
    "roi_sampling_ratio": 0,
    "roi_samples": 512,
    "box_min_side": 0.0,
    "clip_to_image": True,
    "paste": "detectron2",
    "keypoint_score": "probability",
    "keypoint_offset": 0.5,
}
_ONE_MAP: dict[str, Any] = {"canvas_divisor": 1, "rpn_post_nms_train": 2000}
_C4: dict[str, Any] = {"box_pool": 14, "roi_stage_stride": 2}
_MSRA: dict[str, Any] = {"image_std": (1.0, 1.0, 1.0)}
"""R50 and R101: the original networks, with the pixels' deviation in the weights of their first layer."""
_RESNEXT: dict[str, Any] = {"image_std": (57.375, 57.12, 58.395)}


def conventions(config: ModelConfig) -> ModelConfig:
    """Returns `config` with Detectron2's numerical conventions, and the 80 categories of COCO instead of torchvision's 90
    ids.
    """
    plain = config.backbone.groups == 1
    changes = _ALWAYS | (_MSRA if plain else _RESNEXT)
    if config.features != "fpn":
        changes |= _ONE_MAP
    elif config.keypoint:
        changes |= {"rpn_post_nms_train": 1500}
    if config.features == "c4":
        changes |= _C4
    if config.categories == COCO_RAW_CATEGORIES:
        changes |= {"categories": COCO_CATEGORIES}
    backbone = config.backbone.model_copy(update={"stride_in": "1x1" if plain else "3x3", "norm_eps": 1e-5})
    return config.model_copy(update={**changes, "backbone": backbone})


def is_theirs(state: Mapping[str, Tensor]) -> bool:
    """Returns whether these are the names of a Detectron2 detector."""
    return any(key.startswith(_MARKS) for key in state)


def our_name(key: str) -> str:
    """Returns MaskLake's name of a Detectron2 weight; names of unknown parts are returned unchanged."""
    if match := _BLOCK.match(key):
        stage, block, part, norm = match.groups()
        place = "roi_stage" if key.startswith("roi_heads.") else f"backbone.body.stages.{int(stage) - 2}"
        return f"{place}.{block}.{_BLOCK_PARTS[part]}.{1 if norm else 0}.{key[match.end() :]}"
    if match := _PYRAMID.match(key):
        return f"backbone.fpn.{match[1]}.{int(match[2]) - 2}.0.{key[match.end() :]}"
    if match := _NUMBERED.match(key):
        return _NUMBERED_PARTS[match[1]].format(int(match[2]) - 1) + key[match.end() :]
    for pattern, name in _RULES:
        if pattern.match(key):
            return pattern.sub(name, key, count=1)
    return key


def rename(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Returns the state dict with MaskLake's names and order of classes, for the model of `config`.

    In Detectron2 the background is the last class and has no boxes or masks; here it is the first, and its boxes and masks are
    zero.
    """
    ours = renamed({key: tensor for key, tensor in state.items() if not _IGNORED.match(key)}, our_name)
    changes: dict[str, Callable[[Tensor], Tensor]]
    changes = {"box_head.cls_score": _last_first, "box_head.bbox_pred": partial(_after_zeros, 4)}
    if config.mask_output != "agnostic":
        changes["mask_head.logits"] = partial(_after_zeros, 1)
    for layer, change in changes.items():
        for key in (f"{layer}.weight", f"{layer}.bias"):
            if key in ours and ours[key].dim():  # a single number is refused later, for its shape
                ours[key] = change(ours[key])
    return ours


def _last_first(rows: Tensor) -> Tensor:
    return rows.roll(1, dims=0)


def _after_zeros(count: int, rows: Tensor) -> Tensor:
    return torch.cat([rows.new_zeros(count, *rows.shape[1:]), rows])


def is_pickle(data: bytes) -> bool:
    """Returns whether these bytes start like a pickle that is not torch's."""
    return data.startswith(b"\x80") and not data.startswith(_TORCH_MAGIC)


def read_pickle(data: bytes, name: str) -> dict[str, Tensor]:
    """Returns the tensors of a model zoo file, `{"model": {name: array}, ...}`; only arrays of numbers are created.

    Raises CheckpointError for anything else, and for files that are truncated or damaged.
    """
    try:
        _check_memo(data)
        content: Any = _Reader(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # whatever the bytes make of the reader
        raise CheckpointError(
            f"{name} is neither a MaskLake checkpoint nor a state dict of numpy arrays as in Detectron2's model zoo, or it is "
            f"damaged ({error}); other objects are refused, since reading them could run code"
        ) from error
    model = content.get("model") if isinstance(content, dict) else None
    arrays = {key: getattr(value, "numbers", value) for key, value in model.items()} if isinstance(model, dict) else {}
    if not arrays or not all(isinstance(numbers, np.ndarray) for numbers in arrays.values()):
        raise CheckpointError(f"{name} is no Detectron2 checkpoint: expected numpy arrays by name under the key 'model'")
    return {str(key): torch.from_numpy(numbers) for key, numbers in arrays.items()}


def _check_memo(data: bytes) -> None:
    """Raises UnpicklingError for an object number above the file's length: the reader would allocate that many entries."""
    for operation, number, _ in pickletools.genops(data):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and number is not None and int(number) > len(data):
            raise pickle.UnpicklingError(f"it remembers an object number {number}")


class _StandIn:
    """Base class of the stand-ins for classes that a pickle names. A pickle that sets attributes of a class is refused."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"state for {type(self).__name__}")


class _Kind(_StandIn):
    """Stands in for `numpy.dtype`, for numbers only."""

    def __init__(self, code: str, *_: Any) -> None:
        if not _NUMBERS.fullmatch(code):
            raise pickle.UnpicklingError(f"values of type {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        """Sets the byte order. state: version, byte order, and fields of structured types."""
        self.dtype = self.dtype.newbyteorder(state[1])

    def read(self, data: bytes | str, shape: tuple[int, ...], order: Any) -> NDArray[Any]:
        raw = data.encode("latin1") if isinstance(data, str) else data  # Python 2's bytes come as text
        return np.frombuffer(raw, self.dtype).reshape(shape, order=order).astype(self.dtype.newbyteorder("="), order="C")


class _Array(_StandIn):
    """Stands in for `numpy.core.multiarray._reconstruct`: an array, empty until its state is set."""

    def __init__(self, *_: Any) -> None:
        self.numbers: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        """Sets the numbers. state: version, shape, dtype, whether in Fortran order, bytes."""
        _, shape, kind, fortran, data = state
        self.numbers = kind.read(data, shape, "F" if fortran else "C")


class _View(_StandIn):
    """Stands in for `numpy._core.numeric._frombuffer`, with which protocol 5 writes an array."""

    def __new__(cls, data: bytes | bytearray, kind: _Kind, shape: tuple[int, ...], order: str) -> Any:
        if not isinstance(data, bytes | bytearray):
            raise pickle.UnpicklingError(f"an array made of {type(data).__name__}")
        return kind.read(bytes(data), shape, order)


class _Scalar(_StandIn):
    """Stands in for `numpy.core.multiarray.scalar`."""

    def __new__(cls, kind: _Kind, data: bytes | str) -> Any:
        return kind.read(data, (), "C")


class _Bytes(_StandIn):
    """Stands in for `_codecs.encode`, with which protocol 2 writes bytes, and for `bytes` without arguments, for empty ones."""

    def __new__(cls, text: str = "", encoding: str = "latin1") -> Any:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
        return text.encode("latin1")


_STAND_INS: Mapping[tuple[str, str], type] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _View for core in ("core", "_core")},
    ("_codecs", "encode"): _Bytes,
    ("__builtin__", "bytes"): _Bytes,
    ("collections", "OrderedDict"): OrderedDict,
}


class _Reader(pickle.Unpickler):
    """An unpickler that looks up the stand-ins and no other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns the stand-in. Raises UnpicklingError for any other name."""
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None
