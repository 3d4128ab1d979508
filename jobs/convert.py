"""`masklake convert`: converts another system's weights to a MaskLake checkpoint."""

from __future__ import annotations

import json
import math
import os

from pydantic import BaseModel, ConfigDict

from masklake.jobs.terminal.output import check_not_read, same_place
from masklake.model import create_model
from masklake.model.config import Category
from masklake.model.errors import ConfigError
from masklake.model.weights.checkpoint import dumps
from masklake.pipeline.coco.reading import parse_coco
from masklake.pipeline.coco.values import quoted
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import parent, parse_uri

_FORMS = "give a COCO JSON file, a JSON list of names in the order of the classes, or a text file with one name per line"


class ConvertReport(BaseModel):
    """What was written, and the model_id that tables will use."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    source: str
    checkpoint: str
    preset: str
    model_id: str
    categories: int
    parameters: int
    norm_eps: float


def run(
    source: str, target: str, preset: str, storage: Storage, norm_eps: float | None = None, categories: str | None = None
) -> ConvertReport:
    """Reads the weights `source` into the architecture `preset`, and writes the checkpoint `target`, one safetensors file.

    source: a torchvision state dict (.pth, .safetensors) or a Detectron2 checkpoint (.pth, or .pkl of its model zoo), alone or
    within a training checkpoint, local or s3://; or the name of torchvision weights, which are downloaded. The names of the
    parameters tell which system a file comes from; the checkpoint follows that system's conventions. norm_eps: epsilon of the
    norm layers, which a state dict does not contain. None: 0 for torchvision's own COCO_V1 files, else 1e-5; give 0 for a
    COCO_V1 model that was saved again. categories: a file with the categories of the weights (`read_categories`). None: those
    of the preset.

    Raises UnknownPresetError, CheckpointError (not weights of this architecture), ConfigError (a target that is not named
    .safetensors, is a folder, or is a file that this reads) and the storage's errors.
    """
    _check_target(storage, source, target)
    check_not_read(target, {"the file of --categories": categories})
    if norm_eps is not None and not math.isfinite(norm_eps):
        raise ConfigError(f"--norm-eps {norm_eps} is not a finite number")
    model = create_model(
        preset,
        weights=storage.read_bytes(source) if "://" in source else source,
        categories=None if categories is None else read_categories(storage, categories),
        weights_name=source,
    )
    if norm_eps is not None:
        backbone = model.config.backbone.model_copy(update={"norm_eps": norm_eps})
        model = create_model(model.config.model_copy(update={"backbone": backbone}), weights=dumps(model))
    storage.write_bytes(target, dumps(model))
    return ConvertReport(
        source=source,
        checkpoint=target,
        preset=preset,
        model_id=model.model_id,
        categories=len(model.config.categories),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        norm_eps=model.config.backbone.norm_eps,
    )


def read_categories(storage: Storage, uri: str) -> tuple[Category, ...]:
    """Returns the categories of a model, in the order of its classes, from a COCO JSON file, a JSON list of names, or text with
    a name per line.

    The categories of a COCO file are sorted by id, as torchvision's and Detectron2's classes are; names get the ids 1, 2, 3 and
    so on. Raises ConfigError for a file without names.
    """
    text = storage.read_bytes(uri)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict | list):
        document = _lines(text, uri)  # one name alone may be JSON, too: `5`, `true`
    if isinstance(document, dict) and not isinstance(document.get("categories"), list):
        raise ConfigError(f"--categories {uri} is a JSON object without a list 'categories': {_FORMS}")
    rows = document["categories"] if isinstance(document, dict) else document
    if not rows:
        raise ConfigError(f"--categories {uri} names no categories: {_FORMS}")
    for number, row in enumerate(rows):
        if not isinstance(row, str | dict):
            raise ConfigError(
                f"--categories {uri}: categories[{number}] is {quoted(row)}, neither a name nor an object with one"
            )
    rows = [{"id": number, "name": row} if isinstance(row, str) else row for number, row in enumerate(rows, start=1)]
    categories = parse_coco({"images": [], "annotations": [], "categories": rows}, uri).categories
    names = [category.name for category in categories]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--categories {uri} names {quoted(twice[0])} more than once; a table could not distinguish them")
    return tuple(sorted(categories, key=lambda category: category.id))


def _lines(text: bytes, uri: str) -> list[str]:
    try:
        return [line.strip() for line in text.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"--categories {uri} is neither JSON nor text: {error}") from error


def _check_target(storage: Storage, source: str, target: str) -> None:
    """Raises ConfigError or the storage's error, before the weights are read, for a target that cannot be written. Missing
    folders are created.
    """
    if not target.endswith(".safetensors"):
        raise ConfigError(f"cannot write {target}: a MaskLake checkpoint is named *.safetensors")
    if same_place(target, source):
        raise ConfigError(f"cannot write {target}: it is the source; name another file")
    if not parse_uri(target).is_local:
        return
    if os.path.isdir(parse_uri(target).key):
        raise ConfigError(f"cannot write {target}: it is a folder")
    storage.check_writable(parent(target))
