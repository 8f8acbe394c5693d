"""The figure of an axis of losses: the weight curve of each variant, and beside it the metrics that it brought."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import cycle
from statistics import median
from typing import Any, TypeVar

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from lightning_dml.losses import Context
from lightning_dml.losses.inspection.weight_curves import DRAWS
from lightning_dml.report.curve_figure import FONTS, MARKERS, PALETTE, STYLES
from lightning_dml.report.saving import as_text
from lightning_dml.study.plan.study_file import Axis, StudyFile
from lightning_dml.study.results.figure import LETTER, limits, metric_label, seeds_in, series_of
from lightning_dml.study.results.loss_curves import SIMILARITY, LossCurve, Side, curves_of
from lightning_dml.study.results.summary import Row

SIDES: tuple[Side, Side] = ("positive", "negative")
BLACK, GREY, BASELINE = "#000000", "0.55", "0.35"
BOLD, THIN, WIDEST = 2.6, 1.3, 3.8  # points
CUT = 2.0  # weights are cut off at this many times the median of the curves' largest
FLAT = 0.1  # of the common scale: where the curves of a row stay below, each row has a scale of its own
FAINT = 0.05  # of a row's scale: a curve that stays below has its largest weight written on it
STEEP = 1e3  # times the median of the curves' largest: a row that goes higher has a logarithmic scale

Looks = Mapping[str, dict[str, Any]]


def curve_axis_figure(study: StudyFile, axis: Axis, rows: Sequence[Row]) -> Figure:
    """Draws a row for each variant of an axis of losses: its weight curve, and means and intervals of all metrics.

    Where the losses of a row differ by the other axes, positives and negatives have a column each, and the curves the
    colours of the dots. All curves have one scale, unless some would be flat on it; what is far above the median of the
    curves' largest weights is cut off, or on a logarithmic scale where rows have their own, and the caption says so.

    Raises:
        InputError: naming the first point whose loss cannot be built or has no weight curve.
    """
    by_key, series = curves_of(row.point for row in rows), series_of(study, axis, rows)
    names = [name for name in axis.variants if any(name in own for own in series.values())]
    in_row = [{key: own[name] for key, own in series.items() if name in own} for name in names]
    curves = CurveRows([{key: by_key[row.point.key] for key, row in own.items()} for own in in_row])
    # The first two colours are those of positives and negatives where these share a panel.
    colours = PALETTE if curves.split else (BLACK,) if len(series) == 1 else PALETTE[2:]
    looks = {
        key: {"color": colour, "linestyle": style, "marker": marker}
        for key, colour, style, marker in zip(series, cycle(colours), cycle(STYLES), cycle(MARKERS), strict=False)
    }
    sides: dict[str, tuple[Side, ...]] = {side: (side,) for side in SIDES} if curves.split else {"curve": SIDES}
    columns, bottom = [*sides, *study.metrics], len(names) - 1
    width = 2.3 + 2.5 * len(sides) + 3.1 * len(study.metrics)  # inches
    caption = textwrap.fill(as_text(_caption(names, curves)), int(width / LETTER), break_on_hyphens=False)
    handles = _handles(study, looks, curves)
    beside = min(len(handles), max(1, int(width / (LETTER * max(map(len, handles)) + 0.7))))
    lines = math.ceil(len(handles) / beside) + caption.count("\n") + bool(caption)
    with matplotlib.rc_context({**FONTS, "axes.spines.top": False, "axes.spines.right": False}):
        height = 2.1 + 0.25 * lines + max(0.75, 0.09 * len(series)) * len(names)
        figure = Figure((width, height), layout=ConstrainedLayoutEngine(w_pad=0.09))
        FigureCanvasAgg(figure)
        panels = figure.subplot_mosaic([[f"{column} {place}" for column in columns] for place in range(len(names))])
        for place, own in enumerate(in_row):
            for column in columns:
                panel = panels[f"{column} {place}"]
                panel.grid(axis="x", alpha=0.35)
                panel.tick_params(labelbottom=place == bottom, labelleft=column == columns[0], length=3)
                if column in sides:
                    _draw_curves(panel, place, sides[column], looks, curves)
                else:
                    _draw_metric(panel, column, own, looks, rows)
        firsts = [panels[f"{columns[0]} {place}"] for place in range(len(names))]
        for panel, name in zip(firsts, names, strict=True):
            look: dict[str, Any] = {"rotation": 0, "ha": "right", "va": "center", "labelpad": 12, "fontsize": 13}
            panel.set_ylabel(textwrap.fill(as_text(name), 20), **look)
        figure.align_ylabels(firsts)
        unit = "|dL/dS| per anchor" if curves.lowest == 0 else "\N{MINUS-OR-PLUS SIGN}dL/dS per anchor"
        for column, (side, *_) in sides.items():
            which = f" of {side}s{', all alike' if side in curves.fixed else ''}" if curves.split else ""
            panels[f"{column} 0"].set_title(f"weight{which},\n{unit}", fontsize=13)
        for column in columns:
            label = "cosine similarity S" if column in sides else textwrap.fill(metric_label(study, column), 26)
            panels[f"{column} {bottom}"].set_xlabel(label)
        title = f"{study.name}: weight curves, mean and 95% interval over {seeds_in(study, rows)}"
        look = {"title": textwrap.fill(title, int(width / LETTER)), "title_fontsize": 14, "frameon": False}
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=beside, **look)
        figure.supylabel(as_text(study.labels.get(axis.name, axis.label)), fontsize=14)
        figure.supxlabel(caption, fontsize=13, color="0.3", x=0.01, ha="left")
    return figure


class CurveRows:
    """The curves of each row by the name of their series, what they have in common, and the ends of their scales."""

    def __init__(self, rows: Sequence[Mapping[str, LossCurve]]) -> None:
        self.rows = rows
        curves = {(place, name): curve for place, row in enumerate(rows) for name, curve in row.items()}
        alike = [side for side in SIDES if len(distinct(curves, side)) == 1]
        self.fixed = alike if len(alike) == 1 else []  # while the other side is what is varied
        self.split = any(len(distinct(row, side)) > 1 for row in rows for side in SIDES)
        sides = [curve.finite(side) for curve in curves.values() for side in SIDES]
        self.lowest = min(low if (low := float(side.min())) < -1e-6 * _peak([side]) else 0.0 for side in sides)
        self.peaks = [_peak(curve.finite(side) for curve in row.values() for side in SIDES) for row in rows]
        peaks = [peak for side in sides if (peak := _peak([side])) > 0] or [1.0]
        # As high as half of each curve needs: one that is large everywhere would be out of sight.
        common = min(max(peaks), max(CUT * median(peaks), *(float(side.abs().median()) for side in sides)))
        flat, steep = min(self.peaks) < FLAT * common, STEEP * median(peaks)
        self.tops = [peak or common for peak in self.peaks] if flat else [common] * len(rows)
        # Beyond these the scale is logarithmic.
        self.linear = [10.0 ** round(math.log10(median(peaks))) if top > steep else math.inf for top in self.tops]


K = TypeVar("K", bound=Hashable)


def distinct(curves: Mapping[K, LossCurve], side: Side) -> Mapping[K, LossCurve]:
    """The curves that a side is to be drawn with: the first alone where all are alike there."""
    name, first = next(iter(curves.items()))
    near: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-9, "equal_nan": True}
    alike = all(torch.allclose(getattr(first, side), getattr(curve, side), **near) for curve in curves.values())
    return {name: first} if alike else curves


def _peak(weights: Iterable[torch.Tensor]) -> float:
    return max(float(side.abs().max()) for side in weights)


def _whole_row(side: Side, curves: CurveRows) -> dict[str, Any]:
    """The look of a curve that all losses of a row share."""
    number = SIDES.index(side)
    if side in curves.fixed:
        return {"color": GREY, "linestyle": STYLES[number], "linewidth": THIN, "zorder": 2.5}
    look = {"color": BLACK} if curves.split else {"color": PALETTE[number], "linestyle": STYLES[number], "zorder": 4}
    return {**look, "linewidth": BOLD}


def _draw_curves(panel: Axes, place: int, sides: Sequence[Side], looks: Looks, curves: CurveRows) -> None:
    top, linear = curves.tops[place], curves.linear[place]
    _scale(panel, top, max(-top, curves.lowest), linear)
    for side in sides:
        row = distinct(curves.rows[place], side)
        for number, (name, curve) in enumerate(row.items()):
            # The later the thinner, so that curves that lie on each other are all seen.
            width = WIDEST - (WIDEST - THIN) * number / max(1, len(row) - 1)
            look = {**looks[name], "marker": "", "linewidth": width} if len(row) > 1 else _whole_row(side, curves)
            panel.plot(SIMILARITY, getattr(curve, side), label=name if len(row) > 1 else side, **look)
        peak = _peak([curve.finite(side)])
        if len(row) == 1 and 0 < peak <= FAINT * min(top, linear):
            middle = float(SIMILARITY[getattr(curve, side).abs() > peak / 2].mean())
            written = panel.annotate(f"{peak:.2g}", (middle, 0), (0, 3), textcoords="offset points", ha="center")
            written.set_color(look["color"])


def _scale(panel: Axes, top: float, bottom: float, linear: float) -> None:
    panel.axhline(0, color="0.6", linewidth=0.8, zorder=1)
    power = 10.0 ** math.floor(math.log10(top * 1.001))
    if linear < power:  # the linear part is as high as four decades, with room for its two numbers
        panel.set_yscale("symlog", linthresh=linear, linscale=4)
        panel.yaxis.set_minor_locator(NullLocator())
        # As much room as on a linear scale: a tenth of the height at either end.
        panel.set(yticks=[0, linear, power], ylim=(bottom - 0.4 * linear, top * (top / linear) ** 0.15))
    else:
        step = power * max(factor for factor in (1, 2, 5) if factor * power <= top * 1.001)
        panel.set(yticks=[-step, 0, step] if bottom <= -step else [0, step], ylim=(bottom - 0.1 * top, 1.1 * top))
    panel.set(xlim=(-1, 1), xticks=[-1, -0.5, 0, 0.5, 1])
    for scale in (panel.xaxis, panel.yaxis):
        scale.set_major_formatter("{x:g}")


def _draw_metric(panel: Axes, metric: str, in_row: Mapping[str, Row], looks: Looks, rows: Sequence[Row]) -> None:
    means = {row.point.key: row.means[metric] for row in rows}
    owners: dict[str, list[str]] = {}  # colours by the baseline
    for place, (name, look) in enumerate(looks.items()):
        row = in_row.get(name)
        if row is not None and row.baseline is not None and means[row.baseline.key].n:
            owners.setdefault(row.baseline.key, []).append(look["color"])
        if row is not None and (mean := row.means[metric]).n:
            bar: dict[str, Any] = {"xerr": None if math.isnan(mean.low) else mean.high - mean.mean, "capsize": 3}
            panel.errorbar(mean.mean, place, label=name, linewidth=1.6, markersize=6, zorder=4, **bar, **look)
    for key, colours in owners.items():  # a baseline of several series is none's own, and so is the only one
        colour = colours[0] if len(colours) == 1 < len(owners) else BASELINE
        panel.axvline(means[key].mean, color=colour, linewidth=1.1, zorder=2)
    if not panel.containers:
        panel.text(0.5, 0.5, "no result", transform=panel.transAxes, ha="center", va="center", color="0.3")
    middle, half = (len(looks) - 1) / 2, max(2.5, 0.6 * len(looks))
    panel.set(yticks=[], ylim=(middle + half, middle - half), xlim=limits(list(means.values())))
    panel.xaxis.set_major_locator(MaxNLocator(4))


def _handles(study: StudyFile, looks: Looks, curves: CurveRows) -> dict[str, Line2D]:
    """Handles of the legend, by their labels."""
    shown: dict[str, dict[str, Any]] = {}
    if not curves.split:
        same = {side: ", the same in all rows" if side in curves.fixed else "" for side in SIDES}
        shown = {f"{side}s{same[side]}": _whole_row(side, curves) for side in SIDES}
    for name, look in looks.items() if len(looks) > 1 else ():
        shown[name] = {**look, "linewidth": 2} if curves.split else {**look, "linestyle": "none"}
    for side in set(SIDES) - set(curves.fixed) if curves.split else ():
        if any(len(distinct(row, side)) == 1 for row in curves.rows):
            shown["the same in all of a row"] = _whole_row(side, curves)
    if study.baseline:
        wanted = ", ".join(f"{axis}={variant}" for axis, variant in study.baseline.items())
        shown[f"mean of the baseline ({wanted})"] = {"color": BASELINE, "linewidth": 1.1}
    return {as_text(label): Line2D([], [], **look) for label, look in shown.items()}


def _caption(names: Sequence[str], curves: CurveRows) -> str:
    text = []
    flags = {name: {curve.at_context for curve in row.values()} for name, row in zip(names, curves.rows, strict=True)}
    which = [name + " (some)" * (False in flags[name]) for name in names if True in flags[name]]
    if which:
        listed = "all rows" if all(row == {True} for row in flags.values()) else ", ".join(which)
        text.append(f"Curves that depend on the anchor's other pairs, drawn at {Context()}: {listed}.")
    if len(set(curves.tops)) > 1:
        text.append("Each row of curves has a scale of its own.")
    steep = {name: linear for name, linear in zip(names, curves.linear, strict=True) if math.isfinite(linear)}
    if steep:
        text.append(f"That of {', '.join(steep)} is logarithmic above {min(steep.values()):g}.")
    if any(curve.of_draws for row in curves.rows for curve in row.values()):
        text.append(f"Where the mining draws, a curve is the mean of {DRAWS} draws.")
    ends = zip(names, curves.peaks, curves.tops, strict=True)
    cut = [f"{name} (up to {peak:.3g})" for name, peak, top in ends if peak > 1.1 * top]
    return " ".join([*text, f"Cut off at the top: {', '.join(cut)}."] if cut else text)
