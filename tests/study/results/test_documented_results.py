"""The tables of docs/study.md are those of the trainings whose results lie beside it."""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
from scipy import stats

from lightning_dml.study.plan.grid import points_of, runs_of
from lightning_dml.study.plan.study_file import StudyFile
from tests.helpers import ROOT

RESULTS = sorted((ROOT / "docs/results").glob("*.csv"))
DRIFTS = sorted((ROOT / "docs/results/drift").glob("*.csv"))
PAGE = (ROOT / "docs/study.md").read_text(encoding="utf-8")
ON_GLYPHS, ON_HANZI = PAGE.split("## On Chinese characters")


def study_of(name: str) -> StudyFile:
    """The study whose results are NAME.csv: one file, or one with another laid over it."""
    stem, *over = name.split("-")
    return StudyFile.read(*(ROOT / f"configs/study/{name}.yaml" for name in (stem, *over)))


def rows_in(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by the names of its columns."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def interval(values: list[float], sign: str = "") -> str:
    """Mean and 95 % interval by Student's t distribution, as the tables have them."""
    mean = statistics.fmean(values)
    if len(set(values)) == 1:  # one training under two names, not one without spread
        return f"{mean:{sign}.4f} |"
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:{sign}.4f} [{mean - half:{sign}.4f}, {mean + half:{sign}.4f}]"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_page_says_what_was_measured(path: Path) -> None:
    """A number in the documents that no training gave is what this library is not to have."""
    study = study_of(path.stem)
    axes = [axis.name for axis in study.axes]
    rows = rows_in(path)
    assert {row["state"] for row in rows} == {"finished"}
    assert sorted(row["key"] for row in rows) == sorted(run.key for run in runs_of(study, points_of(study)))
    values: dict[tuple[str, ...], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        for metric in study.metrics:
            if row[f"{metric} last"]:
                values[tuple(row[axis] for axis in axes)][metric][int(row["seed"])] = float(row[f"{metric} last"])
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    for choice, by_metric in values.items():
        own = by_metric[study.metric]
        cells = [*choice, f"{len(own)} of {len(study.seeds)}"]
        cells += [interval(list(by_metric[metric].values())) for metric in study.metrics if by_metric[metric]]
        base = tuple(study.baseline.get(axis, variant) for axis, variant in zip(axes, choice, strict=True))
        if base == choice:
            cells.append("baseline")
        else:
            cells.append(interval([own[seed] - values[base][study.metric][seed] for seed in own], "+"))
        wanted = " | ".join(cells)
        assert any(wanted in line for line in lines), f"{path.stem}: no line with {wanted}"


def values_of(cell: str, results: Iterable[Path]) -> dict[int, float]:
    """The metric by seed at a point that is written as `axis=variant, axis=variant`, from the study with these axes."""
    choice = dict(part.split("=", 1) for part in cell.split(", "))
    for path in results:
        study = study_of(path.stem)
        if {axis.name for axis in study.axes} == set(choice):
            rows = [row for row in rows_in(path) if choice.items() <= row.items()]
            return {int(row["seed"]): float(row[f"{study.metric} last"]) for row in rows}
    raise AssertionError(f"no study has the axes of {cell}")


def test_the_page_says_how_points_differ() -> None:
    """Further comparisons are of trainings with the same seed, each as far from zero as the page has it."""
    on_glyphs = [path for path in RESULTS if "-" not in path.stem]
    on_hanzi = [path for path in RESULTS if path.stem.endswith("-hanzi")]
    pages = ((ON_GLYPHS, on_glyphs), (ON_HANZI, on_hanzi))
    compared = [(line, data) for page, data in pages for line in page.splitlines() if re.match(r"\| \w+=", line)]
    for line, data in compared:
        one, other, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        own, base = values_of(one, data), values_of(other, data)
        assert own.keys() == base.keys() and len(own) == 3
        p = float(stats.ttest_rel([own[seed] for seed in own], [base[seed] for seed in own]).pvalue)
        shown = "< 0.001" if p < 0.001 else f"{p:.3f}"
        assert line == f"| {one} | {other} | {interval([own[seed] - base[seed] for seed in own], '+')} | {shown} |"
    assert len(compared) > 20


@pytest.mark.parametrize("path", DRIFTS, ids=lambda path: path.stem)
def test_the_page_says_how_stale_the_memory_was(path: Path) -> None:
    """The measurements are those of the trainings in the table of momentum, and their means are on the page."""
    last = {row["key"]: row["drift/bank last"] for row in rows_in(ROOT / "docs/results" / path.name)}
    rows = rows_in(path)
    assert {row["key"] for row in rows} == set(last)
    stale: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if int(row["step"]) == 900:
            assert float(row["drift/bank"]) == pytest.approx(float(last[row["key"]]), rel=1e-6)
        if row["start"] == "100":
            difference = float(row["drift/bank"]) - float(row["drift/floor"])
            stale[row["keys"]][int(row["step"])].append(difference)
    lines = (ON_HANZI if path.stem.endswith("-hanzi") else ON_GLYPHS).splitlines()
    for keys, by_step in stale.items():
        assert all(len(values) == 3 for values in by_step.values())
        means = (f"{statistics.fmean(by_step[step]):.2f}" for step in (200, 400, 600, 900))
        assert f"| {keys} | {' | '.join(means)} |" in lines


def test_the_page_says_how_long_it_took() -> None:
    """Who wants to run them should know."""
    seconds = [float(row["seconds"]) for path in RESULTS for row in rows_in(path)]
    hours = sum(seconds) / 2 / 3600
    said = f"All {len(seconds)} trainings took {hours:.0f} hours of a machine with two cores, two at a time"
    assert f"{said}, and half of them less than {statistics.median(seconds):.0f} s each." in PAGE


def test_there_are_results() -> None:
    """The test above would pass with none."""
    names = {"positives", "negatives", "memory_ratio", "batch_size", "momentum", "mining_weighting"}
    assert {path.stem for path in RESULTS} == names | {f"{name}-hanzi" for name in names}
    assert {path.stem for path in DRIFTS} == {"momentum", "momentum-hanzi"}
