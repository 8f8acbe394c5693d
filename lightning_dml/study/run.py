"""One call of a study: its check, its plan or its workers, and its report."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_dml.errors import InputError
from lightning_dml.study.plan.grid import Point, Run, check_configs, identity, points_of, runs_of
from lightning_dml.study.plan.study_file import StudyFile
from lightning_dml.study.results.report import report
from lightning_dml.study.results.summary import count_states, seconds_of_one, state_of
from lightning_dml.study.running.ledger import Entry, Ledger, is_there
from lightning_dml.study.running.local_workers import run_workers
from lightning_dml.study.running.storage import exists, needed, open_storage
from lightning_dml.study.running.trial_config import folder_of, training_config
from lightning_dml.study.running.worker import FIT, Worker

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


def run_study(
    options: argparse.Namespace,
    make_parser: Callable[[], Callable[[dict[str, Any]], object]],
    fit: Sequence[str] | None,
    itself: Sequence[str],
) -> None:
    """Plans, runs or reports a study.

    Args:
        options: of `lightning-dml study`.
        make_parser: makes what reads a training config and raises InputError for a wrong one.
        fit: the command of one training; None is `python -m lightning_dml fit`.
        itself: the command that starts further workers; the arguments are put behind it.

    Raises:
        InputError: for a study that cannot be run.
        SystemExit: with status 1 if a training failed or a worker died, with 128 + the signal's number if one came.
    """
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
        ledger = _ledger(study, opened) if opened is not None and is_there(opened, study.name) else None
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
        worker = Worker(study, runs, ledger, fit or FIT)
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


def _ledger(study: StudyFile, storage: BaseStorage) -> Ledger:
    return Ledger(storage, study.name, study.mode, study.lease)


def _plan(study: StudyFile, runs: Sequence[Run], entries: Mapping[str, Entry], workers: int) -> str:
    lines = [f"{state_of(run, entries):9}{_seconds(run, entries):>9}  {run.key}  {run.label}" for run in runs]
    lines.append(f"study {study.name}: {count_states(runs, entries)}")
    one, left = seconds_of_one(runs, entries), sum(state_of(run, entries) == "waiting" for run in runs)
    if math.isnan(one):
        lines.append("No training has finished yet, so there is no telling how long the rest takes.")
    else:
        team = f"{workers} workers" if workers > 1 else "one worker"
        lines.append(
            f"One took {_duration(one)} (median); the {left} that wait take {team} about "
            f"{_duration(math.ceil(left / workers) * one)}."
        )
    return "\n".join(lines)


def _seconds(run: Run, entries: Mapping[str, Entry]) -> str:
    return f"{entries[run.key].attributes['result']['wall']:.0f} s" if state_of(run, entries) == "finished" else ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
