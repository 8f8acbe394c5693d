"""The figure of an axis of losses: its curves are those of the losses in the config, its dots the means."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from pytorch_metric_learning import losses as pml_losses
from torch import nn

from lightning_dml.errors import InputError
from lightning_dml.losses import (
    Context,
    ContrastiveLoss,
    DirectWeightingLoss,
    FromLoss,
    MultiSimilarityLoss,
    TripletLoss,
    curves,
    weight_curve,
)
from lightning_dml.report.curve_figure import PALETTE
from lightning_dml.study.plan.grid import Run, points_of, runs_of
from lightning_dml.study.plan.loss_axis import chooses_the_loss
from lightning_dml.study.plan.study_file import StudyFile
from lightning_dml.study.results.curve_axis import BASELINE, BLACK, GREY, curve_axis_figure
from lightning_dml.study.results.loss_curves import SIMILARITY, curves_of
from lightning_dml.study.results.report import report
from lightning_dml.study.results.statistics import mean_of
from lightning_dml.study.results.summary import Row, rows_of
from lightning_dml.study.running.ledger import Entry
from tests.figures import overlaps, texts_in_the_way, texts_of
from tests.helpers import ROOT

FOLDER = ROOT / "configs/study"
LOSSES, CURVES, LOSS = "lightning_dml.losses", "lightning_dml.losses.curves", "model.init_args.loss"


class Proxies(nn.Module):
    """A loss whose pairs are those with its own proxies, so that it takes no references."""

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Value of the loss."""
        return embeddings.sum()


def value_of(run: Run, metric: str) -> float:
    """The result of a training: another value for each point, seed and metric."""
    return 0.5 + int(run.point.key, 16) % 89 / 300 + 0.01 * math.sin(7 * run.seed) - 0.1 * len(metric) / 20


def results(study: StudyFile, missing: tuple[str, ...] = ()) -> dict[str, Entry]:
    """Entries of all trainings, but those of points with a variant that is missing."""
    entries = {}
    for number, run in enumerate(runs_of(study, points_of(study))):
        if not set(missing) & set(run.point.choice.values()):
            metrics = {name: dict.fromkeys(("last", "max", "min"), value_of(run, name)) for name in study.metrics}
            entries[run.key] = Entry(run.key, 1, "finished", number, {"result": {"metrics": metrics, "wall": 1.0}})
    return entries


def rows_in(study: StudyFile, missing: tuple[str, ...] = ()) -> list[Row]:
    """The rows of the study with these results."""
    return rows_of(study, points_of(study), results(study, missing))


def study_of(folder: Path, axes: Mapping[str, Any], **changes: Any) -> StudyFile:
    """A study on a contrastive loss, in the folder."""
    content = {
        "base": {"model": {"init_args": {"loss": {"class_path": f"{LOSSES}.ContrastiveLoss"}}}},
        "axes": axes,
        "seeds": [0, 1, 2],
        "metric": "val/recall@1",
        "output": str(folder / "out"),
        **changes,
    }
    (folder / "made.yaml").write_text(json.dumps(content))
    return StudyFile.read(folder / "made.yaml")


def columns_of(figure: Figure, metrics: int) -> tuple[list[Axes], list[list[Axes]]]:
    """Panels of curves in the order of reading, and for each metric its panels from the top down."""
    figure.draw_without_rendering()  # places them
    tops = sorted({round(panel.get_position().y1, 6) for panel in figure.axes}, reverse=True)
    rows: list[list[Axes]] = [[] for _ in tops]
    for panel in sorted(figure.axes, key=lambda panel: panel.get_position().x0):
        rows[tops.index(round(panel.get_position().y1, 6))].append(panel)
    assert len({len(row) for row in rows}) == 1  # all panels of a row have one height, in the order of the file
    curve_panels = [panel for row in rows for panel in row[:-metrics]]
    return curve_panels, [list(column) for column in list(zip(*rows, strict=True))[-metrics:]]


def line(panel: Axes, label: str) -> tuple[NDArray[np.float64], str]:
    """Heights and colour of a curve."""
    curve: Any
    (curve,) = (line for line in panel.lines if line.get_label() == label)
    assert np.asarray(curve.get_xdata()).tolist() == SIMILARITY.tolist()
    return np.asarray(curve.get_ydata(), dtype=float), to_hex(curve.get_color()).upper()


def dots(panel: Axes) -> dict[str, tuple[float, float]]:
    """Value and height of each series that has a dot in a row's panel of a metric."""
    containers: Any = panel.containers
    dots_of = {bar.get_label(): bar[0].get_xydata()[0].tolist() for bar in containers}
    return {label: (value, height) for label, (value, height) in dots_of.items()}


def baselines(panel: Axes) -> list[float]:
    """The places of the baselines' lines, which stand over the whole height of a row's panel."""
    lines = [line for line in panel.lines if to_hex(line.get_color()) == to_hex(BASELINE)]
    assert all(np.asarray(line.get_ydata()).tolist() == [0, 1] for line in lines)
    return [float(np.asarray(line.get_xdata())[0]) for line in lines]


def bars(panel: Axes) -> list[list[float]]:
    """Ends of the intervals in a row's panel of a metric."""
    containers: Any = panel.containers
    return [[end[0] for end in bar[2][0].get_segments()[0].tolist()] for bar in containers if bar[2]]


POSITIVES: dict[str, Any] = {
    "constant": curves.Constant(),
    "linear up": curves.Linear(threshold=-1.0, slope=0.5),
    "linear down": curves.Linear(threshold=1.0, slope=1.0, above=False),
    "exponential up": curves.Exponential(rate=5.0, threshold=1.0),
    "exponential down": curves.Exponential(rate=-5.0, threshold=0.0),
    "sigmoid down": curves.Sigmoid(rate=-10.0, threshold=0.5),
    "multi-similarity": FromLoss(MultiSimilarityLoss()),
    "none above 0.8": curves.Step(threshold=0.8, above=False),
    "constant 0.1": curves.Constant(0.1),
    "constant 0.3": curves.Constant(0.3),
    "constant 3": curves.Constant(3.0),
}


def test_the_curves_are_those_of_the_losses_and_the_dots_the_means() -> None:
    """The reader draws the conclusion from a curve beside a dot: a row with another row's curve turns it round."""
    study = StudyFile.read(FOLDER / "positives.yaml")
    rows = rows_in(study)
    axis = study.axes[0]
    assert chooses_the_loss(axis, points_of(study)) and list(axis.variants) == list(POSITIVES)
    figure = curve_axis_figure(study, axis, rows)
    small, large = columns_of(figure, metrics=2)
    assert [panel.get_ylabel().replace("\n", " ") for panel in small] == list(POSITIVES)
    for panel, side in zip(small, POSITIVES.values(), strict=True):
        loss = DirectWeightingLoss(side, curves.Step(threshold=0.5))
        pull, push = (weights.numpy() for weights in weight_curve(loss, SIMILARITY))
        heights, colour = line(panel, "positive")
        assert heights.tolist() == pull.tolist() and colour == PALETTE[0]
        heights, colour = line(panel, "negative")
        assert heights.tolist() == push.tolist() and colour == to_hex(GREY).upper()
        frame, label = panel.get_window_extent(), panel.yaxis.label.get_window_extent()
        assert (label.y0 + label.y1) / 2 == pytest.approx((frame.y0 + frame.y1) / 2, abs=2)
    by_name = {row.point.choice["positive"]: row for row in rows}
    runs = runs_of(study, points_of(study))
    for panels, metric in zip(large, study.metrics, strict=True):
        for panel, curve_panel, name in zip(panels, small, POSITIVES, strict=True):
            wanted = mean_of([value_of(run, metric) for run in runs if run.point.choice["positive"] == name])
            ((value, height),) = dots(panel).values()
            assert value == pytest.approx(wanted.mean)
            assert bars(panel) == [pytest.approx([wanted.low, wanted.high])]
            assert panel.get_xlim() == panels[0].get_xlim()
            assert panel.get_xlim()[0] < wanted.low and wanted.high < panel.get_xlim()[1]
            # At the height of the row's curve, in the middle of a panel of the same height.
            assert height == sum(panel.get_ylim()) / 2
            assert panel.get_position().intervaly == pytest.approx(curve_panel.get_position().intervaly)
            assert baselines(panel) == [by_name["constant"].means[metric].mean]
        assert panels[-1].get_xlabel() == f"{metric} (fraction)"
    assert small[-1].get_xlabel() == "cosine similarity S" and small[0].get_title() == "weight,\n|dL/dS| per anchor"
    assert figure.get_supylabel() == "weight curve of positives"
    caption = " ".join(figure.get_supxlabel().split())
    assert f"{Context()}: multi-similarity." in caption and "exponential down (up to 134)" in caption
    assert "3 seeds" in figure.legends[0].get_title().get_text()
    assert not overlaps(figure)
    assert texts_in_the_way(figure) == []
    width, height = figure.get_size_inches()
    assert width < 12 and height < 0.8 * len(POSITIVES) + 3


@pytest.mark.parametrize("names", [POSITIVES, [f"a name of a variant that is far too long {k}" for k in range(16)]])
def test_no_text_is_cut_or_lies_on_another(tmp_path: Path, names: Iterable[str]) -> None:
    """Half of 13 points is what a footnote has, and what lies on another text cannot be read at all."""
    variants = {name: loss("ContrastiveLoss", margin=0.01 * place) for place, name in enumerate(names)}
    sizes = {"option": "model.size", "values": [0.1, 1.0, 10.0], "label": "a size"}
    study = study_of(tmp_path, {"loss": variants, "size": sizes}, baseline={"size": 0.1}, metrics=["drift/bank"])
    figure = curve_axis_figure(study, study.axes[0], rows_in(study))
    assert not overlaps(figure)
    assert texts_in_the_way(figure) == []
    assert min(float(text.get_fontsize()) for text in texts_of(figure)) >= 13
    assert all(panel.get_window_extent().width > 1.8 * figure.dpi for panel in figure.axes)
    assert all(panel.get_window_extent().height > 0.4 * figure.dpi for panel in figure.axes)


def test_names_and_numbers_of_a_row_stand_apart() -> None:
    """Exponential weights reach 4e8 far from where pairs are; the number ran into the name beside it."""
    study = StudyFile.read(FOLDER / "mining_weighting.yaml")
    axis = study.axes[1]
    figure = curve_axis_figure(study, axis, rows_in(study))
    small, _ = columns_of(figure, metrics=2)
    assert [panel.get_ylabel() for panel in small[::2]] == list(axis.variants)
    numbers = [label for panel in small for label in panel.get_yticklabels() if label.get_text()]
    assert "1e+08" in {label.get_text() for label in numbers}
    assert not overlaps(figure)
    assert texts_in_the_way(figure) == []


def loss(name: str, **settings: Any) -> dict[str, Any]:
    """A variant with this loss."""
    return {LOSS: {"class_path": name if "." in name else f"{LOSSES}.{name}", "init_args": settings}}


STEP, RISE = f"{CURVES}.Step", f"{CURVES}.Linear"
SIDES_BASE = [
    {"model": {"init_args": {"loss": {"class_path": f"{LOSSES}.ContrastiveLoss"}}}},
    {
        LOSS: {
            "class_path": "DirectWeightingLoss",  # the bare name, as a config may have it
            "init_args": {"positive": {"class_path": f"{CURVES}.Constant"}, "negative": {"class_path": STEP}},
        }
    },
]
SIDES_AXES = {
    "pull": {
        "constant": {},
        "rising": {f"{LOSS}.init_args.positive": {"class_path": RISE, "init_args": {"threshold": -1.0, "slope": 0.5}}},
    },
    "push": {str(at): {f"{LOSS}.init_args.negative.init_args.threshold": at} for at in (0.1, 0.5, 0.7)},
}


def test_losses_on_two_axes_have_curves_in_the_colours_of_their_dots(tmp_path: Path) -> None:
    """In a grid of losses a row has several: a curve must lead to its dot, and one that all share must say so."""
    study = study_of(tmp_path, SIDES_AXES, base=SIDES_BASE, baseline={"pull": "constant"})
    rows = rows_in(study, missing=("0.7",))
    small, (panels,) = columns_of(curve_axis_figure(study, study.axes[0], rows), metrics=1)
    rising = curves.Linear(threshold=-1.0, slope=0.5)
    for place, pull in enumerate((curves.Constant(), rising)):
        of_positives, of_negatives = small[2 * place : 2 * place + 2]
        assert line(of_positives, "positive")[1] == BLACK
        for number, at in enumerate((0.1, 0.5, 0.7)):
            wanted = weight_curve(DirectWeightingLoss(pull, curves.Step(threshold=at)), SIMILARITY)
            heights, colour = line(of_negatives, f"push={at}")
            assert heights.tolist() == wanted[1].tolist() and colour == PALETTE[number]
            assert line(of_positives, "positive")[0].tolist() == wanted[0].tolist()
    means = {row.point.label: row.means["val/recall@1"].mean for row in rows}
    for panel, variant in zip(panels, ("constant", "rising"), strict=True):
        drawn: Any = {bar.get_label(): bar[0] for bar in panel.containers}
        assert list(drawn) == ["push=0.1", "push=0.5"]  # the third has no result
        for number, (name, (value, _)) in enumerate(dots(panel).items()):
            assert value == means[f"pull={variant}, {name}"]
            assert to_hex(drawn[name].get_color()).upper() == PALETTE[number]
        places = {height for _, height in dots(panel).values()}
        assert len(places) == 2 and min(panel.get_ylim()) < min(places) < max(places) < max(panel.get_ylim())


def test_a_baseline_beside_the_losses_stands_at_the_height_of_each(tmp_path: Path) -> None:
    """With memory against without, every loss has a baseline of its own: one line through all rows would be false."""
    axes: dict[str, dict[str, Any]] = {
        "loss": {"contrastive": {}, "multi-similarity": loss("MultiSimilarityLoss")},
        "size": {"option": "model.size", "values": [0, 1]},
    }
    study = study_of(tmp_path, axes, baseline={"size": 0})
    rows = rows_in(study)
    small, (panels,) = columns_of(curve_axis_figure(study, study.axes[0], rows), metrics=1)
    means = {row.point.label: row.means["val/recall@1"].mean for row in rows}
    assert [baselines(panel) for panel in panels] == [[means[f"loss={name}, size=0"]] for name in axes["loss"]]
    for panel, made in zip(small, (ContrastiveLoss(), MultiSimilarityLoss()), strict=True):
        pull, push = weight_curve(made, SIMILARITY)
        for side, weights, wanted in (("positive", pull, PALETTE[0]), ("negative", push, PALETTE[1])):
            heights, colour = line(panel, side)
            assert heights.tolist() == weights.tolist() and colour == wanted


def test_a_point_without_a_result_leaves_its_place_empty(tmp_path: Path) -> None:
    """While a study runs, a curve without a dot must not look like one whose dot is out of sight."""
    study = study_of(tmp_path, {"loss": {"contrastive": {}, "triplet": loss("TripletLoss")}}, seeds=[4])
    rows = rows_in(study, missing=("triplet",))
    figure = curve_axis_figure(study, study.axes[0], rows)
    small, (panels,) = columns_of(figure, metrics=1)
    assert [value for value, _ in dots(panels[0]).values()] == [value_of(Run(rows[0].point, 4), "val/recall@1")]
    assert not dots(panels[1])
    assert [[text.get_text() for text in panel.texts] for panel in panels] == [[], ["no result"]]
    assert line(small[1], "positive")[0].tolist() == weight_curve(TripletLoss(), SIMILARITY)[0].tolist()
    assert not bars(panels[0])  # one seed has no interval


def test_weights_of_other_sizes_stay_legible(tmp_path: Path) -> None:
    """On the scale of an exponential, or of a loss a hundred times as large, the other curves would be flat."""
    curve = {"class_path": f"{CURVES}.Exponential", "init_args": {"rate": 9.0, "threshold": 0.0}}
    variants = {
        "contrastive": {},
        "multi-similarity": loss("MultiSimilarityLoss"),
        "exponential": loss("DirectWeightingLoss", positive={"class_path": f"{CURVES}.Constant"}, negative=curve),
    }
    study = study_of(tmp_path, {"loss": variants})
    figure = curve_axis_figure(study, study.axes[0], rows_in(study))
    tops = {panel.get_ylim()[1] for panel in columns_of(figure, metrics=1)[0]}
    assert len(tops) == 1 and 1 < tops.pop() < 3
    said = " ".join(figure.texts[-1].get_text().split())
    assert said.endswith(f"Cut off at the top: exponential (up to {math.exp(9 * 0.98):.3g}).")
    four = {"class_path": f"{CURVES}.Constant", "init_args": {"value": 4.0}}
    large = loss("DirectWeightingLoss", positive={"class_path": f"{CURVES}.Constant"}, negative=four)
    some = {name: variants[name] for name in ("contrastive", "multi-similarity")}
    study = study_of(tmp_path, {"loss": {**some, "large": large}})
    figure = curve_axis_figure(study, study.axes[0], rows_in(study))
    assert [panel.get_ylim()[1] for panel in columns_of(figure, metrics=1)[0]] == pytest.approx(3 * [4.4])  # in sight
    faint = {"class_path": STEP, "init_args": {"value": 0.01}}
    variants = {"contrastive": {}, "faint": loss("DirectWeightingLoss", positive=faint, negative=faint)}
    study = study_of(tmp_path, {"loss": variants})
    figure = curve_axis_figure(study, study.axes[0], rows_in(study))
    assert [panel.get_ylim()[1] for panel in columns_of(figure, metrics=1)[0]] == pytest.approx([1.1, 0.011])
    assert "a scale of its own" in figure.texts[-1].get_text()
    assert "logarithmic" not in figure.texts[-1].get_text()


def test_weights_of_another_order_have_a_logarithmic_scale(tmp_path: Path) -> None:
    """On a linear one, half of a row of exponential weights would be drawn as 0."""
    rules = {name: loss("GeneralPairWeightingLoss", positive=name, negative=name) for name in ("linear", "exponential")}
    study = study_of(tmp_path, {"loss": {"contrastive": {}, **rules}})
    figure = curve_axis_figure(study, study.axes[0], rows_in(study))
    small = columns_of(figure, metrics=1)[0]
    assert [panel.get_yscale() for panel in small] == ["linear", "linear", "symlog"]
    figure.draw_without_rendering()
    assert [label.get_text() for label in small[2].get_yticklabels()] == ["0", "1", "1e+08"]
    ends = [
        float(small[2].transData.transform((0, value))[1]) for value in (0.0, 1.0, line(small[2], "positive")[0].max())
    ]
    foot, head = small[2].get_window_extent().intervaly
    assert foot < ends[0] and ends[-1] < head and ends[1] - ends[0] > 0.17 * figure.dpi  # the height of a number
    assert "exponential is logarithmic above 1." in " ".join(figure.texts[-1].get_text().split())


def test_a_curve_that_is_hardly_seen_has_its_weight_written_on_it(tmp_path: Path) -> None:
    """A hundredth of the weight, for all negatives or the easy ones, looks like none."""
    low = {"class_path": f"{CURVES}.Constant", "init_args": {"value": 0.01}}
    easy = {"class_path": STEP, "init_args": {"value": 0.01, "above": False}}
    constant = {"class_path": f"{CURVES}.Constant"}
    variants = {
        name: loss("DirectWeightingLoss", positive=constant, negative=curve)
        for name, curve in {"hard": {"class_path": STEP}, "low": low, "easy": easy}.items()
    }
    study = study_of(tmp_path, {"loss": variants})
    small: Any = columns_of(curve_axis_figure(study, study.axes[0], rows_in(study)), metrics=1)[0]
    written = [[(text.get_text(), round(text.xy[0], 1)) for text in panel.texts] for panel in small]
    assert written == [[], [("0.01", 0.0)], [("0.01", -0.3)]]


def test_a_mean_of_draws_is_called_one(tmp_path: Path) -> None:
    """Such a curve is rough, and nothing else tells why."""
    for mining, said in (("semi_hard", True), ("batch_hard", False)):
        study = study_of(
            tmp_path, {"loss": {"contrastive": {}, "mined": loss("GeneralPairWeightingLoss", mining=mining)}}
        )
        caption = " ".join(curve_axis_figure(study, study.axes[0], rows_in(study)).texts[-1].get_text().split())
        assert ("a curve is the mean of 256 draws" in caption) is said


def test_an_axis_of_anything_else_has_no_curves() -> None:
    """A row of equal curves for each memory ratio would say nothing."""
    named = {"memory_ratio": [False, False], "negatives": [True], "mining_weighting": [True, True]}
    for name, wanted in named.items():
        study = StudyFile.read(FOLDER / f"{name}.yaml")
        assert [chooses_the_loss(axis, points_of(study)) for axis in study.axes] == wanted


AXES = {
    "loss": {"contrastive": {}, "multi-similarity": loss("MultiSimilarityLoss")},
    "size": {"option": "model.size", "values": [0.1, 1.0]},
}


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        (AXES["loss"], None),
        ({"contrastive": {}, "proxies": loss("tests.study.results.test_curve_axis.Proxies")}, "(loss=proxies, size="),
        ({"contrastive": {}, "gone": loss("no.such.Loss")}, "(loss=gone, size="),
        ({"contrastive": {}, "none": {LOSS: None}}, "(loss=none, size="),
        (
            {"contrastive": {}, "longer": {"model.steps": 9}, "triplet": loss("TripletLoss")},
            "longer have the same loss",
        ),
    ],
)
def test_a_report_has_the_figure_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], variants: dict[str, Any], said: str | None
) -> None:
    """A study of losses with proxies takes as many hours, and its table must not be lost for a figure."""
    study = study_of(tmp_path, {**AXES, "loss": variants})
    points = points_of(study)
    report(study, points, runs_of(study, points), results(study))
    printed = capsys.readouterr().out.splitlines()
    names = {"table.md", "table.csv", "trials.csv", "loss.png", "loss.svg", "size.png", "size.svg"}
    names |= {"loss-curves.png", "loss-curves.svg"} if said is None else set()
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    refused = [text for text in printed if "is not drawn" in text]
    assert len(refused) == (said is not None)
    if said is None:
        assert "loss-curves.png, loss-curves.svg" in printed[-1]
        assert min(Image.open(tmp_path / "out/loss-curves.png").size) > 300
        assert (tmp_path / "out/loss-curves.svg").read_text().rstrip().endswith("</svg>")
    else:
        assert refused[0].startswith("loss-curves is not drawn: ") and said in refused[0]


def test_a_loss_that_breaks_is_named(tmp_path: Path) -> None:
    """The line must lead to the variant and to what is wrong with it, whatever the loss raised."""
    for name, value, said in (("margin", "wide", "margin"), ("block_bytes", -1, "block_bytes must")):
        study = study_of(tmp_path, {"loss": {"a": {}, "b": loss("ContrastiveLoss", **{name: value})}})
        with pytest.raises(InputError, match=rf"the loss of \(loss=b\) has no weight curve: .*{said}") as caught:
            curves_of(points_of(study))
        assert "\n" not in str(caught.value)


def test_a_loss_of_another_library_has_its_curve(tmp_path: Path) -> None:
    """Its constructor may leave types out, which fit takes; the curve is measured as weight_curve does."""
    settings = {"pos_margin": 0.2, "neg_margin": 0.9}
    study = study_of(
        tmp_path, {"loss": {"a": {}, "b": loss("pytorch_metric_learning.losses.ContrastiveLoss", **settings)}}
    )
    first, second = (curves_of(points_of(study))[point.key] for point in points_of(study))
    made = pml_losses.ContrastiveLoss(**settings)
    assert [weights.tolist() for weights in (second.positive, second.negative)] == [
        weights.tolist() for weights in weight_curve(made, SIMILARITY)
    ]
    assert second.positive.any() and first.positive.tolist() != second.positive.tolist()
