"""The command `lightning-dml study`: many trainings that differ in stated ways, each exactly once, and their table.

    lightning-dml study --config configs/study/smoke.yaml

The study file (YAML):

* `base`: training configs, as `fit --config` takes them, by path from the study file's folder, laid over each other;
  a mapping among them is laid over too. In a second `--config`, `base+` adds to the list, and `base.1` replaces what
  is in place 1; axes, baseline and labels are merged, and the names joined. So one file puts many studies on other
  data: `--config positives.yaml --config hanzi.yaml` is the study positives-hanzi.
* `axes`: what is varied. An axis is a list of values, whose name is then the dotted option (`trainer.max_epochs: [1,
  2]`); or `{option: trainer.max_epochs, values: [1, 2]}` under a name of its own; or variants, a mapping of names to
  overrides (`{none: {}, long: {trainer.max_epochs: 9}}`). `{variants: ...}` or `{option, values}` may have a `label`
  for the figure. Overrides are dotted or nested; an item of a list goes by its class, as in
  `trainer.callbacks.MemoryBankCallback.init_args.momentum`, `null` takes it out, and `trainer.callbacks+` adds one
  (lightning_dml.study.plan.overrides).
* `seeds`: each point is trained with each ([0] if left out). A seed is given to `seed_everything`, and to the dotted
  options in `seed_options`, such as [data.init_args.seed] for the batches and their augmentation.
* `exclude`: combinations to leave out, each a mapping of axes to a variant or several.
* `baseline`: a variant for some axes or all; a point is compared with the one that has these variants and its own on
  the other axes.
* `metric`, `mode` (max or min), `value` (last or best): what is compared; `metrics`: what is reported too;
  `labels`: what the figure calls metrics and axes. `course: {metrics: [drift/bank], every: 100}` notes what had been
  logged last at every so many optimizer steps.
* `name` (the file's), `output` (runs/study/NAME), `storage` (sqlite:///OUTPUT/study.db; any SQLAlchemy URL, or
  journal:FILE), both from the folder that the command is started in; `lease` (120 seconds without a sign of life, after
  which a worker on another machine counts as dead), `keep_checkpoints` (true).

Several workers share a study by its storage: start the command as often as there are machines or GPUs, at once or
later, or with `--workers`. A training is claimed by one of them. One whose worker was killed is taken over from its
last checkpoint, one that failed stays failed until `--retry-failed`, one that finished is never repeated. SIGTERM,
SIGINT, SIGHUP (but under nohup), SIGUSR1 and SIGUSR2 end the training and put it back to waiting. SQLite is for workers
on one machine; for several take a server, or journal:FILE on a shared file system. In a SLURM array every task is a
worker:

    #SBATCH --array=0-7 --ntasks=1 --gpus=1 --signal=B:TERM@60
    exec lightning-dml study --config configs/study/NAME.yaml

A training is one whole run on the task's node; it may use several GPUs there (trainer.devices), not several nodes.

Grid and seeds may grow: a training is known by its config, so only those that are new are run. The base config must
stay; another one needs another name. Each training has a folder, OUTPUT/trials/KEY, with its config, log, logs of the
loggers, checkpoints and result; a result that is there is taken and not trained again.

The report, in OUTPUT: `table.md`, `table.csv`, `trials.csv`, `course.csv` where a course is noted (from the folders of
the trainings, so from those that are on this machine), and for each axis `AXIS.png` and `.svg`, the metrics
against its variants. Where each variant is another loss (`model.init_args.loss`), `AXIS-curves.png` and `.svg` set
the metrics beside the weight curves, a row for each variant.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dml.errors import InputError
from lightning_dml.files import write_whole
from lightning_dml.study.plan.grid import Point, Run, check_configs, identity, points_of, runs_of
from lightning_dml.study.plan.loss_axis import chooses_the_loss
from lightning_dml.study.plan.study_file import Axis, StudyFile
from lightning_dml.study.results.summary import Row, count_states, rows_of, seconds_of_one, state_of
from lightning_dml.study.running.ledger import Entry, Ledger, is_there
from lightning_dml.study.running.local_workers import run_workers
from lightning_dml.study.running.storage import exists, needed, open_storage
from lightning_dml.study.running.trial_config import folder_of, read_result, training_config
from lightning_dml.study.running.worker import FIT, Worker

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from optuna.storages import BaseStorage

ITSELF = (sys.executable, "-m", "lightning_dml", "study")


def main(
    arguments: Sequence[str],
    make_parser: Callable[[], Callable[[dict[str, Any]], object]],
    fit: Sequence[str] = FIT,
    itself: Sequence[str] = ITSELF,
) -> None:
    """Runs `lightning-dml study`.

    Args:
        arguments: those after `study`.
        make_parser: makes what reads a training config and raises InputError for a wrong one.
        fit: the command of one training.
        itself: the command that starts further workers; the arguments are put behind it.

    Raises:
        InputError: for a study that cannot be run.
        SystemExit: with status 1 if a training failed or a worker died, with 128 + the signal's number if one came.
    """
    options = _options(arguments)
    study = StudyFile.read(*options.config)
    points = points_of(study)
    runs = runs_of(study, points)
    needed("optuna"), needed("scipy")
    if not options.report_only:

        def written(point: Point) -> dict[str, Any]:
            run = Run(point, study.seeds[0])
            return training_config(run, folder_of(run, study.output), study.course)

        check_configs(points, make_parser(), written)
    if options.dry_run or options.report_only:
        opened = open_storage(study.storage) if exists(study.storage) else None
        found = opened is not None and is_there(opened, study.name)
        ledger = _ledger(study, opened) if opened is not None and found else None
        if ledger is None and options.report_only:
            raise InputError(
                f"storage {study.storage} {f'has no study {study.name}' if opened else 'is not there'}, so there is "
                "nothing to report: start the command in the folder where the study ran, or leave --report-only out"
            )
        if ledger:
            ledger.pin(identity(study.base), begin=False)  # a report on another base would be empty, over a full one
        entries = ledger.entries() if ledger else {}
        if options.dry_run:
            print(_plan(study, runs, entries, options.workers))
        else:
            report(study, points, runs, entries)
        return
    ledger = _ledger(study, open_storage(study.storage))
    ledger.pin(identity(study.base))
    ended: list[str] = []
    if options.workers > 1:
        command = [*itself, *(part for path in options.config for part in ("--config", path)), "--no-report"]
        command += ["--trials", str(options.trials)] if options.trials else []
        # Only the first tries again what failed: a second could try again what has just failed anew.
        stopped, ended = run_workers(command, options.workers, ["--retry-failed"] if options.retry_failed else [])
    else:
        worker = Worker(study, runs, ledger, fit)
        worker.work(options.retry_failed, options.trials)
        stopped = worker.stopped
    entries = ledger.entries()
    if not options.no_report:
        report(study, points, runs, entries)
        failed = [run for run in runs if state_of(run, entries) == "failed"]
        for run in failed:
            print(f"FAILED {run.label}: {entries[run.key].attributes['error']}")
        if any(state_of(run, entries) in ("running", "waiting") for run in runs):
            print("What other workers have is not waited for; the same command goes on with what is left.")
    if stopped is not None:
        raise SystemExit(128 + stopped)
    if any(state_of(run, entries) == "failed" for run in runs):
        raise SystemExit(1)
    if ended:  # with no training failed, it is the workers that did not do what they should
        print(f"{', '.join(ended)}; what they had is taken over when the same command is started again")
        raise SystemExit(1)


def report(study: StudyFile, points: Sequence[Point], runs: Sequence[Run], entries: Mapping[str, Entry]) -> None:
    """Writes the tables and figures of a study into its output folder and prints the table."""
    from lightning_dml.study.results.figure import figure_of  # matplotlib
    from lightning_dml.study.results.tables import course_csv, markdown, points_csv, trials_csv

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
        name = "".join(each if each.isalnum() or each in "-_." else "_" for each in axis.name)
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
    """What the finished trainings noted of the metrics whose course the study wants."""
    finished = [run for run in runs if state_of(run, entries) == "finished"]
    found = {run.key: (read_result(folder_of(run, study.output)) or {}).get("course", {}) for run in finished}
    lacking = [run.label for run in finished if set(study.course.metrics) - set(found[run.key])]
    if lacking:
        print(
            f"course.csv lacks values of {len(lacking)} of {len(finished)} finished trainings, such as {lacking[0]}: "
            "they did not log them, ran before the course was asked for, or their folders are elsewhere"
        )
    return found


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lightning-dml study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-c", "--config", required=True, action="append", help="the study file; several are laid over each other"
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would run and how long it takes; run nothing")
    parser.add_argument("--report-only", action="store_true", help="write tables and figures of what is there")
    parser.add_argument("--retry-failed", action="store_true", help="try the trainings that failed once more")
    parser.add_argument("--workers", type=_count, default=1, help="workers on this machine, one GPU each in turn")
    parser.add_argument("--trials", type=_count, help="the most trainings that a worker starts")
    parser.add_argument("--no-report", action="store_true", help="write no tables and figures at the end")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _ledger(study: StudyFile, storage: BaseStorage) -> Ledger:
    return Ledger(storage, study.name, study.mode, study.lease)


def _plan(study: StudyFile, runs: Sequence[Run], entries: Mapping[str, Entry], workers: int) -> str:
    lines = [f"{state_of(run, entries):9}{_seconds(run, entries):>9}  {run.key}  {run.label}" for run in runs]
    lines.append(f"study {study.name}: {count_states(runs, entries)}")
    one, left = seconds_of_one(runs, entries), sum(state_of(run, entries) == "waiting" for run in runs)
    if math.isnan(one):
        lines.append("No training has finished yet, so there is no telling how long the rest takes.")
    else:
        each = f"{workers} workers" if workers > 1 else "one worker"
        lines.append(
            f"One took {_duration(one)} (median); the {left} that wait take {each} about "
            f"{_duration(math.ceil(left / workers) * one)}."
        )
    return "\n".join(lines)


def _seconds(run: Run, entries: Mapping[str, Entry]) -> str:
    return f"{entries[run.key].attributes['result']['wall']:.0f} s" if state_of(run, entries) == "finished" else ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
