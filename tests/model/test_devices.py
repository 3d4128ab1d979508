"""The errors for devices that cannot be used, raised before the first image."""

from __future__ import annotations

import shutil

import pytest
import torch

from masklake.model import create_model
from masklake.model.config import ModelConfig
from masklake.model.devices import c_compiler, check_device
from masklake.model.errors import ConfigError
from masklake.model.presets import PRESETS


@pytest.fixture
def small() -> ModelConfig:
    return PRESETS["tiny"]


def test_a_host_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert check_device("cpu") == torch.device("cpu")


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, small: ModelConfig) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device cuda:1: .* finds no CUDA device"):
        create_model(small, device="cuda:1")


def test_a_device_without_a_c_compiler(monkeypatch: pytest.MonkeyPatch, small: ModelConfig) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"Triton needs a C compiler .* install gcc"):
        create_model(small, device="cuda")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name == "clang" else None)
    assert check_device("cuda").type == "cuda"


def test_the_compiler_is_the_one_that_triton_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("triton.runtime.build")
    monkeypatch.setenv("CC", "/opt/cc")
    find = getattr(build, "_find_compiler", None)  # since triton 3.7; before, the choice is in the middle of a build
    if find is not None:
        find.cache_clear()
        assert find("c") == c_compiler() == "/opt/cc"
        find.cache_clear()
    monkeypatch.delenv("CC")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert c_compiler() == "/bin/gcc"
    if find is not None:
        assert find("c") == "/bin/gcc"
        find.cache_clear()
