"""Where things stand in the figure of an axis of losses: all in inches, so that dots and curves are on one height."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

SMALL: dict[str, Any] = {"fontsize": 12, "color": "0.3"}
ROW, LOW_ROW, MANY = 0.72, 0.6, 12  # inches; that of more rows than many
GAP = 0.14  # of the curves, between rows
CURVE, METRIC, BETWEEN, TICKS, EDGE = 2.3, 2.9, 0.4, 0.7, 0.2
SERIES = 0.075  # the least between dots of one row
LINE = 1.25 / 72  # inches of a line of text for each point of its size
LETTER = 0.58 / 72  # the mean width of a letter, likewise


@dataclass(frozen=True)
class Layout:
    """The panels of a figure.

    Args:
        curves: for each row its panels of curves.
        metrics: a panel for each metric, over all rows, where a row's place is its number from the top.
        series: how many dots a row has in each.
    """

    curves: Sequence[Sequence[Axes]]
    metrics: Sequence[Axes]
    series: int

    def offset(self, number: int) -> float:
        """Of a series' dots from the middle of a row, in rows, downward."""
        return min(0.18, 0.76 / self.series) * (number - (self.series - 1) / 2)


def lay_out(
    figure: Figure,
    *,
    title: str,
    handles: Mapping[str, Line2D],
    heading: str,
    names: Sequence[str],
    curve_headings: Sequence[str],
    metrics: Sequence[str],
    caption: str,
    series: int,
) -> Layout:
    """Gives the figure its size, its texts and empty panels.

    Args:
        figure: empty.
        title: above all.
        handles: of the legend, by label.
        heading: above the names.
        names: of the rows.
        curve_headings: above each column of curves.
        metrics: below each metric's panel.
        caption: below all.
        series: how many dots a row has in each metric's panel.
    """
    row = max(ROW if len(names) <= MANY else LOW_ROW, SERIES * series)
    wrapped = [_wrapped(name, 20, 3) for name in names]
    heading = _wrapped(heading, 20, 4)
    metrics = [_wrapped(name, 27, 3) for name in metrics]
    left = EDGE + max(_width(figure, text, 13) for text in (*wrapped, heading)) + TICKS
    columns = [(CURVE, name) for name in curve_headings] + [(METRIC, name) for name in metrics]
    width = left + sum(each for each, _ in columns) + BETWEEN * (len(columns) - 1) + EDGE
    title, caption = (_filled(text, width, size) for text, size in ((title, 14), (caption, 12)))
    lines = max(text.count("\n") + 1 for text in (heading, *curve_headings))
    below = 0.3 + (1 + max(name.count("\n") for name in metrics)) * 14 * LINE
    foot = EDGE + (caption.count("\n") + 1) * 12 * LINE if caption else EDGE
    body = row * len(names)
    figure.set_size_inches(width, 10)  # for the legend's width
    legend = _legend(figure, handles, width)
    above = [EDGE + (title.count("\n") + 1) * 14 * LINE, legend, lines * 14 * LINE + 0.1]
    height = sum(above) + body + below + foot
    figure.set_size_inches(width, height)

    def box(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
        """Of a panel, from inches from the left and from the top."""
        return x / width, 1 - (y + h) / height, w / width, h / height

    figure.text(0.5, 1 - EDGE / height, title, fontsize=14, ha="center", va="top")
    if figure.legends:
        figure.legends[0].set_bbox_to_anchor((0.5, 1 - above[0] / height))
    start = sum(above)
    text_y = 1 - (start - 0.1) / height
    figure.text((left - TICKS) / width, text_y, heading, fontsize=13, ha="right", va="bottom")
    for place, text in enumerate(wrapped):
        y = 1 - (start + (place + 0.5) * row) / height
        figure.text((left - TICKS) / width, y, text, fontsize=13, ha="right", va="center", linespacing=1.05)
    panels: list[list[Axes]] = [[] for _ in names]
    over_all = []
    x = left
    for number, (wide, text) in enumerate(columns):
        if number < len(curve_headings):
            figure.text((x + wide / 2) / width, text_y, text, fontsize=13, ha="center", va="bottom")
            for place, held in enumerate(panels):
                panel = figure.add_axes(box(x, start + (place + GAP / 2) * row, wide, (1 - GAP) * row))
                _curve_panel(panel, place == len(names) - 1, number == 0)
                held.append(panel)
        else:
            panel = figure.add_axes(box(x, start, wide, body))
            _metric_panel(panel, len(names), text)
            over_all.append(panel)
        x += wide + BETWEEN
    if caption:
        figure.text(EDGE / width, EDGE / height, caption, va="bottom", **SMALL)
    return Layout(panels, over_all, series)


def _curve_panel(panel: Axes, last: bool, first: bool) -> None:
    panel.set_xlim(-1, 1)
    panel.set_xticks([-1, -0.5, 0, 0.5, 1])
    for scale in (panel.xaxis, panel.yaxis):
        scale.set_major_formatter(lambda value, _: _tick(value))
    panel.grid(axis="x", alpha=0.35)
    panel.tick_params(labelsize=12, labelbottom=last, labelleft=first, length=3)
    panel.spines[["top", "right"]].set_visible(False)
    if last:
        panel.set_xlabel("cosine similarity S")


def _tick(value: float) -> str:
    """At most five letters, which is what stands between the names and the panels: 2e8 and not 2e+08."""
    text = f"{value:g}"
    if value and not 1e-2 <= abs(value) < 1e4:
        factor, exponent = f"{value:.0e}".split("e")
        text = f"{factor}e{int(exponent)}"
    return text.replace("-", "\N{MINUS SIGN}")


def _metric_panel(panel: Axes, rows: int, label: str) -> None:
    panel.set_ylim(rows - 0.5, -0.5)
    panel.set_yticks([])
    panel.grid(axis="x", alpha=0.35)
    panel.set_axisbelow(True)
    for place in range(1, rows):
        panel.axhline(place - 0.5, color="0.85", linewidth=0.8, zorder=1)
    panel.tick_params(labelsize=12, length=3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel(label)


def _legend(figure: Figure, handles: Mapping[str, Line2D], width: float) -> float:
    """Puts the legend at the top, in as many columns as fit, and returns its height in inches."""
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(
            handles.values(),
            handles.keys(),
            loc="upper center",
            bbox_to_anchor=(0.5, 1.0),
            borderaxespad=0.2,
            ncols=columns,
            frameon=False,
            handlelength=2.4,
        )
        extent = legend.get_window_extent()
        if columns == 1 or extent.width / figure.dpi <= width - 2 * EDGE:
            return float(extent.height) / figure.dpi + 0.12
        legend.remove()
    return 0.0


def _wrapped(text: str, letters: int, lines: int) -> str:
    return "\n".join(textwrap.wrap(text, letters, max_lines=lines, placeholder=" \N{HORIZONTAL ELLIPSIS}"))


def _filled(text: str, width: float, size: float) -> str:
    """In lines of a width in inches."""
    return textwrap.fill(text, int((width - 2 * EDGE) / size / LETTER), break_on_hyphens=False)


def _width(figure: Figure, text: str, size: float) -> float:
    """Of a text in inches."""
    drawn = figure.text(0, 0, text, fontsize=size)
    width = float(drawn.get_window_extent().width) / figure.dpi
    drawn.remove()
    return width
