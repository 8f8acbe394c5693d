"""Starts, ends and compares the runs of `tests/scripts/fit_interrupted.py`."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch

from tests.helpers import ROOT
from tests.scripts import fit_interrupted
from tests.scripts.fit_interrupted import Run, fit

PATIENCE = 120  # seconds until a process counts as hung; starting one takes a minute on a machine that is busy


def start(run: Run, environment: dict[str, str] | None = None) -> BaseProcess:
    """Starts the run in a process of its own, with these variables added to its environment.

    It is forked from one that has imported everything, which takes longer than the fit. What it prints is in
    `NAME.txt`.
    """
    os.environ["PYTHONPATH"] = str(ROOT)  # the fork server of Python 3.11 takes its path from nowhere else
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([fit_interrupted.__name__])
    process = context.Process(target=_fit_here, args=(run, environment or {}))
    process.start()
    return process


def _fit_here(run: Run, environment: dict[str, str]) -> None:
    output = os.open(Path(run.folder) / f"{run.name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fit(run)


def command(run: Run) -> list[str]:
    """The command line of the run, for what needs a script: Lightning starts its own ranks with it."""
    return [sys.executable, str(fit_interrupted.__file__), json.dumps(asdict(run))]


def wait_for(condition: Callable[[], bool], run: Run, *processes: BaseProcess) -> None:
    """Waits for what the processes do, and shows what they printed if they end without."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        ended = any(process.exitcode is not None for process in processes)
        assert not ended and time.monotonic() < deadline, output_of(run)
        time.sleep(0.002)


def send(process: BaseProcess, signum: signal.Signals) -> None:
    """Sends a signal, unless the process has ended; another rank's signal may have ended it."""
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.kill(process.pid, signum)


def end(run: Run, *processes: BaseProcess) -> None:
    """Waits for the processes to end by themselves, kills those that do not, and shows what they printed."""
    for process in processes:
        process.join(PATIENCE)
    hung = [process for process in processes if process.exitcode is None]
    for process in hung:
        process.kill()
    assert not hung, f"{len(hung)} processes hang:\n{output_of(run)}"
    assert all(process.exitcode == 0 for process in processes), output_of(run)


def output_of(run: Run) -> str:
    """The output of the run's processes."""
    path = Path(run.folder) / f"{run.name}.txt"
    return path.read_text() if path.exists() else ""


def log(run: Run, rank: int = 0) -> dict[str, str]:
    """The exact value at each batch and validation, in order; a line that is being written is left out."""
    path = Path(run.folder) / f"{run.name}-{rank}.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return dict(json.loads(line) for line in lines)


def batches(run: Run, rank: int = 0) -> list[int]:
    """The batches that the run was through with, counted over epochs."""
    return [int(place) for place in log(run, rank) if place.isdigit()]


def outcome(run: Run, rank: int = 0) -> dict[str, Any]:
    """The state at the end of the run."""
    state: dict[str, Any] = torch.load(Path(run.folder) / f"{run.name}-{rank}.pt", weights_only=True)
    return state


def last_checkpoint(run: Run) -> Path:
    """The checkpoint that a user resumes from."""
    return Path(run.folder) / "checkpoints/last.ckpt"


@cache
def whole(run: Run) -> Run:
    """The uninterrupted run with these settings, made once."""
    run = replace(run, folder=scratch_folder(), name="whole", resume=None, at=(), pause=0.0)
    fit(run)
    return run


def scratch_folder() -> str:
    """A folder for what several tests compare with; it goes when the tests end."""
    return mkdtemp(dir=_scratch().name)


@cache
def _scratch() -> TemporaryDirectory[str]:
    return TemporaryDirectory()


def assert_resumed(resumed: Run, right: Run, first: int | None = None, rank: int = 0) -> None:
    """Compares a resumed run with the uninterrupted one, bit for bit; it may have left out a validation.

    `first` is the batch that it must have gone on with, counted over epochs.
    """
    theirs, ours = log(right, rank), log(resumed, rank)
    assert ours.items() <= theirs.items(), {place: (ours[place], theirs.get(place)) for place in ours}
    done = batches(resumed, rank)
    assert done == batches(right, rank)[done[0] :]
    assert first is None or done[0] == first
    assert_equal(outcome(resumed, rank), outcome(right, rank))


def assert_equal(ours: Any, right: Any, tolerance: float = 0, name: str = "") -> None:
    """Compares nested dicts of tensors and numbers."""
    if isinstance(right, dict):
        assert ours.keys() == right.keys(), name
        for key, value in right.items():
            assert_equal(ours[key], value, tolerance, f"{name}/{key}")
    else:
        difference = (torch.as_tensor(ours).double() - torch.as_tensor(right).double()).abs()
        assert not difference.numel() or difference.max() <= tolerance, (name, difference.max())


def assert_checkpoints_load_safely(folder: Path) -> None:
    """Loads every checkpoint in the folder as Lightning's CLI and careful users do."""
    paths = list(folder.rglob("*.ckpt"))
    assert paths
    for path in paths:
        assert "state_dict" in torch.load(path, weights_only=True)


def slurm(folder: Path, ranks: int = 1, rank: int = 0, port: int = 0) -> dict[str, str]:
    """The variables of a SLURM task, with a `scontrol` first on the path that notes its arguments."""
    (folder / "bin").mkdir(exist_ok=True)
    fake = folder / "bin/scontrol"
    if not fake.exists():
        fake.write_text(f'#!/bin/sh\necho "$@" >> {folder}/requeued.txt\n')
        fake.chmod(0o755)
    return {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NAME": "train",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": str(ranks),
        "SLURM_NTASKS_PER_NODE": str(ranks),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        **_meeting_point(port),
    }


def requeue_calls(folder: Path) -> list[str]:
    """The lines of arguments with which `scontrol` was called."""
    path = folder / "requeued.txt"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def torchrun(ranks: int, rank: int, port: int) -> dict[str, str]:
    """The variables that torchrun gives a process."""
    return {
        "TORCHELASTIC_RUN_ID": "none",
        "WORLD_SIZE": str(ranks),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        **_meeting_point(port),
    }


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _meeting_point(port: int) -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
