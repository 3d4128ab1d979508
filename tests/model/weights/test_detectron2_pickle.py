"""The model zoo's pickles are read without unpickling: arrays of numbers come through, nothing else is ever called."""

from __future__ import annotations

import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from masklake.model.errors import CheckpointError
from masklake.model.weights.detectron2 import is_pickle, read_pickle

ARRAYS = {
    "floats": np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4),
    "columns": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "half": np.array([0.5, 2.0], dtype=np.float16),
    "count": np.array(7, dtype=np.int64),
    "flags": np.array([True, False]),
    "swapped": np.arange(3, dtype=">f4"),
    "none": np.zeros((0, 5), dtype=np.float32),
    "scalar": np.float32(2.5),
}


def zoo(arrays: dict[str, Any]) -> dict[str, Any]:
    return {"model": arrays, "__author__": "Detectron2 Model Zoo", "matching_heuristics": True}


def assert_same(read: dict[str, torch.Tensor]) -> None:
    assert read.keys() == ARRAYS.keys()
    for name, tensor in read.items():
        np.testing.assert_array_equal(tensor.numpy(), ARRAYS[name])
        assert tensor.dtype == torch.from_numpy(np.asarray(ARRAYS[name], ARRAYS[name].dtype.newbyteorder("="))).dtype


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_numbers_come_through(protocol: int) -> None:
    data = pickle.dumps(zoo(ARRAYS), protocol=protocol)
    assert is_pickle(data)
    assert_same(read_pickle(data, "file"))
    ordered = {**zoo(OrderedDict(ARRAYS)), "iteration": np.int64(89999)}
    assert_same(read_pickle(pickle.dumps(ordered, protocol=protocol), "file"))


def test_a_few_bytes_cannot_ask_for_much_memory() -> None:
    for hostile in (b"Nr\xff\xff\xff\x7f.", b"Np2000000000\n.", b"cnumpy.core.numeric\n_frombuffer\n(J\xff\xff\xff\x7fNNNtR."):
        with pytest.raises(CheckpointError, match=r"remembers an object number|an array made of int"):
            read_pickle(b"\x80\x02" + hostile, "file")


def test_the_names_of_old_and_new_numpy_are_the_same() -> None:
    data = pickle.dumps(zoo(ARRAYS), protocol=2)
    for own, other in ((b"numpy._core.", b"numpy.core."), (b"numpy.core.", b"numpy._core.")):
        assert_same(read_pickle(data.replace(own, other), "file"))


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 did: as strings of no encoding."""

    def save_string(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)

    dispatch: ClassVar[Any] = {**pickle._Pickler.dispatch, bytes: save_string}


def test_files_that_python_2_has_written_come_through(tmp_path: Path) -> None:
    with (tmp_path / "old.pkl").open("wb") as file:
        Python2Pickler(file, protocol=2).dump(zoo(ARRAYS))
    data = (tmp_path / "old.pkl").read_bytes()
    assert b"_codecs" not in data
    assert_same(read_pickle(data, "file"))


@pytest.mark.parametrize("protocol", [2, 4])
def test_no_function_is_called(protocol: int, tmp_path: Path, calls: type) -> None:
    victim = tmp_path / "victim"
    for hostile in (calls(open, str(victim), "w"), calls(np.save, str(victim), ARRAYS["half"]), calls(eval, "1 + 1")):
        data = pickle.dumps(zoo({**ARRAYS, "weight": hostile}), protocol=protocol)
        with pytest.raises(CheckpointError, match=r"file is neither .* nor a state dict of numpy arrays.*it asks for \w+\.\w+"):
            read_pickle(data, "file")
    assert list(tmp_path.iterdir()) == []


def test_numpys_own_machinery_is_not_reached() -> None:
    """Its classes take state that can make them read and write where they should not."""
    for hostile in (np.array([print], dtype=object), np.zeros(2, dtype=[("a", "f4")]), np.array(["text"])):
        with pytest.raises(CheckpointError, match="nor a state dict of numpy arrays"):
            read_pickle(pickle.dumps(zoo({"weight": hostile}), protocol=2), "file")


def test_bytes_that_do_not_fill_their_array_are_refused() -> None:
    data = pickle.dumps(zoo({"weight": np.zeros(5, np.float32)}), protocol=3)
    assert data.count(b"K\x05\x85") == 1
    for count in (b"\x04", b"\x06", b"\xff"):
        with pytest.raises(CheckpointError, match="damaged"):
            read_pickle(data.replace(b"K\x05\x85", b"K" + count + b"\x85"), "file")


def test_state_for_a_class_is_refused() -> None:
    """The opcode BUILD on the class itself, not on an instance, would change it for every file that is read later."""
    for name in (
        b"_codecs\nencode\n",
        b"numpy.core.multiarray\n_reconstruct\n",
        b"numpy\ndtype\n",
        b"collections\nOrderedDict\n",
    ):
        hostile = b"\x80\x02c" + name + b"N}X\x03\x00\x00\x00newK\x01s\x86b."  # state (None, {"new": 1})
        assert [op.name for op, _, _ in pickletools.genops(hostile)][-2] == "BUILD"
        with pytest.raises(CheckpointError, match="nor a state dict of numpy arrays"):
            read_pickle(hostile, "file")
    assert_same(read_pickle(pickle.dumps(zoo(ARRAYS), protocol=2), "file"))


def test_a_file_that_is_cut_off_is_refused() -> None:
    data = pickle.dumps(zoo(ARRAYS), protocol=2)
    for length in range(1, len(data), 97):
        with pytest.raises(CheckpointError, match="damaged"):
            read_pickle(data[:length], "file")


@pytest.mark.parametrize(
    "content", [[1, 2], {"blobs": {"conv1_w": ARRAYS["half"]}}, {"model": {"weight": 3.0}}, {"model": {}}, {"model": [1]}]
)
def test_other_content_is_named(content: Any) -> None:
    with pytest.raises(CheckpointError, match="file is no Detectron2 checkpoint: expected numpy arrays by name"):
        read_pickle(pickle.dumps(content, protocol=2), "file")


def test_torchs_files_are_torchs(tmp_path: Path) -> None:
    for new in (True, False):
        torch.save({"weight": torch.zeros(2)}, tmp_path / "file.pth", _use_new_zipfile_serialization=new)
        assert not is_pickle((tmp_path / "file.pth").read_bytes())
