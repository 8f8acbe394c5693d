"""The figure of a training over its steps: what stands in it and where, and the files that it is written to."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from lightning_dml.errors import InputError
from lightning_dml.report import save_training, training_figure
from lightning_dml.report.curve_figure import PALETTE
from lightning_dml.report.training_figure import PARTS


def a_history(count: int = 40, prefix: str = "pairs/", scale: float = 2.0) -> list[dict[str, float]]:
    """Positives draw near and negatives move away; the memory begins later, once without a positive."""
    history = []
    for number in range(1, count + 1):
        figures: dict[str, float] = {"step": 50 * number}
        for part in ("batch", "memory") if number > count // 4 else ("batch",):
            for side, centre in (("positive", 1 - 1 / (1 + number)), ("negative", 1 / (1 + number))):
                if (part, side, number) == ("memory", "positive", count):
                    figures[f"{prefix}{part}/{side}_force"] = 0.0
                    continue
                for suffix, shift in (("", 0.0), ("_q05", -0.2), ("_q50", 0.01), ("_q95", 0.1)):
                    figures[f"{prefix}{part}/{side}_similarity{suffix}"] = centre + shift
                figures[f"{prefix}{part}/{side}_force"] = (scale if side == "negative" else 1.0) * (
                    1 + math.sin(number) / 3
                )
        history.append(figures)
    return history


def line_of(panel: Axes, side: str) -> Line2D:
    """The line of one side."""
    (line,) = (line for line in panel.get_lines() if str(line.get_label()).startswith(f"{side}s: mean"))
    return line


def test_lines_and_bands_are_the_history() -> None:
    """Whoever reads a step and a value off the figure must find them in the table."""
    history = a_history()
    figure = training_figure(history)
    panels = dict(
        zip(("batch similarity", "memory similarity", "batch force", "memory force"), figure.axes, strict=True)
    )
    for name, panel in panels.items():
        part, what = name.split()
        for side in ("positive", "negative"):
            key = f"pairs/{part}/{side}_{what}"
            expected = [[measurement["step"], measurement[key]] for measurement in history if key in measurement]
            assert np.asarray(line_of(panel, side).get_xydata()).tolist() == expected
    for band, side in zip(panels["memory similarity"].collections, ("positive", "negative"), strict=True):
        corners = np.asarray(band.get_paths()[0].vertices)
        key = f"pairs/memory/{side}_similarity"
        known = [measurement for measurement in history if key in measurement]
        assert corners[:, 1].min() == min(measurement[f"{key}_q05"] for measurement in known)
        assert corners[:, 1].max() == max(measurement[f"{key}_q95"] for measurement in known)
        assert corners[:, 0].min() == known[0]["step"] and corners[:, 0].max() == known[-1]["step"]


def test_panels_are_labelled() -> None:
    """A figure without units cannot be read apart from the text that it was made for."""
    top_left, top_right, left, right = training_figure(a_history()).axes
    assert (top_left.get_title(), top_right.get_title()) == ("pairs of the batch", "pairs of batch and memory")
    assert top_left.get_ylabel() == "cosine similarity S"
    assert left.get_ylabel() == "total force, sum of weights"
    assert left.get_xlabel() == right.get_xlabel() == "optimizer step"
    assert top_left.get_xlim() == left.get_xlim() == right.get_xlim()
    assert top_left.get_ylim() == top_right.get_ylim()


@pytest.mark.parametrize("lower", ["batch", "memory"])
def test_the_shared_scale_takes_in_both_parts(lower: str) -> None:
    """A scale that is made for one part would cut off what the other has to show."""
    history = [
        {"step": step, **{f"pairs/{part}/negative_similarity": -0.8 if part == lower else 0.9 for part in PARTS}}
        for step in (50.0, 100.0)
    ]
    for panel in training_figure(history).axes[:2]:
        assert panel.get_ylim()[0] < -0.8 and panel.get_ylim()[1] > 0.9


def test_sides_are_told_apart_without_colour() -> None:
    """A printed page and a colour-blind reader have the line styles."""
    for panel in training_figure(a_history()).axes:
        looks = [line_of(panel, side) for side in ("positive", "negative")]
        assert [line.get_color() for line in looks] == list(PALETTE[:2])
        assert [line.get_linestyle() for line in looks] == ["-", "--"]


def legend_texts(figure: Figure) -> list[str]:
    """The entries in their order."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("parts", [2, 1])
def test_the_legend_is_legible_and_outside_the_data(parts: int) -> None:
    """A legend on the lines hides what it explains; half of 13 points is what a footnote has."""
    figure = training_figure(a_history() if parts == 2 else a_history()[:8])
    assert len(figure.axes) == 2 * parts
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert not any(box.overlaps(panel.get_window_extent()) for panel in figure.axes)
    assert legend_texts(figure) == [
        "positives: mean of S, sum of \N{MINUS SIGN}dL/dS",
        "positives: 5 % to 95 % of the pairs",
        "negatives: mean of S, sum of dL/dS",
        "negatives: 5 % to 95 % of the pairs",
    ]
    texts = [*figure.legends[0].get_texts(), *(panel.yaxis.label for panel in figure.axes)]
    assert min(float(text.get_fontsize()) for text in texts) >= 13


def test_a_few_measurements_are_seen() -> None:
    """A line through a single point is nothing."""
    assert {line_of(panel, "positive").get_marker() for panel in training_figure(a_history(1)).axes} == {"o"}
    assert {line_of(panel, "positive").get_marker() for panel in training_figure(a_history(60)).axes} == {"None"}


@pytest.mark.parametrize(("scale", "kind"), [(2.0, "linear"), (500.0, "log"), (0.002, "log")])
def test_the_weaker_side_does_not_vanish(scale: float, kind: str) -> None:
    """Against a large memory the negatives' force is hundreds of times the positives', whose changes count as well."""
    figure = training_figure(a_history(scale=scale))
    assert figure.axes[2].get_yscale() == kind
    assert figure.axes[3].get_yscale() == kind.replace("log", "symlog")  # the last positive force is 0
    assert figure.axes[3].get_ylim()[0] == 0
    for panel in figure.axes[2:]:  # in shares of the height
        heights = [
            panel.transAxes.inverted().transform(
                line_of(panel, side).get_transform().transform(line_of(panel, side).get_xydata())
            )[:, 1]
            for side in ("positive", "negative")
        ]
        medians = [float(np.median(own)) for own in heights]
        assert max(medians) < 1 and min(medians) > 0.02


def test_a_history_without_figures_is_refused() -> None:
    """An empty figure would be saved and believed."""
    for history in ([], [{"step": 3.0}], a_history(prefix="other/pairs/")):
        with pytest.raises(InputError, match="no figures named pairs/batch"):
            training_figure(history)
    assert len(training_figure(a_history(prefix="other/pairs/"), prefix="other/pairs/").axes) == 4


def test_files_hold_the_figure_and_its_numbers(tmp_path: Path) -> None:
    """The picture for the page, the drawing for print, and the numbers for somebody else's plot."""
    history = a_history()
    paths = save_training(training_figure(history), history, tmp_path / "new/run 0.5")
    assert [path.name for path in paths] == ["run 0.5.png", "run 0.5.svg", "run 0.5.csv"]
    assert sorted(tmp_path.glob("new/*")) == sorted(paths)  # nothing left aside
    assert Image.open(paths[0]).size == (1650, 1080)
    assert paths[1].read_text().lstrip().startswith("<?xml")
    with paths[2].open() as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert rows == history
    again = save_training(training_figure(history), history, tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]
