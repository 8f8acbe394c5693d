"""One worker of a study: takes one training after the other from the ledger and runs each in a process of its own."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

from lightning_dml.errors import InputError
from lightning_dml.study.plan.grid import Run
from lightning_dml.study.plan.study_file import StudyFile
from lightning_dml.study.running import trial_config
from lightning_dml.study.running.ledger import Entry, Ledger, Lost
from lightning_dml.study.running.storage import needed

T = TypeVar("T")

FIT = (sys.executable, "-m", "lightning_dml", "fit")
GUARD = (sys.executable, "-m", "lightning_dml.study.running.guard")
POLL = 0.2  # seconds
GRACE = 20.0  # seconds that a training has to end by itself; SLURM kills 30 after its SIGTERM
BEATS_PER_LEASE = 8
# What asks a job to end; SLURM's --signal usually sends USR1 or USR2 ahead of the time limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STORAGE_TRIALS = 8
FIRST_PAUSE = 1.0  # seconds; the next is twice as long, and so on
COMPLAINT = re.compile(r"(?:[\w-]+: )?error: ")


class Worker:
    """Runs what waits until nothing does.

    Args:
        study: the study.
        runs: its trainings, in the order in which they are to be started.
        ledger: of the study.
        fit: the command of a training; `--config FILE`, and `--ckpt_path FILE` when it goes on, are put behind it.
        say: takes a line for the user.
    """

    def __init__(
        self,
        study: StudyFile,
        runs: Sequence[Run],
        ledger: Ledger,
        fit: Sequence[str] = FIT,
        say: Callable[[str], None] = print,
    ) -> None:
        self.study = study
        self.runs = runs
        self.ledger = ledger
        self.fit = fit
        self.say = say
        self.stopped: signal.Signals | None = None
        self._by_key = {run.key: run for run in runs}
        # Of a database, and of the file system that a journal is on.
        self._storage_errors = (needed("optuna").exceptions.StorageInternalError, OSError)

    def work(self, retry_failed: bool = False, most: int | None = None) -> int:
        """Runs trainings until none waits and no dead worker's is left, or a signal comes.

        Args:
            retry_failed: whether those that failed are to be tried again, once.
            most: the most trainings to start; None is no limit.

        Returns:
            How many it ran.

        Raises:
            InputError: if a training did not log the study's metric, as no other would.
        """
        done = 0
        with self._signals():
            self._stored(lambda: self.ledger.enter(self.runs, retry_failed))
            while self.stopped is None and (most is None or done < most):
                alive = self._stored(lambda: self.ledger.recover(self.runs))
                entry = self._stored(lambda: self.ledger.claim(self.runs))
                if entry is not None:
                    self._run(entry)
                    done += 1
                elif alive:
                    break
                else:
                    time.sleep(POLL)
        return done

    def _run(self, entry: Entry) -> None:
        run = self._by_key[entry.key]
        folder = trial_config.folder_of(run, self.study.output)
        started = time.monotonic()
        try:
            result = trial_config.read_result(folder)
            error = None
            if result is None:
                error = self._train(entry, run, folder)
                result = trial_config.read_result(folder)
            if self.stopped is not None and result is None:
                self.say(f"{run.label}: put back to waiting")
                self.ledger.release(entry)
                return
            seconds = time.monotonic() - started
            if result is None:
                place = self._set_aside(entry, folder)
                self._fail(entry, run, f"{error} (see {place / trial_config.LOG})")
                return
            value = trial_config.metric_value(result, self.study.metric, self.study.mode, self.study.value)
            result.pop("course", None)  # stays in the folder: a text column of a server may not hold it
            result["wall"] = max(seconds, float(result.get("seconds", 0.0)))
            if self.study.metric not in result["metrics"]:
                self._wrong_metric(entry, result["metrics"])
            if not math.isfinite(value):
                place = self._set_aside(entry, folder)
                self._fail(entry, run, f"{self.study.metric} is not a finite number (see {place})")
                return
            self._stored(lambda: self.ledger.finish(entry, value, result))
            self.say(f"{run.label}: {self.study.metric} {value:.4f}, {seconds:.0f} s")
            if not self.study.keep_checkpoints:
                trial_config.drop_checkpoints(folder)
        except Lost:
            self.say(f"{run.label}: another worker took it over, as this one gave no sign of life; its result counts")
        except BaseException:
            self.ledger.release(entry)
            raise

    def _train(self, entry: Entry, run: Run, folder: Path) -> str:
        """Runs the training to its end, its error or the worker's; returns the last line of its log."""
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = trial_config.last_checkpoint(folder)
        config = trial_config.write_config(run, folder, self.study.course)
        command = [*GUARD, *self.fit, "--config", str(config)]
        if checkpoint is not None:
            trial_config.keep_logged(folder)
            command += ["--ckpt_path", str(checkpoint)]
        going_on = f", going on from {checkpoint.name}" if checkpoint else ""
        self.say(f"{run.label}: attempt {entry.attempt}{going_on}, {folder}")
        with (folder / trial_config.LOG).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )
            try:
                self._watch(process, entry)
            finally:
                _kill(process)
        return f"status {process.returncode}: {_complaint(folder / trial_config.LOG)}"

    def _watch(self, process: subprocess.Popen[bytes], entry: Entry) -> None:
        next_beat, until = 0.0, math.inf
        while process.poll() is None:
            now = time.monotonic()
            if self.stopped is not None and until == math.inf:
                os.killpg(process.pid, signal.SIGTERM)
                until = now + GRACE
            if now > until:
                return
            if now > next_beat:
                next_beat = now + self.ledger.lease / BEATS_PER_LEASE
                try:
                    self.ledger.beat(entry)
                except self._storage_errors as error:  # the training does not need it; the next beat may come through
                    self._say_silent(error)
            try:
                process.wait(POLL)
            except subprocess.TimeoutExpired:
                pass

    def _set_aside(self, entry: Entry, folder: Path) -> Path:
        """Makes room for the next attempt, unless another worker has taken the training over and works there."""
        self._stored(lambda: self.ledger.beat(entry))
        return trial_config.set_aside(folder, "failed")

    def _fail(self, entry: Entry, run: Run, error: str) -> None:
        self._stored(lambda: self.ledger.fail(entry, error))
        self.say(f"{run.label}: FAILED, {error}")

    def _wrong_metric(self, entry: Entry, logged: dict[str, object]) -> None:
        error = (
            f"metric {self.study.metric} was not logged by the training, which logged {', '.join(sorted(logged))}: "
            "put it right and run the study with --retry-failed, which takes what has been trained"
        )
        self.ledger.fail(entry, error)
        raise InputError(error)

    def _stored(self, ask: Callable[[], T]) -> T:
        """Reads or writes, and again after a while where the storage does not answer: servers are started anew."""
        failures = 0
        while True:
            try:
                return ask()
            except self._storage_errors as error:
                failures += 1
                if failures == STORAGE_TRIALS or self.stopped is not None:
                    raise
                self._say_silent(error)
            until = time.monotonic() + FIRST_PAUSE * 2.0 ** (failures - 1)
            while self.stopped is None and time.monotonic() < until:  # a job that is to end has no minutes to wait
                time.sleep(POLL)

    def _say_silent(self, error: Exception) -> None:
        self.say(f"the storage does not answer: {' '.join(str(error).split())[:200]}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Notes the signals that ask a job to end; the loops look at it, so that no write to the storage is cut off."""

        def note(signum: int, _: FrameType | None) -> None:
            self.stopped = signal.Signals(signum)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, note) for number in heard()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def heard() -> list[signal.Signals]:
    """The signals that end a worker: not those that whoever started it had it ignore, as nohup does with SIGHUP."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def _environment() -> dict[str, str]:
    # A training is one whole run on this node: Lightning must not take the worker's SLURM task for one of its ranks.
    return {**os.environ, "SLURM_JOB_NAME": "interactive"} if "SLURM_JOB_ID" in os.environ else dict(os.environ)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of the training: ranks and loaders of a run that crashed hold memory of the GPU."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _complaint(path: Path) -> str:
    """The complaint of a command from "error: " on, else the last line that was printed, as that of a traceback is."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    start = max((place for place, line in enumerate(lines) if COMPLAINT.match(line)), default=-1)
    if any(line.startswith("Traceback (most recent") for line in lines[start + 1 :]):
        start = -1
    return " ".join(lines[start:])[:500] or "it printed nothing"
