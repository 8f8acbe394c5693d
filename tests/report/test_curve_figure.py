"""The figure of weight curves: what stands in it and where, and the files that it is written to."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import StepPatch
from PIL import Image
from torch.nn import functional as F

from lightning_dml.errors import InputError
from lightning_dml.losses import (
    Context,
    ContrastiveLoss,
    MultiSimilarityLoss,
    ObservedWeights,
    SupConLoss,
    TripletLoss,
    observed_weights,
)
from lightning_dml.report import DrawnCurve, curve_figure, save_curves
from lightning_dml.report.curve_figure import PALETTE, STYLES
from tests.figures import texts_in_the_way

LOSSES = {
    "contrastive": ContrastiveLoss(),
    "multi-similarity": MultiSimilarityLoss(),
    "SupCon": SupConLoss(),
    "triplet on distance": TripletLoss(measure="distance"),
}


def drawn() -> dict[str, DrawnCurve]:
    """A curve of each loss."""
    return {name: DrawnCurve.of(loss, torch.linspace(-1, 1, 41)) for name, loss in LOSSES.items()}


def seen() -> dict[str, ObservedWeights]:
    """The weights that two of the losses give a batch against a bank."""
    rows = F.normalize(torch.randn(72, 6), dim=1)
    labels = torch.arange(72) % 4
    return {
        name: observed_weights(LOSSES[name], rows[:12], labels[:12], rows[12:], labels[12:])
        for name in ("multi-similarity", "SupCon")
    }


def panels_of(figure: Figure) -> tuple[Axes, Axes]:
    """The panels of positives and negatives."""
    by_name = {str(panel.get_label()): panel for panel in figure.axes}
    return by_name["positive"], by_name["negative"]


def curve_lines(panel: Axes, name: str | None = None) -> list[Line2D]:
    """The curves of a panel, without its zero line; of one loss, or all."""
    lines = [line for line in panel.get_lines() if not str(line.get_label()).startswith("_")]
    return [line for line in lines if name in (None, line.get_label())]


def legend_texts(figure: Figure) -> list[str]:
    """The entries in their order."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_each_side_has_a_panel_with_labelled_axes() -> None:
    """A figure without units cannot be read apart from the text that it was made for."""
    figure = curve_figure(drawn(), caption=f"curves at {Context()}")
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("Positives: pull together", "Negatives: push apart")
    assert left.get_xlabel() == right.get_xlabel() == "cosine similarity S of the pair"
    assert left.get_ylabel() == "weight \N{MINUS SIGN}dL/dS, per anchor"
    assert right.get_ylabel() == "weight dL/dS, per anchor"
    assert figure.get_supxlabel() == "curves at 3 positives at 0.6, 8 negatives from -0.2 to 0.5"
    for panel, side in ((left, "positive"), (right, "negative")):
        lines = {line.get_label(): line for line in panel.get_lines()}
        for name, curve in drawn().items():
            assert torch.equal(torch.as_tensor(lines[name].get_ydata()), getattr(curve, side))


def test_losses_are_told_apart_without_colour() -> None:
    """A printed page and a colour-blind reader have line styles and marks; thirty-five losses stay apart."""
    curve = drawn()["contrastive"]
    figure = curve_figure({f"loss {number}": curve for number in range(len(PALETTE) * len(STYLES))})
    lines: Any = curve_lines(figure.axes[0])
    looks = [(line.get_color(), str(line._dash_pattern)) for line in lines]
    assert len(set(looks)) == len(looks) == 35
    assert len({dashes for _, dashes in looks[:5]}) == 5
    assert "#F0E442" not in PALETTE  # faint on white
    panel, _ = panels_of(curve_figure({}, {f"loss {number}": seen()["SupCon"] for number in range(7)}))
    clouds = [cloud for cloud in panel.collections if isinstance(cloud, PathCollection)]
    marks = {str(np.asarray(cloud.get_paths()[0].vertices).tolist()) for cloud in clouds}
    assert len(marks) == len(clouds) == 7


def test_the_legend_is_outside_the_data() -> None:
    """A legend on the curves hides what it explains."""
    figure = curve_figure(drawn(), seen())
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert not any(box.overlaps(panel.get_window_extent()) for panel in figure.axes)
    assert legend_texts(figure) == [*LOSSES, "marks: pairs of a batch"]
    with_pairs = [line.get_marker() not in ("None", None) for line in figure.legends[0].get_lines()[: len(LOSSES)]]
    assert with_pairs == [name in seen() for name in LOSSES]
    alone = curve_figure({"contrastive": drawn()["contrastive"]}, seen())
    pairs = [f"{name}, pairs of a batch" for name in seen()]  # no curve tells their colours
    assert legend_texts(alone) == ["contrastive", *pairs]


def test_any_name_stands_in_the_legend() -> None:
    """Names come from a user's file; matplotlib hides those with an underscore and sets formulas between dollars."""
    names = ["_private", r"a $\foo{$ b"]
    figure = curve_figure(dict.fromkeys(names, drawn()["contrastive"]), caption=names[1])
    figure.draw_without_rendering()  # where a formula would be set
    shown = [text.lstrip("\N{ZERO WIDTH SPACE}").replace(r"\$", "$") for text in legend_texts(figure)]
    assert shown == names


def test_text_is_legible_at_half_size() -> None:
    """Half of 13 points is what a footnote has."""
    figure = curve_figure(drawn(), seen())
    for panel in figure.axes:
        assert min(float(panel.xaxis.label.get_fontsize()), float(panel.yaxis.label.get_fontsize())) >= 13
    assert min(float(text.get_fontsize()) for text in figure.legends[0].get_texts()) >= 13


def test_pairs_lie_in_the_colour_and_scale_of_their_curve() -> None:
    """Weights that include the mean over the batch would lie far below the curve that they are of."""
    observed = seen()
    figure = curve_figure(drawn(), observed)
    for panel, side in zip(panels_of(figure), ("positives", "negatives"), strict=True):
        clouds = {cloud.get_label(): cloud for cloud in panel.collections if isinstance(cloud, PathCollection)}
        lines = {line.get_label(): line for line in panel.get_lines()}
        for name, weights in observed.items():
            cloud = clouds[f"{name}, pairs of a batch"]
            pairs = getattr(weights, side)
            expected = torch.stack((pairs.similarity, pairs.weight * 12), dim=1)
            torch.testing.assert_close(torch.as_tensor(cloud.get_offsets()), expected)
            assert to_hex(tuple(np.asarray(cloud.get_facecolor())[0])).upper() == lines[name].get_color()


def test_the_density_has_a_strip_of_its_own() -> None:
    """Behind the curves it had a second scale, and hid the points."""
    figure = curve_figure(drawn(), seen())
    strips = [panel for panel in figure.axes if str(panel.get_label()).endswith("density")]
    figure.draw_without_rendering()
    assert len(strips) == 2 and strips[0].get_ylabel() == "pairs per\nunit of S"
    for strip, panel, side in zip(strips, panels_of(figure), ("positives", "negatives"), strict=True):
        (density,) = (patch for patch in strip.patches if isinstance(patch, StepPatch))
        heights, edges, _ = density.get_data()
        assert float((torch.as_tensor(heights) * torch.as_tensor(edges).diff()).sum()) == pytest.approx(1)
        observed = getattr(next(iter(seen().values())), side)
        assert len(heights) == len(observed.counts) and strip.get_xlim() == panel.get_xlim()
        above, below = strip.get_position(), panel.get_position()
        assert above.y0 > below.y1 and (above.x0, above.x1) == pytest.approx((below.x0, below.x1))
        assert not any(isinstance(patch, StepPatch) for patch in panel.patches)


def test_no_text_is_cut_or_lies_on_another() -> None:
    """A long caption left the figure on both sides, and the labels of two panels ran into each other."""
    caption = f"Curve of an anchor with {Context()}: {', '.join(4 * list(LOSSES))}.\nPoints and density: a batch."
    for relative in (False, True):
        figure = curve_figure(drawn(), seen(), relative=relative, caption=caption)
        assert texts_in_the_way(figure) == []


def test_an_infinite_end_does_not_flatten_the_rest() -> None:
    """A loss on distances has weights beyond all bounds at S = 1, and one such point would hide every curve."""
    similarity = torch.linspace(-1, 1, 201, dtype=torch.float64)
    steep = DrawnCurve(similarity, 1 / (1 - similarity), torch.ones_like(similarity))
    figure = curve_figure({"steep": steep})
    assert 45 < figure.axes[0].get_ylim()[1] < 60  # 1 / 0.02 and some room


def test_relative_weights_reach_one_on_each_side() -> None:
    """Circle's weights are eighty times contrastive's; shapes are compared on one scale, curve and pairs alike."""
    curves = {name: drawn()[name] for name in ("contrastive", "SupCon")}
    observed = {"SupCon": seen()["SupCon"]}
    figure = curve_figure(curves, observed, relative=True)
    for panel in panels_of(figure):
        for name in curves:
            shown = [np.asarray(line.get_xydata()) for line in curve_lines(panel, name)]
            if name in observed:
                (dots,) = (cloud for cloud in panel.collections if str(cloud.get_label()).startswith(name))
                shown.append(np.asarray(dots.get_offsets()))
            largest = max(float(np.abs(xy[np.abs(xy[:, 0]) <= 0.98, 1]).max()) for xy in shown)
            assert largest == pytest.approx(1)
    assert panels_of(figure)[0].get_ylabel().endswith("relative to the largest")
    for panel in panels_of(curve_figure({}, observed, relative=True)):  # without a curve too
        heights = np.asarray(panel.collections[0].get_offsets())[:, 1]
        assert float(np.abs(heights).max()) == pytest.approx(1)


def test_a_figure_needs_something_to_draw() -> None:
    """An empty figure would be saved and believed."""
    with pytest.raises(InputError, match="1 to 35 losses, got 0"):
        curve_figure({})
    with pytest.raises(InputError, match="1 to 35 losses, got 36"):
        curve_figure({str(number): drawn()["contrastive"] for number in range(36)})
    assert len(curve_figure({}, seen()).axes) == 4


def test_files_hold_the_figure_and_its_numbers(tmp_path: Path) -> None:
    """The picture for the page, the drawing for print, and the numbers for somebody else's plot."""
    curves, observed = {name: drawn()[name] for name in ("contrastive", "SupCon")}, seen()
    figure = curve_figure(curves, observed)
    paths = save_curves(figure, curves, tmp_path / "new/margin 0.5", observed)
    assert [path.name for path in paths] == ["margin 0.5.png", "margin 0.5.svg", "margin 0.5.csv"]
    assert sorted(tmp_path.glob("new/*")) == sorted(paths)  # nothing left aside
    assert Image.open(paths[0]).size == (1650, 1020)
    assert paths[1].read_text().lstrip().startswith("<?xml")
    with paths[2].open() as file:
        rows = list(csv.DictReader(file))
    curve = [row for row in rows if row["kind"] == "curve" and row["loss"] == "SupCon" and row["side"] == "positive"]
    assert [float(row["similarity"]) for row in curve] == curves["SupCon"].similarity.tolist()
    assert [float(row["weight"]) for row in curve] == curves["SupCon"].positive.tolist()
    pairs = [row for row in rows if row["kind"] == "pair" and row["loss"] == "SupCon" and row["side"] == "negative"]
    assert [float(row["weight"]) for row in pairs] == (observed["SupCon"].negatives.weight * 12).tolist()
    drawn_pairs = sum(weights.positives.pairs + weights.negatives.pairs for weights in observed.values())
    (first, *_) = observed.values()
    bins = len(first.edges) - 1
    assert len(rows) == 2 * 2 * 41 + drawn_pairs + 2 * bins
    density = [row for row in rows if row["kind"] == "density" and row["side"] == "positive"]
    shares = torch.tensor([float(row["density"]) for row in density], dtype=torch.float64) * 2 / bins
    torch.testing.assert_close(shares * first.positives.pairs, first.positives.counts.double())
    assert float(density[0]["similarity"]) == pytest.approx(-1 + 1 / bins)
    assert {row["weight"] for row in density} == {""} and {row["density"] for row in curve + pairs} == {""}


def test_the_same_figure_is_the_same_files(tmp_path: Path) -> None:
    """Figures are committed; a date in them would change them every time."""
    texts = []
    for name in "ab":
        torch.manual_seed(0)
        paths = save_curves(curve_figure(drawn(), seen()), drawn(), tmp_path / name)
        texts.append([path.read_bytes() for path in paths])
    assert texts[0] == texts[1]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure that was good must not be half overwritten."""
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    figure = curve_figure(drawn())

    def fail(aside: Path, **_: object) -> None:
        aside.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="no space"):
        save_curves(figure, drawn(), tmp_path / "curves")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
