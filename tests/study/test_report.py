"""What a study reports: intervals, paired tests, tables and figures, from results that are known."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure
from PIL import Image

from lightning_dml.errors import InputError
from lightning_dml.study import storage
from lightning_dml.study.command import report
from lightning_dml.study.figure import COLOURS, figure_of
from lightning_dml.study.grid import Point, Run, points_of, runs_of
from lightning_dml.study.ledger import Entry
from lightning_dml.study.statistics import compare, holm, mean_of
from lightning_dml.study.study_file import StudyFile
from lightning_dml.study.summary import rows_of
from lightning_dml.study.tables import markdown, points_csv, trials_csv


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
    """What the training of this loss, size and seed brings."""
    noise = math.sin(7 * run.seed + 3 * float(run.point.choice["size"]))
    return 0.5 + 0.1 * (run.point.choice["loss"] == "other") * (1 + 0.3 * noise) + 0.01 * noise


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


def test_holm_is_the_sequential_rule() -> None:
    """With fifteen variants one in two studies would find a difference at 5% that is not there."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        p = generator.uniform(0, 0.1, 6).round(3).tolist()
        found = holm([*p, math.nan])
        assert math.isnan(found[-1])
        for level in (0.01, 0.05, 0.1, 0.2):
            rejected = []
            for rank, (each, place) in enumerate(sorted(zip(p, range(6), strict=True))):
                if each > level / (6 - rank):
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
    upper, lower = figure.axes
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
    assert not overlaps_the_data(figure)
    for axes, name in zip(figure.axes, study.metrics, strict=True):
        low, high = axes.get_ylim()
        means = [row.means[name] for row in rows]
        assert low < min(mean.low for mean in means) and high > max(mean.high for mean in means)
        left, right = axes.get_xlim()
        assert left < 0.01 < 1.0 < right and high - low < 2 * (max(m.high for m in means) - min(m.low for m in means))


def overlaps_the_data(figure: Figure) -> bool:
    """Whether the figure's legend covers any part of a panel."""
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    return any(legend.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_a_report_writes_whole_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another worker may be writing the same report, and a reader must never find half a table."""
    study, points, runs, entries = book(tmp_path, output=str(tmp_path / "out"))
    report(study, points, runs, entries)
    names = {"table.md", "table.csv", "trials.csv", "loss.png", "loss.svg", "size.png", "size.svg"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert min(Image.open(tmp_path / "out/size.png").size) > 400
    assert (tmp_path / "out/size.svg").read_text().startswith("<?xml")
    assert "# Study known" in capsys.readouterr().out


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna and SciPy come with an extra, which is easy to forget."""
    with pytest.raises(InputError, match=r"pip install 'lightning-dml\[study\]'"):
        storage.needed("optuna_that_is_not_there")
