"""Reads weight files of other programs: returns their tensors by name, or raises an error that says what the file is.

Supports state dicts and training checkpoints of `torch.save`, alone or wrapped, safetensors, and the pickles of Detectron2's
model zoo. No code in a file is executed: only tensors are read, and other content, such as a run's options, becomes an empty
stand-in.
"""

from __future__ import annotations

import argparse
import io
import re
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from masklake.model.errors import CheckpointError
from masklake.model.plain_text import is_text
from masklake.model.weights.checkpoint import has_safetensors_header, listed
from masklake.model.weights.detectron2 import is_pickle, read_pickle

NESTED = (
    *("model", "state_dict", "model_state_dict", "model_state", "weights", "network", "net", "module", "params"),
    *("model_ema", "ema", "ema_model", "ema_state_dict", "state_dict_ema"),
)
"""Keys of a training checkpoint under which the weights may be; averaged ones are used if there are no others."""
_DEPTH = 4  # dictionaries within dictionaries

_TRANSPARENT = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names that `torch.compile` and FSDP insert for the modules that they wrap."""

_FIRST_LAYERS = tuple(
    f"backbone.{layer}.weight" for layer in ("body.conv1", "bottom_up.stem.conv1", "stem.conv1", "body.stem.0")
)
CLASSIFIER = ("conv1.weight", "layer1.0.conv1.weight", "fc.weight")
"""Names in the state dict of a residual network that classifies images, which no detector has."""

_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, not the file that it stands for: fetch that (git lfs pull)",
    ),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras and TensorFlow write them"),
    (b"GGUF", "a GGUF file of a language model"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"\xfd7zXZ\0", "compressed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
    (b"BZh", "compressed by bzip2: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"%PDF", "a PDF document"),
)


def read_state(data: bytes, name: str) -> dict[str, Tensor]:
    """Returns the tensors of another program's file, by its names, without the prefixes of wrappers (`module.`, `_orig_mod.`,
    `model.`).

    name: name of the file in messages. Raises CheckpointError, which says what the file is, if it contains no weights.
    """
    if (what := what_it_is(data)) is not None:
        raise CheckpointError(f"{name} is neither a MaskLake checkpoint nor a state dict of tensors: it is {what}")
    if has_safetensors_header(data):
        return unwrapped(_read_safetensors(data, name), name)
    return unwrapped(read_pickle(data, name) if is_pickle(data) else read_pth(data, name), name)


# -- containers --------------------------------------------------------------------------------------------------------


def what_it_is(data: bytes) -> str | None:
    """Returns a description of these bytes if they are known not to be weights, else None."""
    if not data:
        return "empty"
    for beginning, what in _BEGINNINGS:
        if data.startswith(beginning):
            return what
    text = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "a web page (HTML), as servers send instead of a file that they do not give out: download it again"
    if text.startswith(b"<?xml"):
        return "an XML document, as object stores send instead of a file that they do not give out: download it again"
    if data[4:8] == b"TFL3":
        return "a TensorFlow Lite model"
    if data[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if data.startswith(b"PK"):
        return _kind_of_zip(data)
    if re.match(rb"\x08[\x01-\x20](\x12|\x1a|\x22|\x3a)", data):  # field 1, the version; then producer, domain or graph
        return "an ONNX model: convert the weights that it was exported from"
    return "text" if is_text(data[:4096]) else None


def _kind_of_zip(data: bytes) -> str | None:
    """Returns a description of a zip archive, or None if `torch.save` wrote it."""
    try:
        names = [name.partition("/")[2] or name for name in zipfile.ZipFile(io.BytesIO(data)).namelist()]
    except zipfile.BadZipFile:
        return "cut off or damaged: it begins as a zip archive, such as torch.save writes, and has no end. Download it again"
    if "constants.pkl" in names:
        return "a TorchScript archive, which holds a program: save the model's state_dict() where it was exported"
    if "data.pkl" in names:
        return None
    if any(name.endswith(".weights.h5") for name in names):
        return "a Keras model"
    if any(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz)"
    return f"a zip archive without a state dict ({listed(sorted(names))}): unpack it first"


def _read_safetensors(data: bytes, name: str) -> dict[str, Tensor]:
    try:
        state = load_tensors(data)
    except SafetensorError as error:
        raise CheckpointError(f"{name} is safetensors that are cut off or damaged: {error}") from error
    except KeyError as error:  # a type of numbers that torch lacks
        raise CheckpointError(f"{name} holds numbers of a type that cannot be read: {error}") from error
    if "backbone.body.stem.0.weight" in state:
        raise CheckpointError(
            f"{name} has MaskLake's weights without their configuration: another program has saved it anew. Give the original "
            "file, or keep its metadata"
        )
    return state


# -- torch.save --------------------------------------------------------------------------------------------------------


class _StandIn:
    """Stands in for an object of another program's class; ignores its content."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _PlainDict(_StandIn):
    """Stands in for another kind of dictionary; becomes a plain one."""

    def __new__(cls, *_: Any) -> Any:
        return {}


_TABLES = ("collections.defaultdict",)


def read_pth(data: bytes, name: str) -> dict[str, Tensor]:
    """Returns the tensors of a state dict written by `torch.save`, or of a training checkpoint that contains one, by name.

    Objects of classes other than torch's are not unpickled: each becomes an empty stand-in, which the message names if it
    stands where weights should be. Raises CheckpointError for a file without a state dict.
    """
    refused = f"{name} is neither a MaskLake checkpoint nor a state dict of tensors"
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_stand_ins(data)]):
            content: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes make of torch's reader; its own message advises to unpickle them
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        cause = f"it holds a pickled {asked[1]}" if asked else f"it cannot be read ({type(error).__name__})"
        raise CheckpointError(f"{refused}: {cause}; other objects are refused, since reading them could run code") from error
    state = _find(content)
    if state is None:
        objects = sorted({*_pickled(content)})
        if objects:
            raise CheckpointError(
                f"{refused}: it holds a pickled {listed(objects)}; other objects are refused: reading them could run code; "
                "save the model's state_dict() where it was trained"
            )
        raise CheckpointError(f"{name} is no state dict: expected tensors by name, found {_inventory(content)}")
    return state


def _stand_ins(data: bytes) -> list[tuple[type, str]]:
    """Returns a stand-in for each class that the pickle in a zip archive names and torch does not know."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    except Exception:  # noqa: BLE001 - of any kind, for a file that is of the older form or damaged: its reader says what it is
        return []
    return [(type(name, (_PlainDict if name in _TABLES else _StandIn,), {}), name) for name in names]


def _find(content: Any, depth: int = _DEPTH) -> dict[str, Tensor] | None:
    """Returns the state dict within the content of a file, or None."""
    if not isinstance(content, Mapping) or not depth:
        return None
    state = {key: value for key, value in content.items() if not str(key).endswith("_extra_state")}
    if state and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        return state
    known = next((found for key in NESTED if (found := _find(content.get(key), depth - 1)) is not None), None)
    return known if known is not None else _only_network(content, depth)


def _only_network(content: Mapping[Any, Any], depth: int) -> dict[str, Tensor] | None:
    """Returns the only state dict under an unknown key; None if there are several, such as those of a teacher and a student.

    The names of a network's weights contain dots, those of an optimiser's state do not.
    """
    found = [_find(value, depth - 1) for value in content.values()]
    networks = [state for state in found if state is not None and any("." in name for name in state)]
    return networks[0] if len(networks) == 1 else None


def _pickled(content: Any, depth: int = _DEPTH) -> Iterable[str]:
    """Yields the class names of stand-ins that stand where weights should be."""
    if isinstance(content, _StandIn):
        yield type(content).__name__
    elif isinstance(content, Mapping) and depth:
        nested = [content[key] for key in NESTED if key in content] or list(content.values())
        for value in nested:
            yield from _pickled(value, depth - 1)


def _inventory(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"one {type(content).__name__}"
    return listed([f"{key} ({type(value).__name__})" for key, value in content.items()]) or "nothing"


# -- names -------------------------------------------------------------------------------------------------------------


def unwrapped(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Returns the state dict of the network itself, without the prefixes and the entries that wrappers add.

    DistributedDataParallel adds `module.`, `torch.compile` `_orig_mod.`, and Lightning the name of the attribute; averaged
    weights have counters beside the network. Averaged weights (`ema`) are used if there are no others. Raises CheckpointError
    if there are several networks otherwise.
    """
    plain: dict[str, Tensor] = {}
    for key, tensor in state.items():
        plain[_TRANSPARENT.sub("", key)] = tensor
    prefixes = {key.removesuffix(layer) for key in plain for layer in _FIRST_LAYERS if _ends(key, layer)}
    if not prefixes:
        first = CLASSIFIER[0]
        starts = {key.removesuffix(first) for key in plain if _ends(key, first)}
        prefixes = {start for start in starts if all(start + key in plain for key in CLASSIFIER)}
    chosen = {prefix for prefix in prefixes if "ema" not in prefix} or prefixes
    if len(chosen) > 1 and "" not in chosen:
        raise CheckpointError(f"{name} holds several networks, {listed(sorted(chosen))}: save the state_dict() of the one")
    prefix = "" if "" in chosen or not chosen else chosen.pop()
    others = tuple(prefixes - {prefix, ""})
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in plain.items()
        if key.startswith(prefix) and not (others and key.startswith(others))
    }


def _ends(key: str, layer: str) -> bool:
    return key == layer or key.endswith(f".{layer}")
