"""Training curves as a PNG: the losses, and the average precision wherever it was measured."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TOTAL = "loss"
"""The sum of all losses: drawn black and thick."""


def training_curves(history: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """A PNG of 1200 x 480 pixels with the losses at the left and the AP at the right.

    history: one row an epoch: `epoch` (from 1), `losses` (mean over the epoch by name; "loss" is their sum), and `ap` (by name,
    0..1) where the epoch was evaluated.
    """
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    _draw(left, history, "losses", "loss", "mean over the epoch")
    _draw(right, history, "ap", "average precision on the validation images", "AP")
    right.set_ylim(0, 1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _draw(axes: Axes, history: Sequence[Mapping[str, Any]], field: str, title: str, unit: str) -> None:
    names = sorted({name for row in history for name in row.get(field) or {}}, key=lambda name: (name != TOTAL, name))
    for name in names:
        points = [(row["epoch"], row[field][name]) for row in history if (row.get(field) or {}).get(name) is not None]
        style = {"color": "black", "linewidth": 2.5} if name == TOTAL else {"linewidth": 1.2}
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=4, label=name, **style)
    if names:
        axes.legend(loc="best", fontsize="small")
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="gray")
    axes.set(title=title, xlabel="epoch", ylabel=unit)
    axes.set_xlim(0.5, max((row["epoch"] for row in history), default=1) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
