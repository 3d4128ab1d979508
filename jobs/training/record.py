"""The record of a training run: what its first start stores, and what a later start under the same name may change.

A run is defined by its data, its model before the first step, and every option that changes the result. `CHANGEABLE` lists the
other options, which may differ at each start. A test checks that every field of `TrainOptions` belongs to one of the two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from masklake.model.config import ModelConfig
from masklake.model.create import is_weight_name
from masklake.model.errors import ConfigError
from masklake.model.identity import FIRST_DEFAULTS, differing
from masklake.model.wording import counted
from masklake.pipeline.coco.dataset import CocoDataset
from masklake.pipeline.errors import InputNotFoundError
from masklake.pipeline.storage.objects import concat
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import parse_uri, relative_to
from masklake.pipeline.training.recipe import Recipe

FORMAT = 2
RUN_RECORD = "run.json"

CHANGEABLE: Mapping[str, str] = {
    "output": "the run's folder may be moved",
    "name": "the run's folder may be renamed",
    "images": "images are identified by their names and sizes, wherever they are",
    "val_images": "as above",
    "workers": "the cluster may have grown or shrunk; the learning rate follows the number of images per step",
    "device": "as above",
    "threads": "changes only the speed",
    "max_failures": "changes only how often workers restart",
    "max_unusable": "only a limit: which images are left out follows from the data",
    "evaluate_every": "changes only when scores are computed; part of the entry `keep` if the best epoch depends on it",
    "storage": "the same files may be reached in another way",
    "address": "the run may continue on another cluster",
}
"""Options that may differ at each start, and why. So may the epochs of a run with one phase, down to the number completed."""

LATER: Mapping[str, Mapping[str, Any]] = {"": {}, "recipe": {}, "augmentation": {}}
"""Entries of the record, of its recipe and of its augmentation that came after the first release, each with the value that
every run before it had: an older record is completed with them. (The model's part needs none, see `record_of`.)"""

WORDS: Mapping[str, str] = {
    "train": "TRAIN",
    "train_images": "--images",
    "val": "--val",
    "val_images": "--val-images",
    "recipe.learning_rate": "--learning-rate",
    "recipe.batch_size": "--batch-size",
    "epochs": "--epochs",
    "augmentation.crop": "--crop",
    "max_dets": "max_dets",
    "keep_empty": "keep_empty",
}
"""Names in messages of entries of the record, unless they are the entry's name with dashes."""


def record_of(
    options: Any,
    recipe: Recipe,
    config: ModelConfig,
    train: Mapping[str, Any],
    val: Mapping[str, Any] | None,
    files: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the record of a start. options: `jobs.training.options.TrainOptions`.

    train, val: from `data_facts`. files: from `file_facts`, for weights and proposals. The entry `model` holds the differences
    from the defaults with which the configuration's fields were introduced (`model.identity`), so that the fields that a later
    version adds do not change it.
    """
    return {
        "format": FORMAT,
        "train": train["file"],
        "train_images": train["images"],
        "val": None if val is None else val["file"],
        "val_images": None if val is None else val["images"],
        **files,
        "preset": options.preset,
        "tasks": sorted(config.tasks),
        "learn": options.learn,
        "reset_predictors": options.reset_predictors,
        "seed": options.seed,
        "recipe": recipe.model_dump(mode="json", exclude={"epochs"}),
        "epochs": recipe.epochs if len(options.phases) > 1 else None,
        "model": differing(config, FIRST_DEFAULTS),
        "augmentation": options.augmentation.model_dump(mode="json"),
        "keep": options.keep if options.keep == "last" else f"best (--evaluate-every {options.evaluate_every})",
        "max_dets": options.max_dets,
        "allow_missing": options.allow_missing,
        "keep_empty": options.keep_empty,
    }


def data_facts(storage: Storage, uri: str, data: CocoDataset, folder: str) -> dict[str, Any]:
    """Returns what identifies training data: a hash of the COCO file, and one of the images' names and sizes. Both may move,
    but must not change.
    """
    names = {relative_to(folder, image.file_name): image.file_name for image in data.images}
    sizes: dict[str, int | None] = {}
    if not parse_uri(folder).is_local:  # from the store's listing, of which a page of a thousand costs one request
        listed = concat(storage.list_objects(folder))
        sizes = dict(zip(listed["uri"].to_pylist(), listed["bytes"].to_pylist(), strict=True))
    others = storage.stat_many([uri for uri in names if uri not in sizes])  # a name may lead out of the folder
    sizes |= dict(zip(others["uri"].to_pylist(), others["bytes"].to_pylist(), strict=True))
    rows = sorted((name, sizes[uri]) for uri, name in names.items())
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    images = {"count": len(rows), "bytes": sum(size or 0 for _, size in rows), "sha256": digest, "shown": folder}
    return {"file": file_facts(storage, uri), "images": images}


def file_facts(storage: Storage, uri: str | None) -> dict[str, Any] | None:
    """Returns what identifies a file: a hash of its content, or the name of torchvision weights. None for None. Raises the
    storage's errors.
    """
    if uri is None:
        return None
    if is_weight_name(uri):
        return {"sha256": uri, "shown": uri}
    return {"sha256": hashlib.sha256(storage.read_bytes(uri)).hexdigest(), "shown": uri}


def read_record(storage: Storage, run_uri: str) -> dict[str, Any] | None:
    """Returns the record of a run's first start; None for a new run. Raises ConfigError for a damaged or incomplete record."""
    uri = Storage.join(run_uri, RUN_RECORD)
    try:
        known = json.loads(storage.read_bytes(uri))
    except InputNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{uri} is damaged ({error}); remove that run's folder, or give another --name") from error
    if not isinstance(known, dict) or known.get("format") != FORMAT:
        raise ConfigError(
            f"{uri} was written by another version of MaskLake and does not say all that the run was started with, so the "
            "run cannot go on. What it has made stays as it is: give this one another --name, or remove that folder"
        )
    return known


def check_record(known: Mapping[str, Any], record: Mapping[str, Any], name: str) -> None:
    """Raises ConfigError if a start differs from the run of that name; it names each option with both values.

    `--allow-missing` may be added: without it the run has left nothing out so far, and it is the remedy for a broken image.
    """
    before, now = completed(known), json.loads(json.dumps(record))
    if not before.get("allow_missing"):
        now["allow_missing"] = before.get("allow_missing")
    changes = list(differences(before, now))
    if changes:
        raise ConfigError(
            f"the run '{name}' was started with other options: {'; '.join(changes)}. Use the original options, or "
            "another --name"
        )


def completed(known: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of an older version, completed with the entries that it did not have (`LATER`)."""
    tables = {name: {**later, **known.get(name, {})} for name, later in LATER.items() if name}
    return {**LATER[""], **known, **tables}


def differences(known: Mapping[str, Any], record: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yields a phrase for each entry that differs between two records: `--seed was 0, is 5`."""
    for key in sorted(known.keys() | record.keys()):
        old, new, where = known.get(key), record.get(key), f"{path}{key}"
        if _same(old, new):
            continue
        if isinstance(old, dict) and isinstance(new, dict) and "sha256" not in old:
            yield from differences(old, new, f"{where}.")
        elif isinstance(old, dict) and isinstance(new, dict) and old["shown"] == new["shown"]:
            yield f"{_word(where)}: {_content(old, new)}"
        else:
            default = "none" if not path else "the default"  # what a table leaves out
            yield f"{_word(where)} was {_shown(old, default)}, is {_shown(new, default)}"


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, dict) and isinstance(new, dict) and "sha256" in old:
        return bool(old["sha256"] == new.get("sha256"))
    return bool(old == new)


def _content(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if "count" in old:
        return (
            f"{new['shown']} had {counted(old['count'], 'image')} of {counted(old['bytes'], 'byte')} for this file and has "
            f"{new['count']:,} of {new['bytes']:,}, by name and size others than then"
        )
    return f"the content of {new['shown']} has changed (SHA-256 {old['sha256'][:12]} then, {new['sha256'][:12]} now)"


def _shown(value: Any, absent: str) -> str:
    if isinstance(value, dict) and "shown" in value:
        return str(value["shown"])
    text = absent if value is None else json.dumps(value, ensure_ascii=False).strip('"')
    return text if len(text) <= 80 else f"{text[:77]}..."


def _word(where: str) -> str:
    if where in WORDS:
        return WORDS[where]
    table, _, field = where.partition(".")
    return f"[{table}] {field}" if field else f"--{where.replace('_', '-')}"
