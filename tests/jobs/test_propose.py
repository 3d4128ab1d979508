"""Inputs that `masklake propose` refuses before any worker starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from masklake.jobs import propose
from masklake.jobs.propose import ProposeOptions
from masklake.jobs.shapes import generate
from masklake.model.errors import ConfigError
from tests import second_detector


def test_a_detector_without_proposals_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(second_detector.install(tmp_path)))
    monkeypatch.setattr(propose, "connect_ray", lambda address: pytest.fail("Ray is not needed"))
    coco = generate(tmp_path / "data", 2, 64, seed=0)
    weights = tmp_path / "second.safetensors"
    weights.write_bytes(second_detector.checkpoint())
    options = ProposeOptions(coco=str(coco), weights=str(weights), output=str(tmp_path / "proposals.parquet"))
    with pytest.raises(ConfigError, match=r"second\.safetensors: model torchvision-\w+ gives no proposals"):
        propose.run(options)
    assert not (tmp_path / "proposals.parquet").exists()
