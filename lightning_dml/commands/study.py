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
import sys
from collections.abc import Callable, Sequence
from typing import Any

ITSELF = (sys.executable, "-m", "lightning_dml", "study")


def main(
    arguments: Sequence[str],
    make_parser: Callable[[], Callable[[dict[str, Any]], object]],
    fit: Sequence[str] | None = None,
    itself: Sequence[str] = ITSELF,
) -> None:
    """Runs `lightning-dml study`.

    Args:
        arguments: those after `study`.
        make_parser: makes what reads a training config and raises InputError for a wrong one.
        fit: the command of one training; None is `python -m lightning_dml fit`.
        itself: the command that starts further workers; the arguments are put behind it.

    Raises:
        InputError: for a study that cannot be run.
        SystemExit: with status 1 if a training failed or a worker died, with 128 + the signal's number if one came.
    """
    options = parser().parse_args(arguments)
    from lightning_dml.study.run import run_study  # heavy: a help is to come at once

    run_study(options, make_parser, fit, itself)


def parser() -> argparse.ArgumentParser:
    """Reads the options of `lightning-dml study`; its help ends with the study file's format."""
    about, _, details = str(__doc__).partition("\n\n")
    reader = argparse.ArgumentParser(
        prog="lightning-dml study",
        description=about.partition(": ")[2].capitalize(),
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    reader.add_argument(
        "-c", "--config", required=True, action="append", help="the study file; several are laid over each other"
    )
    reader.add_argument("--dry-run", action="store_true", help="list what would run and how long it takes; run nothing")
    reader.add_argument("--report-only", action="store_true", help="write tables and figures of what is there")
    reader.add_argument("--retry-failed", action="store_true", help="try the trainings that failed once more")
    reader.add_argument("--workers", type=_count, default=1, help="workers on this machine, one GPU each in turn")
    reader.add_argument("--trials", type=_count, help="the most trainings that a worker starts")
    reader.add_argument("--no-report", action="store_true", help="write no tables and figures at the end")
    return reader


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
