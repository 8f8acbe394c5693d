"""The figure of weight curves: weight against similarity of several losses, over the pairs of a real batch."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from lightning_dml.errors import InputError
from lightning_dml.losses import Context, ObservedWeights, weight_curve
from lightning_dml.losses.inspection.observed import ObservedSide
from lightning_dml.report.saving import as_text, save_figure

FONTS: Any = {"font.size": 13, "axes.titlesize": 14, "axes.labelsize": 14, "legend.fontsize": 13}
"""Legible at half size."""

LineStyle = str | tuple[int, tuple[float, ...]]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
"""Colours of Okabe and Ito that the colour-blind tell apart, without their yellow, which is faint on white."""

STYLES: tuple[LineStyle, ...] = ("-", "--", "-.", ":", (0, (5, 1.2, 1, 1.2, 1, 1.2)))
"""As many as have no factor in common with the colours: each loss has a pair of its own."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Marks of points, so that these are told apart without colour too."""

PAIRS = ", pairs of a batch"
LETTERS = 96  # of a caption fit in a line

Side = Literal["positive", "negative"]
SIDES: tuple[Side, Side] = ("positive", "negative")
TITLES = {"positive": "Positives: pull together", "negative": "Negatives: push apart"}


class DrawnCurve(NamedTuple):
    """A weight curve as points.

    Attributes:
        similarity: (n,) ascending cosine similarities.
        positive: (n,) weights of positives, per anchor.
        negative: (n,) weights of negatives.
    """

    similarity: Tensor
    positive: Tensor
    negative: Tensor

    @classmethod
    def of(cls, loss: nn.Module, similarity: Tensor, context: Context | None = None) -> DrawnCurve:
        """The curve of a loss at the similarities (n,); see `weight_curve`."""
        return cls(similarity, *weight_curve(loss, similarity, context=context))


def curve_figure(
    curves: Mapping[str, DrawnCurve],
    observed: Mapping[str, ObservedWeights] | None = None,
    *,
    relative: bool = False,
    caption: str | None = None,
) -> Figure:
    """Draws weight curves, positives and negatives apart, on the pairs of a batch where there are some.

    Each loss has a colour, a line style and a mark of its own. Observed weights are marks in the colour of the loss of
    the same name, multiplied by the number of anchors so that they lie where its curve is. A strip above them shows the
    density of the pairs over similarity. The height is that of what lies between -0.98 and 0.98, as losses on
    distances have infinite weights at 1.

    Args:
        curves: by the name that the legend gives.
        observed: what `observed_weights` saw, by name; all of one batch, for the density is that of the first.
        relative: divides the weights of each loss by the largest that is shown of it on that side, so that shapes can
            be compared where scales differ.
        caption: a line below, such as the context of the curves.

    Returns:
        A figure of 11 x 5.6 inches, or 11 x 6.8 with a strip, not known to pyplot.

    Raises:
        InputError: with nothing to draw, or with more than 35 losses.
    """
    observed = observed or {}
    names = list(dict.fromkeys((*curves, *observed)))
    if not 1 <= len(names) <= len(PALETTE) * len(STYLES):
        raise InputError(f"curves must be 1 to {len(PALETTE) * len(STYLES)} losses, got {len(names)}")
    looks = dict(zip(names, zip(cycle(PALETTE), cycle(STYLES), cycle(MARKERS), strict=False), strict=False))
    with matplotlib.rc_context({**FONTS, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 6.8 if observed else 5.6), layout="constrained")
        strips: list[Any] = [[f"{side} density" for side in SIDES]] if observed else []
        rows: Any = {"height_ratios": [1, 3]} if observed else {}
        axes = figure.subplot_mosaic([*strips, [*SIDES]], **rows)
        for side in SIDES:
            if observed:
                first = next(iter(observed.values()))
                _density(axes[f"{side} density"], side, _of(first, side), first.edges)
            tops: list[float] = [0.0]
            for name, (colour, style, mark) in looks.items():
                curve, weights = curves.get(name), observed.get(name)
                scale = _scale(curve, weights, side) if relative else 1.0
                if weights is not None:
                    tops += _points(axes[side], weights, side, name, colour, mark, scale)
                if curve is not None:
                    tops += _line(axes[side], curve, side, name, colour, style, scale)
            _frame(axes[side], side, relative, min(tops), max(tops))
            axes[f"{side} density" if observed else side].set_title(TITLES[side])
        _legend(figure)
        if caption:
            lines = [textwrap.fill(line, LETTERS, break_on_hyphens=False) for line in as_text(caption).split("\n")]
            figure.supxlabel("\n".join(lines), fontsize=13, color="0.3")
    return figure


def save_curves(
    figure: Figure,
    curves: Mapping[str, DrawnCurve],
    path_stem: str | Path,
    observed: Mapping[str, ObservedWeights] | None = None,
) -> list[Path]:
    """Writes a figure as PNG and SVG, and its numbers as CSV, each written whole or not at all.

    The table has a row for each point: loss, kind (`curve` or `pair`), side (`positive` or `negative`), similarity and
    weight per anchor, which for pairs is the observed weight times the number of anchors. Rows of kind `density` have
    the middle of a bin and, as density, the share per unit of similarity of all pairs of the side.

    Args:
        figure: from `curve_figure`.
        curves: what it shows.
        path_stem: path without a suffix; folders are made.
        observed: what it shows as points.

    Returns:
        The three paths.
    """
    return save_figure(figure, path_stem, lambda path: _write_table(path, curves, observed or {}))


def _scale(curve: DrawnCurve | None, observed: ObservedWeights | None, side: Side) -> float:
    """The factor by which the largest weight that is shown of a loss on a side, curve and marks alike, becomes 1."""
    shown = []
    if curve is not None:
        shown.append(_inner(curve.similarity, curve.positive if side == "positive" else curve.negative))
    if observed is not None:
        pairs = _of(observed, side)
        shown.append(_inner(pairs.similarity, pairs.weight * observed.anchors))
    largest = max((float(weights.abs().max()) for weights in shown if len(weights)), default=0.0)
    return 1 / largest if largest else 1.0


def _inner(similarity: Tensor, weights: Tensor) -> Tensor:
    """The weights that the height of a figure is made for."""
    return weights[(similarity.abs() <= 0.98) & weights.isfinite()]


def _of(observed: ObservedWeights, side: Side) -> ObservedSide:
    return observed.positives if side == "positive" else observed.negatives


def _line(
    panel: Axes,
    curve: DrawnCurve,
    side: Side,
    name: str,
    colour: str,
    style: LineStyle,
    scale: float,
) -> list[float]:
    weights = (curve.positive if side == "positive" else curve.negative).detach().cpu() * scale
    similarity = curve.similarity.detach().cpu()
    panel.plot(
        similarity.numpy(),
        weights.numpy(),
        color=colour,
        linestyle=style,
        linewidth=2.4,
        label=as_text(name),
        zorder=4,
    )
    inner = _inner(similarity, weights)
    return [float(inner.min()), float(inner.max())] if len(inner) else []


def _points(
    panel: Axes, observed: ObservedWeights, side: Side, name: str, colour: str, mark: str, scale: float
) -> list[float]:
    pairs = _of(observed, side)
    weights = pairs.weight * observed.anchors * scale
    panel.scatter(
        pairs.similarity.numpy(),
        weights.numpy(),
        s=16,
        color=colour,
        marker=mark,
        alpha=0.35,
        linewidths=0,
        label=f"{as_text(name)}{PAIRS}",
        rasterized=True,  # thousands of points are slow to draw in an SVG
        zorder=3,
    )
    inner = _inner(pairs.similarity, weights)
    return [float(inner.min()), float(inner.max())] if len(inner) else []


def _heights(pairs: ObservedSide, edges: Tensor) -> Tensor:
    """Share of the side's pairs per unit of similarity, in each bin."""
    return pairs.counts.double() / max(1, pairs.pairs) / (edges[1] - edges[0])


def _density(strip: Axes, side: Side, pairs: ObservedSide, edges: Tensor) -> None:
    heights = _heights(pairs, edges)
    strip.stairs(heights.numpy(), edges.numpy(), fill=True, color="0.75")
    strip.set(xlim=(-1, 1), xticks=[-1, -0.5, 0, 0.5, 1], ylim=(0, max(1e-9, float(heights.max())) * 1.1))
    strip.tick_params(labelbottom=False)
    strip.yaxis.set_major_locator(MaxNLocator(2))
    if side == SIDES[0]:
        strip.set_ylabel("pairs per\nunit of S", fontsize=13)


def _frame(panel: Axes, side: Side, relative: bool, low: float, high: float) -> None:
    sign = "\N{MINUS SIGN}" if side == "positive" else ""
    unit = "\nrelative to the largest" if relative else " per anchor"
    panel.set_xlabel("cosine similarity S of the pair")
    panel.set_ylabel(f"weight {sign}dL/dS,{unit}")
    panel.set_xlim(-1, 1)
    panel.set_xticks([-1, -0.5, 0, 0.5, 1])
    room = 0.06 * ((high - low) or 1.0)
    panel.set_ylim(low - room, high + room)
    panel.axhline(0, color="0.6", linewidth=0.8, zorder=1)


def _legend(figure: Figure) -> None:
    by_label = {}
    for axes in figure.axes:
        by_label.update(dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)))
    lines = {label: handle for label, handle in by_label.items() if isinstance(handle, Line2D)}
    clouds = {label: handle for label, handle in by_label.items() if isinstance(handle, PathCollection)}
    handles: dict[str, Any] = {**lines, **clouds}
    if len(clouds) > 1 and all(label.removesuffix(PAIRS) in lines for label in clouds):
        # One entry for a loss's line and mark, and one that says what the marks are.
        for label, cloud in clouds.items():
            both = Line2D([], [])
            both.update_from(lines[label.removesuffix(PAIRS)])
            both.set(marker=cloud.get_paths()[0], markersize=7, markeredgewidth=0)
            lines[label.removesuffix(PAIRS)] = both
        grey: Any = {"color": "0.35", "markersize": 5, "linestyle": "none"}
        greys = tuple(Line2D([], [], marker=marker, **grey) for marker in MARKERS[:3])
        handles = {**lines, f"marks: {PAIRS.removeprefix(', ')}": greys}
    columns = min(3, len(handles))
    legend = figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        handlelength=3,
        handler_map={tuple: HandlerTuple(ndivide=None)},
    )
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)


def _write_table(path: Path, curves: Mapping[str, DrawnCurve], observed: Mapping[str, ObservedWeights]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("loss", "kind", "side", "similarity", "weight", "density"))
        for name, curve in curves.items():
            for side in SIDES:
                weights = curve.positive if side == "positive" else curve.negative
                for similarity, weight in zip(curve.similarity.tolist(), weights.tolist(), strict=True):
                    table.writerow((name, "curve", side, similarity, weight, ""))
        for side in SIDES if observed else ():
            first = next(iter(observed.values()))
            middles = (first.edges[:-1] + first.edges[1:]) / 2
            heights = _heights(_of(first, side), first.edges)
            for similarity, height in zip(middles.tolist(), heights.tolist(), strict=True):
                table.writerow(("", "density", side, similarity, "", height))
        for name, weights_of_loss in observed.items():
            for side in SIDES:
                pairs = _of(weights_of_loss, side)
                per_anchor = (pairs.weight * weights_of_loss.anchors).tolist()
                for similarity, weight in zip(pairs.similarity.tolist(), per_anchor, strict=True):
                    table.writerow((name, "pair", side, similarity, weight, ""))
