"""Training curves as a PNG: losses, and average precision where it was measured."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from masklake.pipeline.training.run import TOTAL


def training_curves(history: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Returns a PNG of 1200 x 480 pixels with the losses on the left and the AP on the right.

    history: one row per epoch with `epoch` (from 1), `losses` (mean over the epoch by name; "loss" is their sum), and after an
    evaluation `ap` (by name, 0..1) or the `recall` of proposals. A dotted line marks where the trained part (`learn`) changes.
    """
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    _draw(left, history, [row.get("losses") or {} for row in history], "loss", "mean over the epoch")
    scores = [{**(row.get("ap") or {}), **(row.get("recall") or {})} for row in history]
    _draw(right, history, scores, "on the validation images", "average precision (AP) or recall (AR)")
    right.set_ylim(0, 1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _draw(
    axes: Axes, history: Sequence[Mapping[str, Any]], values: Sequence[Mapping[str, float | None]], title: str, unit: str
) -> None:
    """Draws one line per name. values: by name, for each row of the history; empty if nothing was measured. Lines end where
    `learn` changes.
    """
    changes = [a["epoch"] + 0.5 for a, b in itertools.pairwise(history) if a.get("learn") != b.get("learn")]
    names = sorted({name for numbers in values for name in numbers}, key=lambda name: (name != TOTAL, name))
    for name in names:
        measured = [(row["epoch"], numbers.get(name)) for row, numbers in zip(history, values, strict=True)]
        points = sorted([(x, y) for x, y in measured if y is not None] + [(x, math.nan) for x in changes])
        style = {"color": "black", "linewidth": 2.5} if name == TOTAL else {"linewidth": 1.2}
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=4, label=name, **style)
    for x in changes:
        axes.axvline(x, color="gray", linestyle=":", linewidth=1)
    if names:
        axes.legend(loc="best", fontsize="small")
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="gray")
    axes.set(title=title, xlabel="epoch", ylabel=unit)
    axes.set_xlim(0.5, max((row["epoch"] for row in history), default=1) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
