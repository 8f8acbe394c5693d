"""The report of a study: its tables and figures, as files in its output folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dml.files import write_whole
from lightning_dml.study.plan.grid import Point, Run
from lightning_dml.study.plan.loss_axis import chooses_the_loss
from lightning_dml.study.plan.study_file import Axis, StudyFile
from lightning_dml.study.results.summary import Row, rows_of, state_of
from lightning_dml.study.results.tables import course_csv, markdown, points_csv, trials_csv
from lightning_dml.study.running.ledger import Entry
from lightning_dml.study.running.trial_config import folder_of, read_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def report(study: StudyFile, points: Sequence[Point], runs: Sequence[Run], entries: Mapping[str, Entry]) -> None:
    """Writes the tables and figures of a study into its output folder and prints the table."""
    from lightning_dml.study.results.figure import figure_of  # matplotlib

    rows = rows_of(study, points, entries)
    table = markdown(study, rows, runs, entries)
    print(table)
    write_whole(study.output / "table.md", table)
    write_whole(study.output / "table.csv", points_csv(study, rows))
    write_whole(study.output / "trials.csv", trials_csv(study, runs, entries))
    written = ["table.md", "table.csv", "trials.csv"]
    if study.course.metrics:
        write_whole(study.output / "course.csv", course_csv(study, runs, _courses(study, runs, entries)))
        written.append("course.csv")
    for axis in study.axes:
        if len(axis.variants) < 2 or not any(row.means[study.metric].n for row in rows):
            continue
        name = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in axis.name)
        for stem, draw in ((name, figure_of), (f"{name}-curves", partial(_with_curves, points))):
            written += _drawn(study.output, stem, partial(draw, study, axis, rows))
    print(f"{study.output}: {', '.join(written)}")


def _drawn(folder: Path, stem: str, draw: Callable[[], Figure | None]) -> list[str]:
    """Writes a figure and returns its files; without one, those of an earlier report go, as they fit no table here."""
    names = [f"{stem}.{ending}" for ending in ("png", "svg")]
    try:
        figure = draw()
        if figure is not None:
            for name in names:
                write_whole(folder / name, partial(figure.savefig, dpi=150))
            return names
    except ValueError as error:  # ours, and matplotlib's for what it cannot draw; the other figures still come
        print(f"{stem} is not drawn: {error}")
    for name in names:
        (folder / name).unlink(missing_ok=True)
    return []


def _with_curves(points: Sequence[Point], study: StudyFile, axis: Axis, rows: Sequence[Row]) -> Figure | None:
    """The figure with weight curves, where each variant of the axis is another loss."""
    if not chooses_the_loss(axis, points):
        return None
    from lightning_dml.study.results.curve_axis import curve_axis_figure  # torch

    return curve_axis_figure(study, axis, rows)


def _courses(study: StudyFile, runs: Sequence[Run], entries: Mapping[str, Entry]) -> dict[str, dict[str, Any]]:
    """The metrics whose course the study wants, as the finished trainings noted them, by the keys of these."""
    finished = [run for run in runs if state_of(run, entries) == "finished"]
    courses = {run.key: (read_result(folder_of(run, study.output)) or {}).get("course", {}) for run in finished}
    lacking = [run.label for run in finished if set(study.course.metrics) - set(courses[run.key])]
    if lacking:
        print(
            f"course.csv lacks values of {len(lacking)} of {len(finished)} finished trainings, such as {lacking[0]}: "
            "they did not log them, ran before the course was asked for, or their folders are elsewhere"
        )
    return courses
