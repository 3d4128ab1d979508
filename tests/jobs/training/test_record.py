"""The record of a run's options: those of other versions are completed, and differences are named."""

from __future__ import annotations

import pytest

from masklake.jobs.training import record
from masklake.jobs.training.record import LATER, check_record, differences
from masklake.model.errors import ConfigError
from masklake.pipeline.training.augmentation import Augmentation
from masklake.pipeline.training.recipe import Recipe

FIRST_FIELDS = {
    "recipe": {
        *("optimizer", "learning_rate", "reference_batch", "momentum", "weight_decay", "clip_norm", "warmup_steps"),
        *("warmup_factor", "schedule", "milestones", "gamma", "epochs", "batch_size"),
    },
    "augmentation": {"flip", "flip_vertical", "crop", "scale"},
}


def test_a_later_versions_new_field_needs_its_former_value() -> None:
    for name, model in (("recipe", Recipe), ("augmentation", Augmentation)):
        assert set(model.model_fields) == FIRST_FIELDS[name] | set(LATER[name]), "a new field goes into LATER"


def test_an_older_record_is_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "LATER", {"": {"ema": 0.0}, "recipe": {"beta2": 0.999}})
    old = {"seed": 3, "recipe": {"gamma": 0.1}}
    new = {"seed": 3, "ema": 0.0, "recipe": {"gamma": 0.1, "beta2": 0.999}}
    check_record(old, new, "night")
    with pytest.raises(ConfigError, match=r"\[recipe\] beta2 was 0\.999, is 0\.95\."):
        check_record(old, {**new, "recipe": {"gamma": 0.1, "beta2": 0.95}}, "night")


def test_differences_name_an_entry_that_one_side_lacks() -> None:
    assert list(differences({"seed": 0}, {"seed": 0, "new_option": True})) == ["--new-option was none, is true"]
    assert list(differences({"model": {"a": 1}}, {"model": {}})) == ["[model] a was 1, is the default"]
