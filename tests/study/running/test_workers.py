"""Workers on one storage: killed, late, several at once; every training is in the result exactly once."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError

from lightning_dml.study.plan.grid import points_of, runs_of
from lightning_dml.study.plan.study_file import StudyFile
from lightning_dml.study.running.ledger import Entry, Ledger, Lost
from lightning_dml.study.running.storage import open_storage
from lightning_dml.study.running.worker import STORAGE_TRIALS, Worker, _complaint
from tests.helpers import ROOT
from tests.study.pretend import FIT
from tests.study.pretend import STUDY as STUDY_COMMAND
from tests.study.running.cases import POINTS, STUDY


class Folder:
    """A working folder with a study file, and the workers that were started there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.processes: list[subprocess.Popen[str]] = []

    def write(self, **changes: Any) -> None:
        """Writes the study file."""
        (self.path / "grid.yaml").write_text(json.dumps({**STUDY, **changes}))

    def start(self, *options: str) -> subprocess.Popen[str]:
        """Starts a worker."""
        process = subprocess.Popen(
            [*STUDY_COMMAND, "--config", "grid.yaml", *options],
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def run(self, *options: str, status: int = 0) -> str:
        """Runs a worker to its end and returns what it printed."""
        process = self.start(*options)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == status, printed
        return printed

    def starts(self) -> Counter[str]:
        """The number of starts of each training."""
        return Counter(
            path.parent.name
            for path in self.path.glob("runs/study/grid/trials/*/starts.txt")
            for _ in path.read_text().splitlines()
        )

    def trials(self) -> list[dict[str, str]]:
        """The rows of trials.csv."""
        with (self.path / "runs/study/grid/trials.csv").open() as file:
            return list(csv.DictReader(file))

    def finished(self) -> Counter[str]:
        """The number of trials of each training that Optuna itself has as completed."""
        storage = f"sqlite:///{self.path}/runs/study/grid/study.db"
        trials = optuna.load_study(study_name="grid", storage=storage).get_trials(deepcopy=False)
        return Counter(trial.user_attrs["key"] for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    """A folder with the study of this file; no worker outlives the test."""
    made = Folder(tmp_path)
    made.write()
    # A job in the background of a shell ignores Ctrl-C, and so would all that is started here.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield made
    signal.signal(signal.SIGINT, interrupt)
    for process in made.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with its workers, which hold its output open
        process.communicate()


def until(condition: Callable[[], bool], seconds: float = 40) -> None:
    """Waits for something that other processes bring about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """True if the process is there and is more than the rest of a dead one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_killed_in_mid_trial_and_resumed_by_two_workers_at_once(folder: Folder) -> None:
    """The promise of the command: whatever dies, every grid point and seed is in the result once, trained once."""
    folder.write(base={"model.value": 0.5, "model.seconds": 0.05, "model.then": "hang"}, axes=STUDY["axes"])
    hanging = folder.path / "runs/study/grid/trials"
    first = folder.start()
    until(lambda: any(hanging.glob("*/checkpoints/last.ckpt")))
    (started,) = hanging.glob("*/starts.txt")
    (line,) = started.read_text().splitlines()
    trainer = int(line.split()[0])
    assert is_running(trainer)
    first.send_signal(signal.SIGKILL)
    first.wait()
    until(lambda: not is_running(trainer))  # else two trainings would write into one folder
    # What hung goes on from its checkpoint and ends; those after it would hang as well, so they get one each.
    for run in runs_of(study := StudyFile.read(folder.path / "grid.yaml"), points_of(study)):
        place = hanging / run.key
        if run.key != started.parent.name:
            (place / "checkpoints").mkdir(parents=True)
            (place / "checkpoints/last.ckpt").write_bytes((started.parent / "checkpoints/last.ckpt").read_bytes())
    workers = [folder.start("--no-report"), folder.start("--no-report")]
    printed = [worker.communicate(timeout=60)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], printed
    keys = {path.name for path in hanging.iterdir()}
    assert len(keys) == POINTS
    assert folder.finished() == dict.fromkeys(keys, 1)
    assert folder.starts() == {**dict.fromkeys(keys, 1), started.parent.name: 2}
    assert [line.split(maxsplit=1)[1] for line in started.read_text().splitlines()] == ["anew", "going on"]
    assert sum("going on from last.ckpt" in text for text in "".join(printed).splitlines()) == POINTS
    folder.run("--report-only")
    trials = folder.trials()
    assert {trial["key"] for trial in trials} == keys and len(trials) == POINTS
    assert {trial["state"] for trial in trials} == {"finished"}
    for trial in trials:
        value = float(trial["model.value"]) + int(trial["seed"]) / 100
        assert float(trial["val/recall@1 last"]) == pytest.approx(value)


def test_two_workers_that_begin_a_study_at_once(folder: Folder) -> None:
    """Both find an empty storage: tables, study and trials are made by both, and still nothing runs twice."""
    workers = [folder.start("--no-report") for _ in range(2)]
    printed = [worker.communicate(timeout=60)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], printed
    assert len(folder.starts()) == POINTS and set(folder.starts().values()) == {1}
    assert set(folder.finished().values()) == {1} and len(folder.finished()) == POINTS
    again = folder.run()
    assert "attempt" not in again and f"{POINTS} trainings: {POINTS} finished" in again
    assert set(folder.starts().values()) == {1}
    folder.write(axes={**STUDY["axes"], "model.value": [0.1, 0.2, 0.3], "model.more": {"no": {}}})
    plan = folder.run("--dry-run")
    assert f"12 trainings: {POINTS} finished, 4 waiting" in plan
    assert "One took 1 s (median); the 4 that wait take one worker about 4 s." in plan
    grown = folder.run("--no-report")
    assert sum("attempt 1" in line for line in grown.splitlines()) == 4
    assert set(folder.starts().values()) == {1} and len(folder.starts()) == 12
    folder.write(base={"model.value": 0.5, "model.seconds": 0.06})
    tables = (folder.path / "runs/study/grid/table.csv").read_text()
    assert "base has changed" in folder.run("--report-only", status=2)
    assert (folder.path / "runs/study/grid/table.csv").read_text() == tables
    refused = folder.run(status=2)
    assert "base has changed since the study grid began, at model.seconds (was 0.05, is 0.06)" in refused


def test_a_failure_is_noted_and_the_others_go_on(folder: Folder) -> None:
    """One setting that runs out of memory must not take the night's other trainings with it."""
    axes = {"model.then": ["raise", "refuse", "nan", "die", None]}
    folder.write(axes=axes, seeds=[0], base={"model.value": 0.5})
    printed = folder.run(status=1)
    assert "5 trainings: 1 finished, 4 failed" in printed
    errors = {trial["model.then"]: trial["error"] for trial in folder.trials()}
    assert "InputError: margin must be positive" in errors["raise"] and "log.txt" in errors["raise"]
    assert errors["refuse"].startswith("status 2: lightning-dml: error: Option 'x' is not accepted (see ")
    assert "val/recall@1 is not a finite number" in errors["nan"]
    assert "status 137" in errors["die"]
    assert errors["null"] == ""
    assert "attempt" not in folder.run(status=1)
    again = folder.run("--retry-failed", status=1)
    assert sum("attempt 2" in line for line in again.splitlines()) == 4
    kept = Counter(path.name.partition("-failed")[1:] for path in folder.path.glob("runs/study/grid/trials/*"))
    assert kept == {("-failed", ""): 4, ("-failed", "-2"): 4, ("", ""): 1}
    assert set(folder.starts().values()) == {1}


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("", "it printed nothing"),
        ("one\ntwo\n\n", "two"),
        ("usage: x\nx: error: Option 'a' is not\n  accepted\n", "x: error: Option 'a' is not accepted"),
        ("error: in vain\nTraceback (most recent call last):\n  File\nValueError: why\n", "ValueError: why"),
        ("x: error: first\nmore\nx: error: last", "x: error: last"),
    ],
)
def test_the_line_that_tells_is_found(tmp_path: Path, printed: str, said: str) -> None:
    """It is all that the table of a study has of a training that failed."""
    (tmp_path / "log.txt").write_text(printed)
    assert _complaint(tmp_path / "log.txt") == said


def test_a_metric_that_is_not_logged_ends_the_study(folder: Folder) -> None:
    """A typo in the metric's name would fail every training after hours; what was trained is kept for the right one."""
    folder.write(metric="val/recal@1")
    printed = folder.run(status=2)
    assert "val/recal@1 was not logged by the training, which logged val/recall@1" in printed
    assert sum(folder.starts().values()) == 1
    folder.write()
    assert "3 finished" in folder.run("--retry-failed", "--trials", "3")
    assert len(folder.starts()) == 3 and set(folder.starts().values()) == {1}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_puts_the_training_back(folder: Folder, signum: signal.Signals) -> None:
    """The end of a job's time is no failure: the next job goes on where this one was."""
    folder.write(base={"model.value": 0.5, "model.then": "hang"}, axes={"model.other": [1]}, seeds=[0])
    worker = folder.start()
    trials = folder.path / "runs/study/grid/trials"
    until(lambda: any(trials.glob("*/checkpoints/last.ckpt")))
    trainer = int(next(trials.glob("*/starts.txt")).read_text().split()[0])
    worker.send_signal(signum)
    printed, _ = worker.communicate(timeout=30)
    assert worker.returncode == 128 + signum, printed
    assert "put back to waiting" in printed and not is_running(trainer)
    assert "attempt 1, going on from last.ckpt" in folder.run()


def test_nohup_is_heeded(folder: Folder) -> None:
    """Whoever starts a study under nohup and logs out wants it to go on."""
    folder.write(base={"model.value": 0.5, "model.seconds": 2}, axes={"model.other": [1]}, seeds=[0])
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        worker = folder.start()
    finally:
        signal.signal(signal.SIGHUP, before)
    until(lambda: any((folder.path / "runs/study/grid/trials").glob("*/starts.txt")))
    worker.send_signal(signal.SIGHUP)
    printed, _ = worker.communicate(timeout=30)
    assert worker.returncode == 0 and "1 training: 1 finished" in printed


def worker_in(folder: Folder, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> Worker:
    """A worker in this process, whose trainings are pretended."""
    monkeypatch.chdir(folder.path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("lightning_dml.study.running.worker.FIRST_PAUSE", 0.0)
    study = StudyFile.read("grid.yaml")
    ledger = Ledger(open_storage(study.storage), study.name, study.mode, study.lease)
    return Worker(study, runs_of(study, points_of(study)), ledger, FIT, said.append)


@pytest.mark.parametrize("error", [OSError(116, "Stale file handle"), StorageInternalError("server closed")])
@pytest.mark.parametrize("method", ["enter", "recover", "claim", "beat", "finish"])
def test_a_storage_that_does_not_answer_is_asked_again(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, method: str, error: Exception
) -> None:
    """A server that is started anew, or a file system that stutters, must not end a night's work or a training."""
    folder.write(axes={"model.other": [1]}, seeds=[0], base={"model.value": 0.5, "model.seconds": 1})
    said: list[str] = []
    worker = worker_in(folder, monkeypatch, said)
    real = getattr(worker.ledger, method)
    failed: list[str] = []

    def once_not(*arguments: Any) -> Any:
        if not failed:
            failed.append(method)
            raise error
        return real(*arguments)

    monkeypatch.setattr(worker.ledger, method, once_not)
    assert worker.work() == 1 and failed
    assert sum("the storage does not answer" in line for line in said) == 1
    assert set(folder.finished().values()) == {1} and set(folder.starts().values()) == {1}


def test_a_storage_that_never_answers_ends_the_worker(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for ever would hold a GPU."""
    said: list[str] = []
    worker = worker_in(folder, monkeypatch, said)

    def fail(_: object) -> None:
        raise OSError("no such server")

    monkeypatch.setattr(worker.ledger, "recover", fail)
    with pytest.raises(OSError, match="no such server"):
        worker.work()
    assert len(said) == STORAGE_TRIALS - 1


def test_a_signal_ends_the_waiting_for_a_storage(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is told to end is killed half a minute later."""
    said: list[str] = []
    worker = worker_in(folder, monkeypatch, said)
    monkeypatch.setattr("lightning_dml.study.running.worker.FIRST_PAUSE", 1000.0)

    def fail(_: object) -> None:
        if not said:  # the first time; later the handler may be gone
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        raise OSError("no such server")

    monkeypatch.setattr(worker.ledger, "recover", fail)
    with pytest.raises(OSError, match="no such server"):
        worker.work()
    assert worker.stopped == signal.SIGUSR1 and len(said) == 1


def test_a_worker_that_lost_its_training_leaves_the_folder_alone(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken for dead; the folder that it would set aside is the one in which another worker trains by now."""
    folder.write(axes={"model.then": ["raise"]}, seeds=[0], base={"model.value": 0.5})
    said: list[str] = []
    worker = worker_in(folder, monkeypatch, said)

    def late(entry: Entry) -> None:
        raise Lost

    monkeypatch.setattr(Worker, "_watch", lambda self, process, entry: process.wait())
    monkeypatch.setattr(worker.ledger, "beat", late)
    assert worker.work(most=1) == 1
    assert "another worker took it over" in said[-1]
    (kept,) = (folder.path / "runs/study/grid/trials").iterdir()
    assert "-failed" not in kept.name and (kept / "starts.txt").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGUSR2])
def test_the_command_starts_workers_and_passes_signals_on(folder: Folder, signum: signal.Signals) -> None:
    """One line is enough for a machine with several GPUs; Ctrl-C, or SLURM's warning, ends all that it started."""
    printed = folder.run("--workers", "2", "--trials", "1")
    assert f"{POINTS} trainings: 2 finished, 6 waiting" in printed and sum(folder.starts().values()) == 2
    folder.write(base=STUDY["base"], axes={"model.then": ["hang"], "model.other": [2, 3]}, seeds=[0])
    both = folder.start("--workers", "2")
    trials = folder.path / "runs/study/grid/trials"
    until(lambda: len(list(trials.glob("*/starts.txt"))) == 4)
    trainers = [int(path.read_text().split()[0]) for path in trials.glob("*/starts.txt")]
    both.send_signal(signum)
    said, _ = both.communicate(timeout=30)
    assert both.returncode == 128 + signum, said
    assert said.count("put back to waiting") == 2 and "2 trainings: 2 waiting" in said
    assert not any(is_running(trainer) for trainer in trainers)


def test_a_worker_starts_without_torch() -> None:
    """The command plans, reports and waits; what takes seconds to import, the trainings import."""
    code = "import sys, lightning_dml.commands.study; print(*sorted({'torch', 'pytorch_lightning'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == ""


def test_workers_that_die_are_told(folder: Folder) -> None:
    """A status of 0 with nothing done would let a job script go on to its next step."""
    folder.write(base={"model.value": 0.5, "model.then": "hang"}, axes={"model.other": [2, 3]}, seeds=[0])
    both = folder.start("--workers", "2")
    trials = folder.path / "runs/study/grid/trials"
    until(lambda: len(list(trials.glob("*/starts.txt"))) == 2)
    children = Path(f"/proc/{both.pid}/task/{both.pid}/children").read_text().split()
    assert len(children) == 2
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    said, _ = both.communicate(timeout=30)
    assert both.returncode == 1, said
    assert "worker 1 ended by SIGKILL, worker 2 ended by SIGKILL" in said and "taken over" in said


def test_a_report_without_a_study_is_refused(folder: Folder) -> None:
    """From a wrong folder it would put an empty table over the one of a week of computing."""
    folder.write(output="gone")
    table = folder.path / "gone/table.md"
    table.parent.mkdir()
    table.write_text("results")
    assert "gone/study.db is not there, so there is nothing to report" in folder.run("--report-only", status=2)
    assert table.read_text() == "results"
    folder.write(name="other", storage="sqlite:///gone/study.db", axes={"model.other": [1]})
    folder.run()
    folder.write(output="gone")
    assert "gone/study.db has no study grid, so there is nothing to report" in folder.run("--report-only", status=2)
    assert f"{POINTS} waiting" in folder.run("--dry-run")
    assert optuna.get_all_study_names(f"sqlite:///{folder.path}/gone/study.db") == ["other"]


def test_wrong_options_are_refused_before_anything_is_made(folder: Folder) -> None:
    """A refusal after the storage was made would leave half a study behind."""
    folder.write(axes={"model.valeu": [1]})
    assert "error: the training config of (model.valeu=1) is refused" in folder.run(status=2)
    folder.write(storage="runs/study.db")
    assert "storage must be an SQLAlchemy URL" in folder.run(status=2)
    (folder.path / "file").touch()
    files = ("mysql+none://x/y", "sqlite://study.db", "sqlite:///:memory:", "journal:", "sqlite:///file/study.db")
    in_memory = ("sqlite://", "sqlite+pysqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true")
    for storage in files + in_memory:
        folder.write(storage=storage, output="elsewhere")
        printed = folder.run(status=2)
        assert printed.startswith(f"error: storage {storage}") or f"{storage!r}" in printed, printed
        assert len(printed.splitlines()) == 1, printed
    folder.write()
    assert "must be a whole number" in folder.run("--workers", "0", status=2)
    assert f"{POINTS} waiting" in folder.run("--dry-run")
    assert not (folder.path / "runs").exists()
