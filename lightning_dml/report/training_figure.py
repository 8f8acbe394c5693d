"""The figure of a training: how the similarities of its pairs, and the forces on them, move over its steps."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_dml.errors import InputError
from lightning_dml.report.curve_figure import PALETTE
from lightning_dml.report.saving import save_figure

PARTS = {"batch": "pairs of the batch", "memory": "pairs of batch and memory"}
LOOKS = {"positive": (PALETTE[0], "-"), "negative": (PALETTE[1], "--")}
FEW = 30  # so many measurements are marked one by one
WIDE = 30  # sides whose forces differ by more than this factor get a logarithmic scale

History = Sequence[Mapping[str, float]]


def training_figure(history: History, *, prefix: str = "pairs/") -> Figure:
    """Draws similarities and total forces of positives and negatives over the steps of a training.

    The batch and the memory have a column each, where there are figures of them: above the mean similarity and the
    band from the 5 % to the 95 % quantile of the pairs, below the sum of the weights of all pairs. The forces are on a
    logarithmic scale where one side's median is more than 30 times the other's, with a linear foot where some are 0.

    Args:
        history: for each measurement `step` and, for P in `batch` and `memory`, as far as they are known,
            `{prefix}P/positive_similarity`, its `_q05` and `_q95`, `{prefix}P/positive_force`, and the same of
            negatives; as `WeightCurveLogger.history` has them.
        prefix: what the names begin with.

    Returns:
        A figure of 11 x 7.2 inches with both parts, 7.2 x 7.2 with one, not known to pyplot.

    Raises:
        InputError: for a history without such figures.

    Examples:
        >>> figures = {"pairs/batch/positive_similarity": 0.6, "pairs/batch/positive_force": 0.4}
        >>> figure = training_figure([{"step": 50, **figures}])
        >>> [panel.get_ylabel() for panel in figure.axes]
        ['cosine similarity S', 'total force, sum of weights']
    """
    parts = [
        part
        for part in PARTS
        if any(name.startswith(f"{prefix}{part}/") for measurement in history for name in measurement)
    ]
    if not parts:
        raise InputError(
            f"history has no figures named {prefix}batch/... or {prefix}memory/..., so there is nothing to draw; a "
            "WeightCurveLogger has them after its first measurement"
        )
    large = matplotlib.rc_context({"font.size": 13, "axes.titlesize": 14, "axes.labelsize": 14, "legend.fontsize": 13})
    with large:  # legible at half size
        figure = Figure(figsize=(11 if len(parts) == 2 else 7.2, 7.2), layout="constrained")
        panels = figure.subplots(2, len(parts), sharex="all", squeeze=False)
        for panel in panels[0, 1:]:  # one scale, so that batch and memory can be compared
            panel.sharey(panels[0, 0])
        for column, part in enumerate(parts):
            similarity, force = panels[:, column]
            for side in LOOKS:
                _similarities(similarity, history, f"{prefix}{part}/{side}_similarity", side)
                _line(force, history, f"{prefix}{part}/{side}_force", side)
            _scale_of_forces(force)
            similarity.set_title(PARTS[part])
            force.set_xlabel("optimizer step")
        panels[0, 0].set_ylabel("cosine similarity S")
        panels[1, 0].set_ylabel("total force, sum of weights")
        for panel in panels.flat:
            panel.spines[["top", "right"]].set_visible(False)
        _legend(figure, columns=len(parts))
    return figure


def save_training(figure: Figure, history: History, path_stem: str | Path) -> list[Path]:
    """Writes a figure as PNG and SVG, and the history as CSV, each written whole or not at all.

    The table has a row for each measurement and a column for each name, empty where a measurement has none.

    Args:
        figure: from `training_figure`.
        history: what it shows.
        path_stem: path without a suffix; folders are made.

    Returns:
        The three paths.
    """
    return save_figure(figure, path_stem, lambda path: _write_table(path, history))


def _points(history: History, *names: str) -> tuple[list[float], ...]:
    """Steps and values of the measurements that have all of the names."""
    complete = [measurement for measurement in history if all(name in measurement for name in names)]
    rows = [[measurement["step"], *(measurement[name] for name in names)] for measurement in complete]
    return tuple(map(list, zip(*rows, strict=True))) if rows else tuple([] for _ in range(1 + len(names)))


def _similarities(panel: Axes, history: History, name: str, side: str) -> None:
    steps, low, high = _points(history, f"{name}_q05", f"{name}_q95")
    colour = LOOKS[side][0]
    panel.fill_between(
        steps, low, high, color=colour, alpha=0.18, linewidth=0, label=f"{side}s: 5 % to 95 % of the pairs"
    )
    for edge in (low, high):  # two bands that overlap stay apart
        panel.plot(steps, edge, color=colour, linestyle=LOOKS[side][1], linewidth=0.8, alpha=0.6)
    _line(panel, history, name, side)


def _line(panel: Axes, history: History, name: str, side: str) -> None:
    steps, values = _points(history, name)
    colour, style = LOOKS[side]
    weight = "\N{MINUS SIGN}dL/dS" if side == "positive" else "dL/dS"
    options: dict[str, Any] = {"marker": "o", "markersize": 4} if len(steps) <= FEW else {}
    panel.plot(
        steps,
        values,
        color=colour,
        linestyle=style,
        linewidth=2.4,
        label=f"{side}s: mean of S, sum of {weight}",
        **options,
    )


def _scale_of_forces(panel: Axes) -> None:
    sides = [values for values in (_finite(line) for line in panel.get_lines()) if values]
    if not sides or min(map(min, sides)) < 0:
        return
    usual = [statistics.median(values) for values in sides]
    if min(usual) > 0 and max(usual) > WIDE * min(usual):
        if min(map(min, sides)) > 0:
            panel.set_yscale("log")
        else:  # down to 0, linearly from where the weaker side rarely is
            panel.set_yscale("symlog", linthresh=min(usual) / 10)
            panel.set_ylim(bottom=0)
    else:
        panel.set_ylim(bottom=0)


def _finite(line: Line2D) -> list[float]:
    return [float(value) for value in np.asarray(line.get_ydata(), dtype=float) if math.isfinite(value)]


def _legend(figure: Figure, columns: int) -> None:
    by_label: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        by_label.update(zip(labels, handles, strict=True))
    # Lines above their bands.
    labels = sorted(by_label, key=lambda label: ("5 %" in label, label.startswith("negative")))
    labels = [label for side in LOOKS for label in labels if label.startswith(side)]
    figure.legend(
        [by_label[label] for label in labels],
        labels,
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        handlelength=3,
    )


def _write_table(path: Path, history: History) -> None:
    names = list(dict.fromkeys(name for measurement in history for name in measurement))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(history)
