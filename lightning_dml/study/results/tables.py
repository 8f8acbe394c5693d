"""The tables of a study: CSV with all digits for other programs, Markdown for people."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_dml.study.plan.grid import Run
from lightning_dml.study.plan.study_file import StudyFile
from lightning_dml.study.results.statistics import Mean
from lightning_dml.study.results.summary import Row, count_states, state_of
from lightning_dml.study.running.ledger import Entry


def points_csv(study: StudyFile, rows: Sequence[Row]) -> str:
    """One line for each grid point: variants, seeds, means with intervals, and the comparison."""
    header = [axis.name for axis in study.axes] + ["seeds_finished", "seeds_planned", "complete"]
    for name in study.metrics:
        header += [name, f"{name} ci_low", f"{name} ci_high"]
    header += ["baseline", "pairs", "difference", "difference ci_low", "difference ci_high", "p", "p_holm"]
    lines: list[list[Any]] = [header]
    for row in rows:
        finished = sum(state == "finished" for state in row.states.values())
        line: list[Any] = [*row.point.choice.values(), finished, len(row.states), "yes" if row.complete else "no"]
        for name in study.metrics:
            line += _bounds(row.means[name])
        line.append(row.baseline.label if row.baseline else "")
        if row.comparison is None:
            line += [""] * 6
        else:
            difference = row.comparison.difference
            line += [difference.n, *_bounds(difference), _number(row.comparison.p), _number(row.p_holm)]
        lines.append(line)
    return _csv(lines)


def trials_csv(study: StudyFile, runs: Sequence[Run], entries: Mapping[str, Entry]) -> str:
    """One line for each training: state, time, error, and the last, largest and smallest value of the metrics."""
    header = [axis.name for axis in study.axes] + ["seed", "key", "state", "attempt", "seconds", "error"]
    lines: list[list[Any]] = [header + [f"{name} {kind}" for name in study.metrics for kind in ("last", "max", "min")]]
    for run in runs:
        entry = entries.get(run.key)
        attributes = entry.attributes if entry else {}
        result = attributes.get("result") or {}
        line: list[Any] = [*run.point.choice.values(), run.seed, run.key, state_of(run, entries)]
        line += [entry.attempt if entry else "", result.get("wall", ""), attributes.get("error", "")]
        for name in study.metrics:
            values = result.get("metrics", {}).get(name, {})
            line += ["" if values.get(kind) is None else values[kind] for kind in ("last", "max", "min")]
        lines.append(line)
    return _csv(lines)


def course_csv(study: StudyFile, runs: Sequence[Run], courses: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each step at which a training noted the course of its metrics; `courses` are by the run's key."""
    names = study.course.metrics
    lines: list[list[Any]] = [[axis.name for axis in study.axes] + ["seed", "key", "step", *names]]
    for run in runs:
        by_step: dict[int, dict[str, Any]] = {}
        for name in names:
            for step, value in courses.get(run.key, {}).get(name, []):
                by_step.setdefault(step, {})[name] = value
        for step, values in sorted(by_step.items()):
            noted = ["" if values.get(name) is None else values[name] for name in names]
            lines.append([*run.point.choice.values(), run.seed, run.key, step, *noted])
    return _csv(lines)


def markdown(study: StudyFile, rows: Sequence[Row], runs: Sequence[Run], entries: Mapping[str, Entry]) -> str:
    """The table to read, with notes on what its numbers are."""
    compared = any(row.comparison is not None for row in rows)
    header = [axis.name for axis in study.axes] + ["n"] + [f"{name} [95% interval]" for name in study.metrics]
    if compared:
        header += [f"difference in {study.metric} [95% interval]", "p", "p (Holm)"]
    body = [header, ["---"] * len(header)]
    for row in rows:
        finished = sum(state == "finished" for state in row.states.values())
        mark = "" if row.complete else " (incomplete)"
        cells = [*row.point.choice.values(), f"{finished} of {len(row.states)}{mark}"]
        cells += [_with_interval(row.means[name]) for name in study.metrics]
        if compared and row.comparison is not None:
            cells += [_with_interval(row.comparison.difference, "+"), _p(row.comparison.p), _p(row.p_holm)]
        elif compared:
            cells += ["baseline" if row.baseline is row.point else "", "", ""]
        body.append(cells)
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in body)
    return f"# Study {study.name}\n\n{count_states(runs, entries)}.\n\n{table}\n\n{_notes(study, rows, compared)}\n"


def _notes(study: StudyFile, rows: Sequence[Row], compared: bool) -> str:
    which = "last" if study.value == "last" else f"best ({study.mode}imum over the validations)"
    notes = [
        f"Each value is the mean over the seeds of the {which} value of a training; intervals are those of Student's "
        "t distribution for the mean, and cover the seeds only, not the choice of the data.",
    ]
    if compared:
        notes.append(
            f"Differences are to the baseline ({_wanted(study)}) by seed, p is that of the two-sided paired t test, "
            "and p (Holm) is adjusted for the number of comparisons in the table."
        )
    counts = [row.means[study.metric].n for row in rows if row.means[study.metric].n]
    if counts and min(counts) < 3:
        notes.append(
            "Points with fewer than 3 seeds: their intervals and p values say next to nothing, and one seed has none."
        )
    failed = sum(state == "failed" for row in rows for state in row.states.values())
    if failed:
        notes.append(f"{failed} failed: trials.csv has the errors, and --retry-failed tries again.")
    return "\n".join(f"* {note}" for note in notes)


def _wanted(study: StudyFile) -> str:
    return ", ".join(f"{axis}={variant}" for axis, variant in study.baseline.items())


def _with_interval(mean: Mean, sign: str = "") -> str:
    if mean.n == 0:
        return ""
    if math.isnan(mean.low):
        return f"{mean.mean:{sign}.4f}"
    return f"{mean.mean:{sign}.4f} [{mean.low:{sign}.4f}, {mean.high:{sign}.4f}]"


def _p(p: float) -> str:
    if math.isnan(p):
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _bounds(mean: Mean) -> list[float | str]:
    return [_number(mean.mean), _number(mean.low), _number(mean.high)]


def _number(value: float) -> float | str:
    return "" if math.isnan(value) else value


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
