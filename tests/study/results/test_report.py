"""Reports of a study: intervals, paired tests, tables and figures, from results that are known."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure
from PIL import Image

from lightning_dml.commands.study import main
from lightning_dml.errors import InputError
from lightning_dml.files import write_whole
from lightning_dml.study.plan.grid import Point, Run, points_of, runs_of
from lightning_dml.study.plan.study_file import Axis, StudyFile
from lightning_dml.study.results.figure import COLOURS, figure_of
from lightning_dml.study.results.report import report
from lightning_dml.study.results.statistics import Comparison, Mean, compare, holm, mean_of
from lightning_dml.study.results.summary import Row, rows_of, seconds_of_one
from lightning_dml.study.results.tables import markdown, points_csv, trials_csv
from lightning_dml.study.running import storage
from lightning_dml.study.running.ledger import Entry, Ledger
from lightning_dml.study.running.trial_config import RESULT, folder_of
from tests.figures import overlaps


def book(folder: Path, **changes: Any) -> tuple[StudyFile, list[Point], list[Run], dict[str, Entry]]:
    """A study of loss x size with 3 seeds, of which one training failed and one waits; values by a known rule."""
    content = {
        "base": {"model.a": 0},
        "axes": {
            "loss": {"plain": {}, "other": {"model.a": 1}},
            "size": {"option": "model.b", "values": [0.01, 0.1, 1.0], "label": "memory ratio"},
        },
        "seeds": [0, 1, 2],
        "baseline": {"loss": "plain"},
        "metric": "val/recall@1",
        "metrics": ["val/loss"],
        **changes,
    }
    (folder / "known.yaml").write_text(json.dumps(content))
    study = StudyFile.read(folder / "known.yaml")
    points = points_of(study)
    runs = runs_of(study, points)
    entries = {}
    for number, run in enumerate(runs):
        if (run.point.choice["loss"], run.point.choice["size"], run.seed) == ("other", "1.0", 2):
            continue
        value = value_of(run)
        metrics = {
            "val/recall@1": {"last": value, "max": value + 0.1, "min": 0.0},
            "val/loss": {"last": 1 - value, "max": 2.0, "min": 0.5},
        }
        noted: dict[str, Any] = {"result": {"metrics": metrics, "wall": 60.0}}
        failed = (run.point.choice["loss"], run.point.choice["size"], run.seed) == ("other", "0.1", 1)
        noted = {"error": "out of memory"} if failed else noted
        entries[run.key] = Entry(run.key, 1, "failed" if failed else "finished", number, noted)
    return study, points, runs, entries


def value_of(run: Run) -> float:
    """The result of the training of this loss, size and seed."""
    noise = math.sin(7 * run.seed + 3 * float(run.point.choice["size"]))
    return 0.5 + 0.1 * (run.point.choice["loss"] == "other") * (1 + 0.3 * noise) + 0.01 * noise


def book_of(
    folder: Path, values: Mapping[str, Sequence[float]], walls: Sequence[float] = (60.0,) * 12, **changes: Any
) -> tuple[StudyFile, list[Point], list[Run], dict[str, Entry]]:
    """A study of one axis, `loss`, whose variants have these values by seed; the first is the baseline."""
    content = {
        "base": {"model.a": 0},
        "axes": {"loss": {name: {"model.a": number} for number, name in enumerate(values)}},
        "seeds": list(range(max(len(own) for own in values.values()))),
        "baseline": {"loss": next(iter(values))},
        "metric": "val/recall@1",
        "output": str(folder / "out"),
        **changes,
    }
    (folder / "hand.yaml").write_text(json.dumps(content))
    study = StudyFile.read(folder / "hand.yaml")
    points = points_of(study)
    runs = runs_of(study, points)
    entries: dict[str, Entry] = {}
    for run in runs:
        own = values[run.point.choice["loss"]]
        if run.seed < len(own):
            metrics = {"val/recall@1": dict.fromkeys(("last", "max", "min"), own[run.seed])}
            noted = {"result": {"metrics": metrics, "wall": walls[len(entries)]}}
            entries[run.key] = Entry(run.key, 1, "finished", len(entries), noted)
    return study, points, runs, entries


@pytest.mark.parametrize("n", [2, 3, 10])
def test_intervals_and_paired_tests_are_scipys(n: int) -> None:
    """A wrong quantile makes every conclusion wrong, and nobody would see it."""
    generator = np.random.default_rng(n)
    values, baseline = generator.normal(0.8, 0.02, n), generator.normal(0.79, 0.02, n)
    found = mean_of(values.tolist())
    wanted = scipy.stats.t.interval(0.95, n - 1, values.mean(), scipy.stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), *wanted), rel=1e-12)
    by_seed = dict(enumerate(values.tolist()))
    comparison = compare({**by_seed, 99: 0.0}, {**dict(enumerate(baseline.tolist())), 98: 1.0})
    test = scipy.stats.ttest_rel(values, baseline)
    bounds = test.confidence_interval(0.95)
    assert comparison.p == pytest.approx(test.pvalue, rel=1e-9)
    assert comparison.difference.n == n
    assert (comparison.difference.low, comparison.difference.high) == pytest.approx((bounds.low, bounds.high))


def test_what_one_seed_cannot_tell_is_left_open() -> None:
    """An interval of one value, or a p value without spread, would be made up."""
    assert mean_of([0.5]).mean == 0.5 and math.isnan(mean_of([0.5]).low)
    assert math.isnan(mean_of([]).mean)
    assert math.isnan(compare({0: 1.0}, {0: 0.5}).p)
    assert math.isnan(compare({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5}).p)
    assert compare({0: 1.0}, {1: 0.5}).difference.n == 0


def recalls(hits: Sequence[int], queries: int) -> list[float]:
    """Parts of the queries, in float32 as a metric of torchmetrics gives them."""
    return [float(np.float32(count / queries)) for count in hits]


@pytest.mark.parametrize("scale", [0.001, 1.0, 1000.0])
@pytest.mark.parametrize(
    ("own", "baseline", "wanted"),
    [
        ([0.93, 0.94, 0.95], [0.92, 0.93, 0.94], 0.01),
        (recalls([4358, 4487, 4474], 4800), recalls([4332, 4461, 4448], 4800), 26 / 4800),
        (recalls([4332, 4461, 4448], 4800), recalls([4358, 4487, 4474], 4800), -26 / 4800),
        ([0.9, 0.8, 0.7], [0.9, 0.8, 0.7], 0.0),
    ],
    ids=["decimals", "more hits", "fewer hits", "the same"],
)
def test_differences_that_are_equal_up_to_rounding_have_no_p(
    own: list[float], baseline: list[float], wanted: float, scale: float
) -> None:
    """The last digits of a subtraction would pass for a spread, and p for a proof (1e-9 and less)."""
    found = compare(
        {seed: scale * value for seed, value in enumerate(own)}, dict(enumerate(np.multiply(baseline, scale)))
    )
    assert found.difference.n == 3
    assert found.difference.mean == pytest.approx(scale * wanted, abs=1e-7 * scale)
    assert [math.isnan(number) for number in (found.p, found.difference.low, found.difference.high)] == [True] * 3


@pytest.mark.parametrize("queries", [4800, 100_000])
def test_one_query_is_a_spread(queries: int) -> None:
    """Seeds that agree to one hit have little spread but some, and their p value is Student's."""
    baseline = [queries - 468, queries - 339, queries - 352]
    own = [value + more for value, more in zip(baseline, (26, 26, 27), strict=True)]
    ours, others = recalls(own, queries), recalls(baseline, queries)
    found, test = compare(dict(enumerate(ours)), dict(enumerate(others))), scipy.stats.ttest_rel(ours, others)
    bounds = test.confidence_interval(0.95)
    assert found.p == pytest.approx(test.pvalue, rel=1e-6)
    assert (found.difference.low, found.difference.high) == pytest.approx((bounds.low, bounds.high), rel=1e-6)


def test_holm_is_the_sequential_rule() -> None:
    """With fifteen variants one in two studies would find a difference at 5% that is not there."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        p = generator.uniform(0, 0.1, 6).round(3).tolist()
        found = holm([*p, math.nan])
        assert math.isnan(found[-1])
        for level in (0.01, 0.05, 0.1, 0.2):
            rejected = []
            for rank, (value, place) in enumerate(sorted(zip(p, range(6), strict=True))):
                if value > level / (6 - rank):
                    break
                rejected.append(place)
            assert [place for place in range(6) if found[place] <= level * (1 + 1e-12)] == sorted(rejected)


def test_the_rows_are_sorted_and_compared_by_seed(tmp_path: Path) -> None:
    """The table answers which variant is better at the same size with the same seeds."""
    study, points, runs, entries = book(tmp_path)
    rows = rows_of(study, points, entries)
    means = [row.means["val/recall@1"].mean for row in rows]
    assert means == sorted(means, reverse=True)
    labels = {row.point.label: row for row in rows}
    assert not labels["loss=other, size=0.1"].complete and labels["loss=plain, size=0.1"].complete
    by_label = {run.label: value_of(run) for run in runs}
    for size, seeds in (("0.01", [0, 1, 2]), ("0.1", [0, 2]), ("1.0", [0, 1])):
        own = [by_label[f"loss=other, size={size}, seed={seed}"] for seed in seeds]
        other = [by_label[f"loss=plain, size={size}, seed={seed}"] for seed in seeds]
        row = labels[f"loss=other, size={size}"]
        assert row.comparison is not None and row.comparison.difference.n == len(seeds)
        assert row.comparison.p == pytest.approx(scipy.stats.ttest_rel(own, other).pvalue)
        assert row.p_holm >= row.comparison.p
        assert labels[f"loss=plain, size={size}"].comparison is None
    best, *_ = book(tmp_path, value="best")
    assert rows_of(best, points, entries)[0].means["val/recall@1"].mean == pytest.approx(means[0] + 0.1)
    least, *_ = book(tmp_path, metric="val/loss", mode="min")
    assert [row.point.key for row in rows_of(least, points, entries)] == [row.point.key for row in rows]


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_difference_is_the_variant_minus_its_baseline(tmp_path: Path, mode: str) -> None:
    """With the sign turned, every table would recommend the worse variant."""
    values = {"plain": [0.5, 0.6, 0.7], "more": [0.6, 0.9, 0.7], "less": [0.5, 0.2, 0.5], "moved": [0.6, 0.7, 0.8]}
    study, points, _, entries = book_of(tmp_path, values, mode=mode)
    rows = {row.point.choice["loss"]: row for row in rows_of(study, points, entries)}
    wanted = {"more": (0.1 + 0.3 + 0.0) / 3, "less": (0.0 - 0.4 - 0.2) / 3, "moved": 0.1}
    p = {name: float(scipy.stats.ttest_rel(values[name], values["plain"]).pvalue) for name in ("more", "less")}
    smaller, larger = sorted(p, key=lambda name: p[name])
    # Of two comparisons, as the one that is moved as a whole has no p value.
    adjusted = {smaller: 2 * p[smaller], larger: max(2 * p[smaller], p[larger])}
    for name, difference in wanted.items():
        comparison = rows[name].comparison
        assert comparison is not None and comparison.difference.mean == pytest.approx(difference)
        own = p.get(name, math.nan), adjusted.get(name, math.nan)
        assert (comparison.p, rows[name].p_holm) == pytest.approx(own, nan_ok=True)


def test_every_number_stands_under_its_heading(tmp_path: Path) -> None:
    """A table whose columns are mixed up looks as good as any other."""
    study, points, runs, entries = book_of(tmp_path, {"plain": [0.5] * 3, "other": [0.75] * 3})
    rows = rows_of(study, points, entries)
    other, plain = rows
    means = {"val/recall@1": Mean(3, 0.75, 0.625, 0.875)}
    difference = Mean(3, 0.25, 0.125, 0.375)
    known = replace(other, means=means, comparison=Comparison(difference, 0.02), p_holm=0.04)
    unsure = replace(known, comparison=Comparison(Mean(3, -0.25, math.nan, math.nan), math.nan), p_holm=math.nan)
    rows = [known, unsure, plain]
    first, second, _ = csv.DictReader(io.StringIO(points_csv(study, rows)))
    assert first == {
        **{"loss": "other", "seeds_finished": "3", "seeds_planned": "3", "complete": "yes"},
        **{"val/recall@1": "0.75", "val/recall@1 ci_low": "0.625", "val/recall@1 ci_high": "0.875"},
        **{"baseline": "loss=plain", "pairs": "3", "difference": "0.25"},
        **{"difference ci_low": "0.125", "difference ci_high": "0.375", "p": "0.02", "p_holm": "0.04"},
    }
    left_open = {"difference ci_low": "", "difference ci_high": "", "p": "", "p_holm": ""}
    assert second == {**first, "difference": "-0.25", **left_open}
    lines = [line for line in markdown(study, rows, runs, entries).splitlines() if line.startswith("|")]
    header, _, first_line, second_line, last_line = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    name = "val/recall@1 [95% interval]"
    assert header == ["loss", "n", name, f"difference in {name}", "p", "p (Holm)"]
    mean = "0.7500 [0.6250, 0.8750]"
    assert first_line == ["other", "3 of 3", mean, "+0.2500 [+0.1250, +0.3750]", "0.020", "0.040"]
    assert second_line == ["other", "3 of 3", mean, "-0.2500", "", ""]
    assert last_line[3:] == ["baseline", "", ""]


def test_the_plan_tells_the_median_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One training beside a busy neighbour must not stand for all that are still to come."""
    walls = (10.0, 90.0, 20.0)
    study, _, runs, entries = book_of(tmp_path, {"plain": [0.5, 0.5, 0.5], "other": []}, walls=walls)
    assert seconds_of_one(runs, entries) == 20
    two = dict(list(entries.items())[:2])
    assert seconds_of_one(runs, two) == 50 and math.isnan(seconds_of_one(runs, {}))
    ledger = Ledger(storage.open_storage(study.storage), study.name, study.mode, study.lease)
    ledger.enter(runs)
    for run in [run for run in runs if run.key in entries]:
        claimed = ledger.claim([run])
        assert claimed is not None
        ledger.finish(claimed, 0.5, entries[run.key].attributes["result"])
    for options, words in (([], "one worker about 60 s."), (["--workers", "2"], "2 workers about 40 s.")):
        main(["--config", str(tmp_path / "hand.yaml"), "--dry-run", *options], lambda: lambda _: None)
        plan = capsys.readouterr().out
        assert f"One took 20 s (median); the 3 that wait take {words}" in plan
        own = [line.split()[1:3] for line in plan.splitlines() if line.startswith("finished")]
        assert own == [["10", "s"], ["90", "s"], ["20", "s"]]


def test_the_tables_hold_what_was_found_and_what_is_missing(tmp_path: Path) -> None:
    """A point with two of three seeds must not pass for one with three."""
    study, points, runs, entries = book(tmp_path)
    rows = rows_of(study, points, entries)
    table = list(csv.DictReader(io.StringIO(points_csv(study, rows))))
    assert len(table) == 6
    for line, row in zip(table, rows, strict=True):
        assert (line["loss"], line["size"]) == tuple(row.point.choice.values())
        assert float(line["val/recall@1 ci_low"]) == row.means["val/recall@1"].low
        assert line["complete"] == ("yes" if row.complete else "no")
    assert {line["seeds_finished"] for line in table if line["complete"] == "no"} == {"2"}
    trials = list(csv.DictReader(io.StringIO(trials_csv(study, runs, entries))))
    assert [line["state"] for line in trials].count("finished") == 16
    assert [line["error"] for line in trials if line["state"] == "failed"] == ["out of memory"]
    assert sum(line["state"] == "waiting" for line in trials) == 1
    text = markdown(study, rows, runs, entries)
    assert "18 trainings: 16 finished, 1 waiting, 1 failed" in text
    assert text.count("2 of 3 (incomplete)") == 2 and "fewer than 3 seeds" in text and "1 failed" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {9}


def test_the_figure_shows_means_and_intervals_with_labels(tmp_path: Path) -> None:
    """Units on the axes, a logarithmic axis for ratios, the legend beside the data, no line through a gap."""
    study, points, _, entries = book(tmp_path, exclude=[{"loss": "other", "size": 0.1}], labels={"val/loss": "loss"})
    rows = rows_of(study, points, entries)
    figure = figure_of(study, study.axes[1], rows)
    upper, between, lower = figure.axes
    assert (lower.get_xlabel(), lower.get_ylabel(), upper.get_ylabel()) == (
        "memory ratio",
        "loss",
        "val/recall@1 (fraction)",
    )
    assert upper.get_xscale() == "log" and upper.get_legend() is None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["loss=plain", "loss=other"]
    containers: Any = upper.containers
    plain, other = (container.lines[0] for container in containers)
    assert (plain.get_color(), other.get_color()) == COLOURS[:2]
    assert np.asarray(plain.get_xdata()).tolist() == [0.01, 0.1, 1.0]
    wanted = {row.point.label: row.means["val/recall@1"].mean for row in rows}
    assert np.asarray(plain.get_ydata()).tolist() == [wanted[f"loss=plain, size={size}"] for size in (0.01, 0.1, 1.0)]
    assert np.isnan(np.asarray(other.get_ydata(), dtype=float)).tolist() == [False, True, False]
    assert not overlaps(figure)
    assert [axes.xaxis.get_tick_params()["labelbottom"] for axes in figure.axes] == [False, False, True]
    assert between.get_ylabel().replace("\n", " ") == "difference in val/recall@1 from loss=plain"
    differences: Any = between.containers
    drawn = np.asarray(differences[1].lines[0].get_ydata(), dtype=float)
    held = {row.point.label: row.comparison for row in rows}["loss=other, size=0.01"]
    assert held is not None and drawn[0] == held.difference.mean and between.lines[0].get_ydata() == [0, 0]
    assert np.isnan(np.asarray(differences[0].lines[0].get_ydata(), dtype=float)).all()  # the baseline itself
    low, high = between.get_ylim()
    assert low < held.difference.low < held.difference.high < high
    for axes, name in zip((upper, lower), study.metrics, strict=True):
        low, high = axes.get_ylim()
        means = [row.means[name] for row in rows]
        assert low < min(mean.low for mean in means) and high > max(mean.high for mean in means)
        left, right = axes.get_xlim()
        assert left < 0.01 < 1.0 < right and high - low < 2 * (max(m.high for m in means) - min(m.low for m in means))


def test_an_axis_of_numbers_is_drawn_in_their_order(tmp_path: Path) -> None:
    """The file may begin with the value that matters most; a line that goes back and forth says nothing."""
    axes = {"loss": {"$a_": {}, "_b$_$": {"model.a": 1}}, "x": {"option": "model.b", "values": [512, 128, 256]}}
    content = {"base": {"model.a": 0}, "axes": axes, "seeds": [0, 1, 2], "metric": "val/recall@1"}
    (tmp_path / "odd.yaml").write_text(json.dumps(content))
    study = StudyFile.read(tmp_path / "odd.yaml")
    points = points_of(study)
    runs = runs_of(study, points)
    values = {run.key: float(run.point.choice["x"]) + run.seed for run in runs}
    entries = {
        run.key: Entry(run.key, 1, "finished", n, {"result": {"metrics": {"val/recall@1": {"last": values[run.key]}}}})
        for n, run in enumerate(runs)
    }
    figure = figure_of(study, study.axes[1], rows_of(study, points, entries))
    containers: Any = figure.axes[0].containers
    for bars in containers:
        assert np.asarray(bars.lines[0].get_xdata()).tolist() == [128, 256, 512]
        assert np.asarray(bars.lines[0].get_ydata()).tolist() == [129, 257, 513]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["128", "256", "512"]
    assert len(figure.legends[0].get_texts()) == 2
    figure.draw_without_rendering()  # names are no mathematics
    figure_of(study, study.axes[0], rows_of(study, points, entries)).draw_without_rendering()


def test_a_figure_that_cannot_be_drawn_does_not_take_the_others_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table of a finished study must not hang on a figure."""
    study, points, runs, entries = book(tmp_path, output=str(tmp_path / "out"))

    def draw(study: StudyFile, axis: Axis, rows: Sequence[Row]) -> Figure:
        if axis.name == "loss":
            raise ValueError("Axis limits cannot be NaN")
        return figure_of(study, axis, rows)

    monkeypatch.setattr("lightning_dml.study.results.figure.figure_of", draw)
    # What an earlier report left would be taken for a figure of this table.
    (tmp_path / "out").mkdir()
    for stale in ("loss.png", "loss-curves.svg", "mine.png"):
        (tmp_path / "out" / stale).write_bytes(b"old")
    report(study, points, runs, entries)
    printed = capsys.readouterr().out
    assert "loss is not drawn: Axis limits cannot be NaN" in printed and "size.png, size.svg" in printed
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"table.md", "table.csv", "trials.csv", "size.png", "size.svg", "mine.png"}


def test_error_bars_are_as_long_as_the_intervals(tmp_path: Path) -> None:
    """A reader looks first at whether bars overlap."""
    values = {"plain": [0.5, 0.6, 0.7], "other": [0.7, 0.75, 0.8], "single": [0.55]}
    study, points, _, entries = book_of(tmp_path, values)
    rows: dict[str, Row] = {row.point.choice["loss"]: row for row in rows_of(study, points, entries)}
    figure = figure_of(study, study.axes[0], list(rows.values()))
    containers: Any = figure.axes[0].containers
    (drawn,) = containers
    line, caps, (bars,) = drawn.lines
    wanted = []
    for name in ("plain", "other"):
        low, high = scipy.stats.t.interval(0.95, 2, np.mean(values[name]), scipy.stats.sem(values[name]))
        wanted.append((low, high))
    wanted.append((0.55, 0.55))  # one seed has a point without a bar
    assert np.asarray(line.get_ydata()) == pytest.approx([0.6, 0.75, 0.55])
    assert np.asarray(bars.get_segments())[:, :, 0].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert np.asarray(bars.get_segments())[:, :, 1] == pytest.approx(np.asarray(wanted))
    assert np.stack([cap.get_ydata() for cap in caps], axis=1) == pytest.approx(np.asarray(wanted))


def test_text_is_legible_at_half_size(tmp_path: Path) -> None:
    """Half of 13 points is what a footnote has."""
    study, points, _, entries = book(tmp_path)
    figure = figure_of(study, study.axes[1], rows_of(study, points, entries))
    texts = [*figure.legends[0].get_texts(), *figure.texts]
    for axes in figure.axes:
        texts += [axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()]
    assert min(float(text.get_fontsize()) for text in texts) >= 13


def test_long_names_leave_room_for_the_data(tmp_path: Path) -> None:
    """A legend that pushes the panels aside, or a title under it, cannot be read; drift is a squared distance."""
    axes = {
        "loss": {"the longest name of a variant that one would give": {}, "b": {"model.a": 1}},
        "size": {"option": "model.b", "values": [0.01, 0.1, 1.0]},
    }
    metrics = ["drift/bank", "other_bank/drift/probe", "drifting"]
    named: dict[str, Any] = {"baseline": None, "name": "a-study-of-a-long-name-and-of-many-words"}
    study, points, _, entries = book(tmp_path, axes=axes, metrics=metrics, **named)
    figure = figure_of(study, study.axes[1], rows_of(study, points, entries))
    assert not overlaps(figure) and len(figure.texts) == 1
    assert all(axes.get_window_extent().width > 3.5 * figure.dpi for axes in figure.axes)
    labels = ["val/recall@1 (fraction)", "drift/bank\n(squared distance)", "other_bank/drift/probe\n(squared distance)"]
    assert [axes.get_ylabel() for axes in figure.axes] == [*labels, "drifting"]


def test_a_report_writes_whole_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another worker may be writing the same report, and a reader must never find half a table."""
    study, points, runs, entries = book(tmp_path, output=str(tmp_path / "out"))
    report(study, points, runs, entries)
    names = {"table.md", "table.csv", "trials.csv", "loss.png", "loss.svg", "size.png", "size.svg"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert min(Image.open(tmp_path / "out/size.png").size) > 400
    assert (tmp_path / "out/size.svg").read_text().startswith("<?xml")
    assert "# Study known" in capsys.readouterr().out


def test_the_course_is_told_step_by_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A value under another step or training would be read as a finding; what is missing must be told."""
    course = {"metrics": ["drift/bank", "drift/floor"], "every": 5}
    study, points, runs, entries = book_of(tmp_path, {"a": [0.5, 0.6], "b": [0.7]}, course=course)
    for number, run in enumerate(runs[:2]):  # a and b of seed 0
        noted = {"drift/floor": [[10, 0.25]], "drift/bank": [[5, None], [10, 0.5 + number]]}
        write_whole(folder_of(run, study.output) / RESULT, json.dumps({"course": noted}))
    report(study, points, runs, entries)
    keys = [run.key for run in runs]
    assert (study.output / "course.csv").read_text().splitlines() == [
        "loss,seed,key,step,drift/bank,drift/floor",
        f"a,0,{keys[0]},5,,",
        f"a,0,{keys[0]},10,0.5,0.25",
        f"b,0,{keys[1]},5,,",
        f"b,0,{keys[1]},10,1.5,0.25",
    ]
    printed = capsys.readouterr().out
    assert "course.csv lacks values of 1 of 3 finished trainings, such as loss=a, seed=1" in printed
    assert "trials.csv, course.csv" in printed


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna and SciPy come with an extra, which is easy to forget."""
    with pytest.raises(InputError, match=r"pip install 'lightning-dml\[study\]'"):
        storage.needed("optuna_that_is_not_there")
