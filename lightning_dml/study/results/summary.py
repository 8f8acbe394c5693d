"""The trials of a study summed up: a row for each grid point, and how much is left to do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from lightning_dml.study.plan.grid import Point, Run, baseline_of
from lightning_dml.study.plan.study_file import StudyFile
from lightning_dml.study.results.statistics import Comparison, Mean, compare, holm, mean_of
from lightning_dml.study.running.ledger import Entry
from lightning_dml.study.running.trial_config import metric_value

STATES = ("finished", "running", "waiting", "failed")


@dataclass(frozen=True)
class Row:
    """A grid point.

    Args:
        point: the point.
        states: of its trainings, by seed.
        values: of each metric, by seed.
        means: of each metric.
        baseline: the point that it is compared with, if the study has a baseline.
        comparison: of the study's metric with the baseline's; None for the baseline itself.
        p_holm: the p value, adjusted for the number of comparisons in the table.
    """

    point: Point
    states: Mapping[int, str]
    values: Mapping[str, Mapping[int, float]]
    means: Mapping[str, Mean]
    baseline: Point | None
    comparison: Comparison | None
    p_holm: float

    @property
    def complete(self) -> bool:
        """True when all seeds are in."""
        return all(state == "finished" for state in self.states.values())


def rows_of(study: StudyFile, points: Sequence[Point], entries: Mapping[str, Entry]) -> list[Row]:
    """A row for each point, the best by the study's metric first, those without a result last."""
    values = {point.key: _values(study, point, entries) for point in points}
    rows = []
    for point in points:
        baseline = baseline_of(point, points, study.baseline)
        own = values[point.key]
        comparison = None
        if baseline is not None and baseline is not point:
            comparison = compare(own[study.metric], values[baseline.key][study.metric])
        states = {seed: state_of(Run(point, seed), entries) for seed in study.seeds}
        means = {name: mean_of([by_seed[seed] for seed in sorted(by_seed)]) for name, by_seed in own.items()}
        rows.append(Row(point, states, own, means, baseline, comparison, math.nan))
    adjusted = holm([row.comparison.p if row.comparison else math.nan for row in rows])
    rows = [replace(row, p_holm=p) for row, p in zip(rows, adjusted, strict=True)]
    sign = -1 if study.mode == "max" else 1
    last = math.inf

    def place(row: Row) -> float:
        mean = row.means[study.metric].mean
        return last if math.isnan(mean) else sign * mean

    return sorted(rows, key=place)


def state_of(run: Run, entries: Mapping[str, Entry]) -> str:
    """The state of a training: finished, running, waiting (also if not entered yet, or lost) or failed."""
    entry = entries.get(run.key)
    return entry.state if entry is not None and entry.state in STATES else "waiting"


def count_states(runs: Sequence[Run], entries: Mapping[str, Entry]) -> str:
    """The counts of the states, such as "12 trainings: 9 finished, 1 running, 2 waiting"."""
    counts = Counter(state_of(run, entries) for run in runs)
    text = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return f"{len(runs)} training{'s' if len(runs) != 1 else ''}: {text}"


def seconds_of_one(runs: Sequence[Run], entries: Mapping[str, Entry]) -> float:
    """Median wall time of the trainings that finished, start of the process included; nan where none has."""
    times = [
        float(entries[run.key].attributes["result"]["wall"]) for run in runs if state_of(run, entries) == "finished"
    ]
    return median(times) if times else math.nan


def _values(study: StudyFile, point: Point, entries: Mapping[str, Entry]) -> dict[str, dict[int, float]]:
    """Metric -> seed -> value, of the trainings that finished; a metric that one of them lacks is left out."""
    finished = {
        seed: entries[Run(point, seed).key].attributes["result"]
        for seed in study.seeds
        if state_of(Run(point, seed), entries) == "finished"
    }
    values = {}
    for name in study.metrics:
        by_seed = {seed: metric_value(result, name, study.mode, study.value) for seed, result in finished.items()}
        values[name] = {seed: value for seed, value in by_seed.items() if not math.isnan(value)}
    return values
