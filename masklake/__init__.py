"""Mask R-CNN as a distributed image pipeline: train on Ray, label a bucket, query a table of masks.

The names of `__all__` are the public API (docs/python.md). Each is imported when it is first used (PEP 562), so that
`import masklake` is quick and loads neither torch nor Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from masklake.jobs.label import LabelReport
    from masklake.jobs.train import TrainReport
    from masklake.model.errors import CheckpointError, ConfigError, MaskLakeError, UnknownPresetError
    from masklake.model.instances import Instances
    from masklake.pipeline.errors import (
        AccessDeniedError,
        AnnotationError,
        ClusterLostError,
        ClusterTooSmallError,
        ClusterUnusableError,
        EmptyInputError,
        InputNotFoundError,
        LabellingError,
        LeaseHeldError,
        LeaseLostError,
        QueryError,
        RunNotFoundError,
        StorageError,
        TableError,
        TooManyFailuresError,
        TrainingError,
    )
    from masklake.pipeline.labelling.run_list import RunInfo, RunState
    from masklake.prediction import Predictor, decode_mask, load_model
    from masklake.runs import label, train
    from masklake.tables import MaskTable, QueryAnswer, open_table

    __version__: str

__all__ = [
    "AccessDeniedError",
    "AnnotationError",
    "CheckpointError",
    "ClusterLostError",
    "ClusterTooSmallError",
    "ClusterUnusableError",
    "ConfigError",
    "EmptyInputError",
    "InputNotFoundError",
    "Instances",
    "LabelReport",
    "LabellingError",
    "LeaseHeldError",
    "LeaseLostError",
    "MaskLakeError",
    "MaskTable",
    "Predictor",
    "QueryAnswer",
    "QueryError",
    "RunInfo",
    "RunNotFoundError",
    "RunState",
    "StorageError",
    "TableError",
    "TooManyFailuresError",
    "TrainReport",
    "TrainingError",
    "UnknownPresetError",
    "__version__",
    "decode_mask",
    "label",
    "load_model",
    "open_table",
    "train",
]

_HOMES = {
    "masklake.jobs.label": ("LabelReport",),
    "masklake.jobs.train": ("TrainReport",),
    "masklake.model.errors": ("CheckpointError", "ConfigError", "MaskLakeError", "UnknownPresetError"),
    "masklake.model.instances": ("Instances",),
    "masklake.pipeline.labelling.run_list": ("RunInfo", "RunState"),
    "masklake.prediction": ("Predictor", "decode_mask", "load_model"),
    "masklake.runs": ("label", "train"),
    "masklake.tables": ("MaskTable", "QueryAnswer", "open_table"),
}
_HOME = dict.fromkeys((name for name in __all__ if name.endswith("Error")), "masklake.pipeline.errors") | {
    name: home for home, names in _HOMES.items() for name in names
}


def __getattr__(name: str) -> Any:
    """Imports a public name from its module, and keeps it (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("masklake")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Returns the public names, for completion in a notebook."""
    return sorted({*globals(), *__all__})
