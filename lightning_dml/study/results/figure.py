"""The figure of a study: its metrics, and the differences from the baseline, against one axis.

Each panel has the mean and the interval over the seeds for each variant.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from lightning_dml.report.curve_figure import FONTS, MARKERS
from lightning_dml.report.saving import as_text
from lightning_dml.study.plan.study_file import Axis, StudyFile
from lightning_dml.study.results.statistics import Mean
from lightning_dml.study.results.summary import Row

# Okabe and Ito's colours, without the yellow, which is lost on white; style and marker tell more series apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
STYLES = ("-", "--", ":")
APART = 5.0  # points between the series
ROOM = 0.08  # beside the data, as a part of their span
LOG_SPAN = 20.0  # values that differ by more are shown on a logarithmic axis
FRACTIONS = ("recall@", "precision@", "map@", "ndcg@", "r_precision", "mrr", "nmi", "ami")
PANEL, HEIGHT = 6.6, 2.7  # inches, with the names of its axis
LABEL = 24  # letters that fit beside a panel
LETTER = 0.11  # inches of a legend, with room to spare
TITLE = 58  # letters in a line of the title, which must end before the legend


@dataclass(frozen=True)
class Panel:
    """One panel and what it shows.

    Args:
        label: of its upward axis.
        mean: of a grid point; None where there is nothing to show.
        zero: whether it has a line there, which is the baseline.
    """

    label: str
    mean: Callable[[Row], Mean | None]
    zero: bool = False


def panels_of(study: StudyFile, rows: Sequence[Row]) -> list[Panel]:
    """A panel for each metric, and after the study's own one a panel for the differences from the baseline."""
    panels = [Panel(metric_label(study, name), partial(_mean, name)) for name in study.metrics]
    if any(row.comparison is not None and row.comparison.difference.n for row in rows):
        wanted = ", ".join(f"{axis}={variant}" for axis, variant in study.baseline.items())
        label = as_text(f"difference in {study.metric} from {wanted}")
        panels.insert(study.metrics.index(study.metric) + 1, Panel(label, _difference, zero=True))
    return panels


def _mean(name: str, row: Row) -> Mean:
    return row.means[name]


def _difference(row: Row) -> Mean | None:
    return None if row.comparison is None else row.comparison.difference


def figure_of(study: StudyFile, axis: Axis, rows: Sequence[Row]) -> Figure:
    """A line for each combination of the other axes, in the order of the study file, in each of the panels."""
    with matplotlib.rc_context(FONTS):
        return _drawn(study, axis, rows)


def _drawn(study: StudyFile, axis: Axis, rows: Sequence[Row]) -> Figure:
    series = series_of(study, axis, rows)
    by_place = sorted(zip(axis.numbers or range(len(axis.variants)), axis.variants, strict=True))
    places, order = [float(place) for place, _ in by_place], [variant for _, variant in by_place]
    several, panels = len(series) > 1, panels_of(study, rows)
    legend = 0.9 + LETTER * max(len(others) for others in series) if several else 0.0
    figure = Figure(figsize=(PANEL + legend, 1.1 + HEIGHT * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, place + 1)
        if panel.zero:
            axes.axhline(0, color="0.35", linewidth=1.1, zorder=1.5)
        for number, (others, by_variant) in enumerate(series.items()):
            means = [panel.mean(by_variant[variant]) if variant in by_variant else None for variant in order]
            # Side by side in points, as intervals at one place would hide each other.
            shift = ScaledTranslation(APART * (number - (len(series) - 1) / 2) / 72, 0, figure.dpi_scale_trans)
            _draw(axes, places, means, others, number, bool(axis.numbers) or several, shift)
        _scale(axes, axis, places, [as_text(name) for name in order])
        axes.tick_params(labelbottom=place == len(panels) - 1)  # long names would take the room of the panels
        # Set by hand, as matplotlib does not count data that are shifted by points.
        axes.set_ylim(limits([mean for row in rows if (mean := panel.mean(row)) is not None]))
        axes.set_ylabel("\n".join(_in_lines(panel.label)))
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.axes[-1].set_xlabel(as_text(study.labels.get(axis.name, axis.label)))
    if several:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
    title = f"{study.name}: mean and 95% interval over {seeds_in(study, rows)}"
    figure.suptitle(textwrap.fill(title, TITLE), fontsize=14, x=0.01, ha="left")
    return figure


def series_of(study: StudyFile, axis: Axis, rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """The rows by the variants of the other axes and then that of this one, in the order of the study file."""
    variants = [list(any_axis.variants) for any_axis in study.axes]
    series: dict[str, dict[str, Row]] = {}

    def in_the_file(row: Row) -> list[int]:
        return [names.index(name) for names, name in zip(variants, row.point.choice.values(), strict=True)]

    for row in sorted(rows, key=in_the_file):
        others = ", ".join(f"{name}={variant}" for name, variant in row.point.choice.items() if name != axis.name)
        series.setdefault(others, {})[row.point.choice[axis.name]] = row
    return series


def metric_label(study: StudyFile, name: str) -> str:
    """The name that the figures give a metric, with the unit where it is known."""
    return as_text(study.labels.get(name, _with_unit(name)))


def seeds_in(study: StudyFile, rows: Sequence[Row]) -> str:
    """The number of seeds of the points, such as "3 seeds" or "0 to 2 seeds"."""
    seeds = sorted({row.means[study.metric].n for row in rows})
    count = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"{count} seed{'s' * (seeds[-1] != 1)}"


def limits(means: Sequence[Mean]) -> tuple[float, float] | None:
    """The ends of a scale that shows all means and intervals; None if there is nothing to show."""
    bounds = [bound for mean in means for bound in (mean.mean, mean.low, mean.high) if not math.isnan(bound)]
    if not bounds:
        return None
    room = ROOM * (max(bounds) - min(bounds)) or 0.05 * abs(bounds[0]) or 1.0
    return min(bounds) - room, max(bounds) + room


def _in_lines(label: str) -> list[str]:
    """The lines of a label, with few enough letters in each to stand beside a panel."""
    return [line for part in label.split("\n") for line in textwrap.wrap(part, LABEL)]


def _draw(
    axes: Axes,
    places: Sequence[float],
    means: Sequence[Mean | None],
    label: str,
    number: int,
    joined: bool,
    shift: ScaledTranslation,
) -> None:
    """One line, which is broken where the grid has no such point or the point no result."""
    shown = [mean if mean is not None and mean.n else None for mean in means]
    axes.errorbar(
        places,
        [math.nan if mean is None else mean.mean for mean in shown],
        yerr=[0.0 if mean is None or math.isnan(mean.low) else mean.high - mean.mean for mean in shown],
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        linestyle=STYLES[number // len(COLOURS) % len(STYLES)] if joined else "none",
        markersize=6,
        linewidth=1.6,
        capsize=3,
        label=as_text(label),
        transform=axes.transData + shift,
    )


def _scale(axes: Axes, axis: Axis, places: Sequence[float], order: Sequence[str]) -> None:
    if not axis.numbers:
        long = any(len(name) > 12 for name in order) or len(order) > 6
        axes.set_xticks(range(len(order)), order, rotation=30 if long else 0, ha="right" if long else "center")
        axes.set_xlim(-0.5, len(order) - 0.5)
        return
    low, high = places[0], places[-1]
    if low > 0 and high / low >= LOG_SPAN:
        axes.set_xscale("log")
        room = (high / low) ** ROOM
        axes.set_xlim(low / room, high * room)
    else:
        axes.set_xlim(low - ROOM * (high - low), high + ROOM * (high - low))
    axes.set_xticks(places, order)
    axes.minorticks_off()


def _with_unit(name: str) -> str:
    if name.rpartition("/")[2].startswith(FRACTIONS):
        return f"{name} (fraction)"
    return f"{name}\n(squared distance)" if "/drift/" in f"/{name}" else name
