"""The figure of an axis of losses: the weight curve of each variant, and beside it the metrics that it brought."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from lightning_dml.losses import Context
from lightning_dml.losses.inspection.weight_curves import DRAWS
from lightning_dml.report.curve_figure import FONTS, MARKERS, PALETTE, STYLES, LineStyle
from lightning_dml.report.saving import as_text
from lightning_dml.study.plan.study_file import Axis, StudyFile
from lightning_dml.study.results.curve_layout import SMALL, Layout, lay_out
from lightning_dml.study.results.figure import limits, metric_label, seeds_in, series_of
from lightning_dml.study.results.loss_curves import SIDES, SIMILARITY, LossCurve, Side, alike, curves_of
from lightning_dml.study.results.summary import Row

COLOURS = dict(zip(SIDES, PALETTE, strict=False))
SIDE_STYLES = dict(zip(SIDES, STYLES, strict=False))
BLACK, GREY, BASELINE = "#000000", "0.55", "0.35"
BOLD, THIN, WIDEST = 2.6, 1.3, 3.8  # points
CUT = 2.0  # weights are cut off at this many times the median of the curves' largest
FLAT = 0.1  # of the common scale: where the curves of a row stay below, each row has a scale of its own
FAINT = 0.05  # of a row's scale: a curve that stays below has its largest weight written on it
STEEP = 1e3  # times the median of the curves' largest: a row that goes higher has a logarithmic scale
LINEAR = 4.0  # decades' height of the part of a logarithmic scale that is linear, with room for its two numbers


@dataclass(frozen=True)
class Series:
    """One combination of the other axes' variants.

    Args:
        name: of the combination.
        rows: by the variant of this axis, as far as there are points.
        colour: of its dots, and of its curves where it has curves of its own.
        style: of these curves.
        marker: of the dots.
    """

    name: str
    rows: Mapping[str, Row]
    colour: str
    style: LineStyle
    marker: str


@dataclass(frozen=True)
class Curves:
    """What the columns of curves show.

    Args:
        by_row: for each row the curves by the name of the series.
        split: whether the curves of a row differ, so that positives and negatives have a column each.
        fixed: sides that are the same everywhere, while the other is what is varied.
        tops: of the scale of each row.
        linear: up to where each scale is linear; it is logarithmic beyond.
    """

    by_row: Sequence[Mapping[str, LossCurve]]
    split: bool
    fixed: tuple[Side, ...]
    tops: Sequence[float]
    linear: Sequence[float]

    @classmethod
    def of(cls, by_row: Sequence[Mapping[str, LossCurve]]) -> Curves:
        """Finds what differs and sets the scales."""
        rows = [list(each.values()) for each in by_row]
        everywhere = [curve for each in rows for curve in each]
        fixed = tuple(side for side in SIDES if alike(everywhere, side))
        split = any(not alike(each, side) for each in rows for side in SIDES)
        peaks = [peak for curve in everywhere for side in SIDES if (peak := curve.peak(side)) > 0] or [1.0]
        # As high as half of each curve needs: one that is large everywhere would be out of sight.
        halves = [curve.usual(side) for curve in everywhere for side in SIDES]
        common = min(max(peaks), max(CUT * statistics.median(peaks), *halves))
        own = [max(curve.peak() for curve in each) for each in rows]
        tops = [common] * len(rows) if min(own) >= FLAT * common else [each or common for each in own]
        usual = statistics.median(peaks)
        linear = [10.0 ** round(math.log10(usual)) if top > STEEP * usual else math.inf for top in tops]
        return cls(by_row, split, fixed if len(fixed) == 1 else (), tops, linear)

    @property
    def lowest(self) -> float:
        """The lowest weight, 0 where none is negative."""
        return min(curve.lowest for each in self.by_row for curve in each.values())


def curve_axis_figure(study: StudyFile, axis: Axis, rows: Sequence[Row]) -> Figure:
    """Draws a row for each variant: its weight curve, and means and intervals of all metrics.

    Where the losses of a row differ by the other axes, positives and negatives have a column each, and the curves the
    colours of the dots. All curves have one scale, unless some would be flat on it; what is far above the median of
    the curves' largest weights is cut off, or on a logarithmic scale where each row has its own, and the caption says
    so.

    Args:
        study: the study.
        axis: one whose variants are losses; see `chooses_the_loss`.
        rows: of all points.

    Returns:
        A figure, not known to pyplot.

    Raises:
        InputError: naming the first point whose loss cannot be built or has no weight curve.
    """
    by_key = curves_of(row.point for row in rows)
    found = series_of(study, axis, rows)
    order = [variant for variant in axis.variants if any(variant in held for held in found.values())]
    curves = Curves.of(
        [
            {others: by_key[held[variant].point.key] for others, held in found.items() if variant in held}
            for variant in order
        ]
    )
    series = _series(found, curves.split)
    with matplotlib.rc_context(FONTS):
        figure = Figure()
        FigureCanvasAgg(figure)
        layout = lay_out(
            figure,
            title=f"{study.name}: weight curves, mean and 95% interval over {seeds_in(study, rows)}",
            handles=_handles(study, series, curves),
            heading=as_text(study.labels.get(axis.name, axis.label)),
            names=[as_text(name) for name in order],
            curve_headings=_headings(curves),
            metrics=[metric_label(study, name) for name in study.metrics],
            caption=as_text(_caption(order, curves)),
            series=len(series),
        )
        columns: list[tuple[Side, ...]] = [("positive",), ("negative",)] if curves.split else [SIDES]
        for panels, of_row, top, linear in zip(layout.curves, curves.by_row, curves.tops, curves.linear, strict=True):
            for panel, sides in zip(panels, columns, strict=True):
                _frame(panel, top, max(-top, curves.lowest), linear)
                for side in sides:
                    _draw_curves(panel, of_row, side, series, curves)
                    _name_if_faint(panel, of_row, side, FAINT * min(top, linear), _look(side, curves)["color"])
        for panel, metric in zip(layout.metrics, study.metrics, strict=True):
            _draw_metric(panel, metric, order, series, {row.point.key: row for row in rows}, layout)
    return figure


def _series(found: Mapping[str, Mapping[str, Row]], split: bool) -> list[Series]:
    # The first two colours are those of positives and negatives where these share a panel.
    colours = PALETTE if split else (BLACK,) if len(found) == 1 else PALETTE[2:]
    return [
        Series(name, held, colours[k % len(colours)], STYLES[k % len(STYLES)], MARKERS[k % len(MARKERS)])
        for k, (name, held) in enumerate(found.items())
    ]


def _look(side: Side, curves: Curves) -> dict[str, Any]:
    """Of a curve that is that of the whole row."""
    if side in curves.fixed:
        return {"color": GREY, "linestyle": SIDE_STYLES[side], "linewidth": THIN, "zorder": 2.5}
    if curves.split:
        return {"color": BLACK, "linewidth": BOLD}
    return {"color": COLOURS[side], "linestyle": SIDE_STYLES[side], "linewidth": BOLD, "zorder": 4}


def _draw_curves(
    panel: Axes, of_row: Mapping[str, LossCurve], side: Side, series: Sequence[Series], curves: Curves
) -> None:
    drawn = list(of_row.values())
    if alike(drawn, side):
        panel.plot(SIMILARITY.numpy(), drawn[0].side(side).numpy(), label=side, **_look(side, curves))
        return
    held = [each for each in series if each.name in of_row]
    for number, each in enumerate(held):
        # The later the thinner, so that curves that lie on each other are all seen.
        width = WIDEST - (WIDEST - THIN) * number / max(1, len(held) - 1)
        weights = of_row[each.name].side(side)
        look: dict[str, Any] = {"color": each.colour, "linestyle": each.style, "linewidth": width}
        panel.plot(SIMILARITY.numpy(), weights.numpy(), label=each.name, **look)


def _name_if_faint(panel: Axes, of_row: Mapping[str, LossCurve], side: Side, faint: float, colour: str) -> None:
    """Writes the largest weight on a curve that is hardly above 0 on its scale, over the middle of where it is one."""
    curve = next(iter(of_row.values()))
    peak = curve.peak(side)
    if peak > faint or not peak or not alike(list(of_row.values()), side):
        return
    place = float(SIMILARITY[curve.side(side).abs() > peak / 2].mean())
    text = f"{peak:.2g}".replace("-", "\N{MINUS SIGN}")
    offset: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points"}
    panel.annotate(text, (place, 0), ha="center", va="bottom", fontsize=12, color=colour, **offset)


def _frame(panel: Axes, top: float, bottom: float, linear: float) -> None:
    power = 10.0 ** math.floor(math.log10(top * 1.001))
    if linear < power:
        shown = panel.yaxis.get_major_formatter()
        panel.set_yscale("symlog", linthresh=linear, linscale=LINEAR)
        panel.yaxis.set_major_formatter(shown)
        panel.yaxis.set_minor_locator(NullLocator())
        panel.set_yticks([0, linear, power])
        # As much room as on a linear scale: a tenth of the height at either end.
        panel.set_ylim(bottom - 0.4 * linear, top * (top / linear) ** 0.15)
    else:
        step = power * max(factor for factor in (1, 2, 5) if factor * power <= top * 1.001)
        panel.set_yticks([-step, 0, step] if bottom <= -step else [0, step])
        panel.set_ylim(bottom - 0.1 * top, 1.1 * top)
    panel.axhline(0, color="0.6", linewidth=0.8, zorder=1)


def _draw_metric(
    panel: Axes, metric: str, order: Sequence[str], series: Sequence[Series], rows: Mapping[str, Row], layout: Layout
) -> None:
    for number, each in enumerate(series):
        means = [each.rows[name].means[metric] if name in each.rows else None for name in order]
        shown = [mean if mean is not None and mean.n else None for mean in means]
        panel.errorbar(
            [math.nan if mean is None else mean.mean for mean in shown],
            [place + layout.offset(number) for place in range(len(order))],
            xerr=[math.nan if mean is None else mean.high - mean.mean for mean in shown],
            color=each.colour,
            marker=each.marker,
            linestyle="none",
            markersize=6 if len(series) <= 6 else 5,
            linewidth=1.6,
            capsize=3,
            label=each.name,
            zorder=4,
        )
    for place, name in enumerate(order):
        held = [each for each in series if name in each.rows]
        if not any(each.rows[name].means[metric].n for each in held):
            across = panel.get_yaxis_transform()
            panel.text(0.5, place, "no result", transform=across, ha="center", va="center", **SMALL)
        # A baseline of several series is none's own, and so is the only one.
        colours: dict[str, str] = {}
        for each in held:
            baseline = each.rows[name].baseline
            if baseline is not None and rows[baseline.key].means[metric].n:
                colours[baseline.key] = BASELINE if baseline.key in colours else each.colour
        for key, colour in colours.items():
            look: dict[str, Any] = {"color": BASELINE if len(colours) == 1 else colour, "linewidth": 1.1, "zorder": 2}
            panel.vlines(rows[key].means[metric].mean, place - 0.5, place + 0.5, **look)
    panel.set_xlim(limits([row.means[metric] for row in rows.values()]))
    panel.xaxis.set_major_locator(MaxNLocator(4))


def _handles(study: StudyFile, series: Sequence[Series], curves: Curves) -> dict[str, Line2D]:
    """Of the legend, by label."""
    handles: dict[str, Line2D] = {}
    if not curves.split:
        for side in SIDES:
            label = f"{side}s{', the same in all rows' if side in curves.fixed else ''}"
            handles[label] = Line2D([], [], **_look(side, curves))
    if len(series) > 1:
        for each in series:
            look: dict[str, Any] = {"linestyle": each.style if curves.split else "none", "linewidth": 2}
            handles[as_text(each.name)] = Line2D([], [], color=each.colour, marker=each.marker, **look)
    for side in SIDES if curves.split else ():
        if side not in curves.fixed and any(alike(list(each.values()), side) for each in curves.by_row):
            handles["the same in all of a row"] = Line2D([], [], **_look(side, curves))
    if study.baseline:
        wanted = ", ".join(f"{axis}={variant}" for axis, variant in study.baseline.items())
        handles[as_text(f"mean of the baseline ({wanted})")] = Line2D([], [], color=BASELINE, linewidth=1.1)
    return handles


def _headings(curves: Curves) -> list[str]:
    unit = "|dL/dS| per anchor" if curves.lowest == 0 else "\N{MINUS-OR-PLUS SIGN}dL/dS per anchor"
    if not curves.split:
        return [f"weight,\n{unit}"]
    return [f"weight of {side}s{', all alike' if side in curves.fixed else ''},\n{unit}" for side in SIDES]


def _caption(order: Sequence[str], curves: Curves) -> str:
    in_row = dict(zip(order, (each.values() for each in curves.by_row), strict=True))
    wholly = [name for name, each in in_row.items() if all(curve.at_context for curve in each)]
    partly = [name for name, each in in_row.items() if any(curve.at_context for curve in each) and name not in wholly]
    text = []
    if wholly or partly:
        which = [_listed(wholly, order)] if wholly else []
        which += [f"some curves of {_listed(partly, order)}"] if partly else []
        text.append(f"Curves that depend on the anchor's other pairs, drawn at {Context()}: {'; '.join(which)}.")
    if len(set(curves.tops)) > 1:
        text.append("Each row of curves has a scale of its own.")
    steep = [(name, linear) for name, linear in zip(order, curves.linear, strict=True) if math.isfinite(linear)]
    if steep:
        text.append(f"That of {', '.join(name for name, _ in steep)} is logarithmic above {steep[0][1]:g}.")
    if any(curve.of_draws for each in in_row.values() for curve in each):
        text.append(f"Where the mining draws, a curve is the mean of {DRAWS} draws.")
    peaks = {name: max(curve.peak() for curve in each) for name, each in in_row.items()}
    cut = [name for name, top in zip(order, curves.tops, strict=True) if peaks[name] > 1.1 * top]
    if 0 < len(cut) <= 3:
        text.append(f"Cut off at the top: {', '.join(f'{name} (up to {peaks[name]:.3g})' for name in cut)}.")
    elif cut:
        text.append(f"Cut off at the top: {_listed(cut, order)} (up to {max(peaks.values()):.3g}).")
    return " ".join(text)


def _listed(names: Sequence[str], order: Sequence[str]) -> str:
    return "all rows" if len(names) == len(order) else ", ".join(names)
