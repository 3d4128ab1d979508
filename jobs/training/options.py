"""The options of a training run, from the command line and a TOML file."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from masklake.jobs.fields import TrainFields
from masklake.model.config import ModelConfig
from masklake.model.errors import ConfigError, validated
from masklake.model.phases import PHASES, Phase
from masklake.model.wording import agreeing
from masklake.pipeline.coco.image_check import unusable_share
from masklake.pipeline.errors import InputNotFoundError
from masklake.pipeline.storage.options import StorageOptions
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import canonical
from masklake.pipeline.training.augmentation import Augmentation
from masklake.pipeline.training.recipe import Recipe

TABLES: Mapping[str, type[BaseModel]] = {
    "recipe": Recipe,
    "model": ModelConfig,
    "augmentation": Augmentation,
    "storage": StorageOptions,
}
"""Tables of a configuration file, and their types."""

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

REQUIRED: Mapping[str, str] = {
    "train": "TRAIN (the COCO JSON file to train on)",
    "output": "--output (the folder or prefix that holds runs)",
    "name": "--name (the run's name)",
}
"""Options without a default, as the command line calls them."""


class TrainOptions(BaseModel, TrainFields, frozen=True):
    """All options of one training run. `recipe` and `model` replace single fields of the preset's."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    recipe: dict[str, Any] = {}
    model: dict[str, Any] = {}
    augmentation: Augmentation = Augmentation()
    storage: StorageOptions = StorageOptions()

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not RUN_NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is not a run's name: use letters from a to z, digits, '.', '-' and '_', and begin with a letter or "
                "a digit (it names a folder)"
            )
        return name

    @field_validator("proposals")
    @classmethod
    def _check_proposals(cls, proposals: str | None, info: ValidationInfo) -> str | None:
        if proposals is not None and info.data.get("learn") != "detector":
            raise ValueError('stored proposals are for learn = "detector"; elsewhere the model makes its own')
        return proposals

    @field_validator("keep")
    @classmethod
    def _check_keep(cls, keep: str, info: ValidationInfo) -> str:
        if keep == "best" and info.data.get("val") is None:
            raise ValueError("the best epoch is known by its scores: give --val, or keep the last")
        return keep

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The parts to train, phase by phase."""
        return PHASES[self.learn]

    @property
    def most_unusable(self) -> float:
        """Maximum share of images that may be left out, 0 to 1."""
        return unusable_share(self.allow_missing, self.max_unusable)

    @property
    def run_uri(self) -> str:
        """The run's folder."""
        return Storage.join(canonical(self.output), self.name)


def read_options(config: str | None, changes: Mapping[str, Any]) -> TrainOptions:
    """Returns options from a TOML file and from `changes`, which take precedence (None: not given).

    Raises InputNotFoundError if there is no such file, and ConfigError, which names the field, for invalid options.
    """
    values: dict[str, Any] = {}
    if config is not None:
        try:
            values = tomllib.loads(Path(config).read_text())
        except FileNotFoundError as error:
            raise InputNotFoundError(f"{config}: not found; check the path of --config") from error
        except OSError as error:
            raise ConfigError(f"{config}: {error.strerror}; give --config a TOML file") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{config} is not TOML: {error}") from error
    for key, value in changes.items():
        if isinstance(value, dict):
            if not isinstance(values.get(key, {}), dict):
                raise ConfigError(f"{config}: {key} must be a table, written [{key}] with one option per line")
            values[key] = {**values.get(key, {}), **{k: v for k, v in value.items() if v is not None}}
        elif value is not None:
            values[key] = value
    for key in values.keys() - TrainOptions.model_fields.keys():
        for table, kind in TABLES.items():
            if key in kind.model_fields:
                raise ConfigError(f"{config}: {key} is an option of the table [{table}]; write it below that line")
    if missing := [name for name in REQUIRED if values.get(name) is None]:
        raise ConfigError(
            f"a training run needs {and_list([REQUIRED[name] for name in missing])}: give "
            f"{agreeing(len(missing), 'it', 'them')} on the command line, or as "
            f"{and_list(missing)} in the file of --config"
        )
    given = {key: f"--{key.replace('_', '-')}" for key, value in changes.items() if value is not None}
    return validated(TrainOptions, values, config or "the training options", given)


def and_list(names: Sequence[str]) -> str:
    """Returns `a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
