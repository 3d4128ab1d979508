"""Checkpoints: one safetensors file with the weights, and the configuration as JSON in its metadata.

Nothing is unpickled: reading an untrusted file executes none of its code.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from masklake.model.config import ModelConfig
from masklake.model.devices import check_device
from masklake.model.errors import CheckpointError, faults
from masklake.model.identity import COUNTER
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.wording import agreeing, counted

FORMAT = "masklake/1"
LISTED = 20  # maximum number of keys in a message
_NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BY_CLASS = ("box_head.cls_score.", "box_head.bbox_pred.", "mask_head.logits.", "keypoint_head.deconv.")
"""Layers whose shape depends on the categories: on their number, and on their keypoints."""
_HEADER_LIMIT = 100_000_000  # bytes; safetensors' own


def dumps(model: MaskRCNN) -> bytes:
    """Returns the model as the bytes of a checkpoint file: equal models give equal bytes."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
    return _with_metadata(save_tensors(state), {"format": FORMAT, "config": model.config.model_dump_json()})


def _with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """Returns safetensors bytes with this metadata, in this order: safetensors itself writes it in a random one."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": metadata, **json.loads(data[8:start])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # as safetensors does, so that the weights are aligned
    return b"".join((len(header).to_bytes(8, "little"), header, memoryview(data)[start:]))


def save_checkpoint(model: MaskRCNN, path: str | Path) -> None:
    """Writes the model to one file, which appears under its name only when it is complete and on disk.

    Raises CheckpointError if the folder cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # its own: two processes may write one checkpoint
    try:
        try:
            with partial.open("xb") as file:
                file.write(dumps(model))
                file.flush()
                os.fsync(file.fileno())  # or a power cut may leave the new name on an empty file
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoint {path}: {error.strerror or error}") from error


def load_checkpoint(source: str | Path | bytes, device: str | torch.device = "cpu", name: str | None = None) -> MaskRCNN:
    """Returns the model of a checkpoint file, or of its bytes, ready to predict. name: name of the checkpoint in messages.

    Raises CheckpointError for a file that is missing, truncated, from another program, or of another architecture, and
    ConfigError for a device that this machine cannot use.
    """
    device = check_device(device)
    name = name or ("checkpoint" if isinstance(source, bytes) else f"checkpoint {source}")
    config, state = parse_checkpoint(read_bytes(source), name)
    model = MaskRCNN(config)
    load_state(model, state, name)
    return model.to(device).eval()


def read_bytes(source: str | Path | bytes) -> bytes:
    """Returns the content of the file. Raises CheckpointError if there is none."""
    if isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint at {source}") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"cannot read checkpoint {source}: it is a folder; name a file in it") from error
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {source}: {error.strerror}") from error


def is_ours(data: bytes) -> bool:
    """Returns whether these bytes start like a safetensors file that MaskLake wrote."""
    return metadata(data).get("format") == FORMAT


def has_safetensors_header(data: bytes) -> bool:
    """Returns whether these bytes start like a safetensors file of any program: the length of a header, and its first brace."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= _HEADER_LIMIT


def parse_checkpoint(data: bytes, name: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Returns configuration and weights from the bytes of a checkpoint. name: name of the checkpoint in messages.

    Raises CheckpointError for bytes that are damaged, or not a MaskLake checkpoint.
    """
    header = metadata(data)
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{name} is not a MaskLake checkpoint (safetensors of format {FORMAT!r}); "
            "convert other weights with `masklake convert`"
        )
    try:
        return ModelConfig.model_validate_json(header["config"]), load_tensors(data)
    except SafetensorError as error:
        raise CheckpointError(f"{name} is cut off or damaged: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{name} has no configuration") from error
    except ValidationError as error:
        raise CheckpointError(f"{name} has no configuration that this version can read: {faults(error)}") from error


def metadata(data: bytes) -> Mapping[str, str]:
    """Returns the metadata of safetensors bytes (8 bytes of header length, then the header as JSON); empty if there is none."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > _HEADER_LIMIT:
        return {}
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return {}
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def renamed(state: Mapping[str, Tensor], our_name: Callable[[str], str]) -> dict[str, Tensor]:
    """Returns another system's weights under our names. Raises CheckpointError if two of its names become one of ours."""
    theirs: dict[str, str] = {}
    for key in state:
        if (first := theirs.setdefault(our_name(key), key)) != key:
            raise CheckpointError(f"the weights hold one thing under two names: {first} and {key}")
    return {ours: state[key] for ours, key in theirs.items()}


def load_state(model: MaskRCNN, state: Mapping[str, Tensor], name: str, recorded: str | None = None) -> None:
    """Loads weights into a model that has exactly these weights; otherwise raises CheckpointError as in `check_state`.

    Counters of batches, which are not weights, are ignored: frozen norms have none, nor do old files.
    """
    check_state(model, state, name, recorded)
    state = {key: tensor for key, tensor in state.items() if not key.endswith(COUNTER)}
    if strange := sorted(key for key, tensor in state.items() if not _is_weight(tensor)):
        raise CheckpointError(f"{name} holds other things than dense tensors of finite real numbers: {listed(strange)}")
    model.network.load_state_dict(state, strict=False)


def check_state(model: MaskRCNN, state: Mapping[str, Tensor], name: str, recorded: str | None = None) -> None:
    """Raises CheckpointError, which names what does not fit, unless the model has exactly these weights by name and shape.

    Both may be on the meta device. recorded: the preset that a MaskLake checkpoint of these weights records, which best
    explains why they do not fit another one.
    """
    own = {key: tensor for key, tensor in model.network.state_dict().items() if not key.endswith(COUNTER)}
    state = {key: tensor for key, tensor in state.items() if not key.endswith(COUNTER)}
    wrong = [key for key in sorted(own.keys() & state.keys()) if own[key].shape != state[key].shape]
    complaints = {
        "it lacks": sorted(own.keys() - state.keys()),
        "the model has no": sorted(state.keys() - own.keys()),
        "of another shape are": [f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" for key in wrong],
    }
    found = [f"{what} {listed(keys)}" for what, keys in complaints.items() if keys]
    if state and not own.keys() & state.keys():
        raise CheckpointError(
            f"{name} is of another architecture than model {model.config.preset!r}, and of none that is known: the names in "
            f"it are no layers' of a Mask R-CNN ({listed(sorted(state))}). docs/models.md lists what can be taken"
        )
    another = recorded not in (None, model.config.preset)
    if not another and (recorded or own.keys() == state.keys()) and all(key.startswith(BY_CLASS) for key in wrong):
        _check_classes(model.config, own, state, name)
    if found:
        origin = f"a MaskLake checkpoint of preset {recorded!r} (use --preset {recorded}), " if another else ""
        lost = not another and model.config.keypoint and "keypoint" not in model.config.tasks
        remedy = (
            "; its categories have keypoints: give `masklake convert --categories` a COCO JSON file that names them"
            if lost and any(key.startswith("keypoint_head.") for key in state)
            else ""
        )
        raise CheckpointError(
            f"{name} is {origin}of another architecture than model {model.config.preset!r}: {'; '.join(found)}{remedy}"
        )


def _is_weight(tensor: Tensor) -> bool:
    """Returns whether all values are finite real numbers in a dense tensor: others cannot be copied without loss."""
    dense = tensor.dtype in _NUMBERS and tensor.layout == torch.strided and not tensor.is_meta
    return dense and bool(tensor.isfinite().all())


def _check_classes(config: ModelConfig, own: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str) -> None:
    key = "box_head.cls_score.bias"
    if key in state and state[key].dim() == 1 and state[key].shape != own[key].shape:
        begin = "begin new last layers with `masklake train --reset-predictors`"
        theirs, ours = len(state[key]) - 1, len(config.categories)
        if theirs < 1:
            raise CheckpointError(
                f"{name}: has no category beside the background ({key} is of shape {tuple(state[key].shape)}), so it finds "
                f"nothing; {begin} (from Python: reset_predictors=True)"
            )
        raise CheckpointError(
            f"{name}: trained on {counted(theirs, 'category')}, and model {config.preset!r} here has {ours}; name "
            f"{agreeing(theirs, 'the one', f'the {theirs}')} of the weights, without the background, with `masklake convert "
            f"--categories FILE`, or {begin} (from Python: categories=, reset_predictors=True)"
        )


def listed(keys: Sequence[str]) -> str:
    """Returns the first `LISTED` names, and how many more there are."""
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return f"{', '.join(keys[:LISTED])}{more}"
