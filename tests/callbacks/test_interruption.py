"""Real processes that are killed, requeued or terminated, and the runs that go on from what they left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from pytorch_lightning.utilities.exceptions import SIGTERMException

from tests.callbacks.interrupted_runs import (
    PATIENCE,
    assert_checkpoints_load_safely,
    assert_equal,
    assert_resumed,
    batches,
    command,
    end,
    free_port,
    last_checkpoint,
    outcome,
    output_of,
    requeue_calls,
    scratch_folder,
    send,
    slurm,
    start,
    torchrun,
    wait_for,
    whole,
)
from tests.helpers import ROOT
from tests.scripts.fit_interrupted import BATCHES, EPOCHS, Run, fit

pytestmark = pytest.mark.slow

PAUSE = 0.1  # seconds in a step: a signal that comes after a step falls into the next one
RANKS = range(2)


def kill(run: Run, after: int) -> None:
    """Kills the run's process some time after it was through with so many batches."""
    process = start(run)
    wait_for(lambda: len(batches(run)) >= after, run, process)
    time.sleep(PAUSE / 3)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert BATCHES * EPOCHS > len(batches(run)) >= after


@pytest.mark.parametrize(("momentum", "accumulate"), [(0.9, 1), (None, 1), (0.9, 4)])
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path, momentum: float | None, accumulate: int) -> None:
    """A node that dies, twice, must cost the steps since the last checkpoint and nothing else."""
    run = Run(str(tmp_path), "killed", momentum, accumulate, pause=PAUSE)
    kill(run, after=8)
    again = replace(run, name="again", resume=str(last_checkpoint(run)))
    kill(again, after=5)  # one more than are accumulated: the checkpoint of the step after the fourth is then complete
    resumed = replace(again, name="resumed", pause=0.0)
    fit(resumed)
    right = whole(replace(run, folder=""))
    assert_resumed(resumed, right)
    assert 6 <= batches(again)[0] <= 9 < batches(resumed)[0]
    assert_checkpoints_load_safely(tmp_path)


def test_a_requeued_job_picks_up_its_checkpoint(tmp_path: Path) -> None:
    """SLURM signals whenever the time is up; the job that starts again must be the job that was stopped."""
    run = Run(str(tmp_path), "first", pause=PAUSE, validation=3)
    process = start(run, slurm(tmp_path))
    wait_for(lambda: len(batches(run)) >= 8, run, process)
    time.sleep(PAUSE / 2)
    send(process, signal.SIGUSR1)
    wait_for(lambda: requeue_calls(tmp_path) == ["requeue 1234"], run, process)
    send(process, signal.SIGTERM)
    end(run, process)
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()

    resumed = replace(run, name="second", pause=0.0)
    end(resumed, start(resumed, slurm(tmp_path)))
    assert_resumed(resumed, whole(replace(run, folder="")))
    assert batches(resumed)[0] >= 8
    assert_checkpoints_load_safely(tmp_path)


@pytest.mark.parametrize(("sharded", "signalled"), [(False, (1, 0)), (True, (1,))])
def test_two_tasks_are_requeued_together(tmp_path: Path, sharded: bool, signalled: tuple[int, ...]) -> None:
    """Ranks hear of the end at different times, or one alone does; saving in different steps would hang both."""
    run = Run(str(tmp_path), "first", ranks=2, pause=PAUSE, sharded=sharded, validation=3)
    processes = tasks(run)
    wait_for(lambda: len(batches(run)) >= 7, run, *processes)
    for signum in (signal.SIGUSR1, signal.SIGTERM):
        for rank in signalled:
            time.sleep(PAUSE * 1.5)  # the second falls into another step
            send(processes[rank], signum)
        wait_for(lambda: requeue_calls(tmp_path) == ["requeue 1234"], run)
    end(run, *processes)
    assert_requeued_on_two(run, first=7)


def test_one_rank_alone_is_signalled_in_validation(tmp_path: Path) -> None:
    """Ranks have different numbers of validation batches, so they can only agree at its end."""
    run = Run(str(tmp_path), "first", ranks=2, validation=3)
    # The first batch is in the sanity check, so these are in the validations after the first and the second epoch.
    at = ("validation_step", 3, int(signal.SIGUSR1)), ("validation_step", 6, int(signal.SIGTERM))
    end(run, *tasks(run, replace(run, at=at)))
    assert batches(run) == list(range(2 * BATCHES))
    assert_requeued_on_two(run, first=BATCHES)


def tasks(*runs: Run) -> list[BaseProcess]:
    """Starts the two tasks of a SLURM job."""
    port = free_port()
    return [start(runs[rank % len(runs)], slurm(Path(runs[0].folder), 2, rank, port)) for rank in RANKS]


def assert_requeued_on_two(run: Run, first: int) -> None:
    """Starts the job again, and compares it with the uninterrupted one, rank by rank."""
    assert batches(run, 0) == batches(run, 1)
    assert requeue_calls(Path(run.folder)) == ["requeue 1234"]
    resumed = replace(run, name="second", pause=0.0)
    end(resumed, *tasks(resumed))
    right = whole_on_two(run.sharded)
    for rank in RANKS:
        assert_resumed(resumed, right, rank=rank)
    assert batches(resumed)[0] >= first
    assert_equal(outcome(resumed, 1)["weights"], outcome(resumed, 0)["weights"])
    assert_checkpoints_load_safely(Path(run.folder))


@cache
def whole_on_two(sharded: bool) -> Run:
    """The uninterrupted job on two ranks."""
    run = Run(scratch_folder(), "whole", ranks=2, sharded=sharded, validation=3)
    end(run, *tasks(run))
    return run


def test_sigterm_ends_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    """Outside of SLURM nothing is saved on the signal; the last checkpoint must do, and the process must end."""
    run = Run(str(tmp_path), "stopped", pause=PAUSE)
    process = start(run)
    wait_for(lambda: len(batches(run)) >= 8, run, process)
    send(process, signal.SIGTERM)
    end(run, process)
    assert 8 <= len(batches(run)) < 12
    resumed = replace(run, name="resumed", pause=0.0, resume=str(last_checkpoint(run)))
    fit(resumed)
    assert_resumed(resumed, whole(replace(run, folder="")), first=len(batches(run)))
    assert_checkpoints_load_safely(tmp_path)


@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
def test_sigterm_ends_two_ranks(tmp_path: Path, launcher: str) -> None:
    """Lightning's handler broadcasts, and passes the signal to the ranks that it launched: neither may hang."""
    run = Run(str(tmp_path), "stopped", ranks=2, pause=PAUSE, double=True)
    if launcher == "torchrun":
        port = free_port()
        processes = [start(run, torchrun(2, rank, port)) for rank in RANKS]
        wait_for(lambda: len(batches(run)) >= 8, run, *processes)
        for process in processes:
            send(process, signal.SIGTERM)
            time.sleep(PAUSE * 1.2)
        end(run, *processes)
    else:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (tmp_path / "stopped.txt").open("w") as output:
            launched = subprocess.Popen(command(run), env=environment, stdout=output, stderr=output)
        wait_for(lambda: len(batches(run)) >= 8 or launched.poll() is not None, run)
        launched.terminate()
        assert launched.wait(PATIENCE) == 0, output_of(run)
    assert batches(run, 0) == batches(run, 1)
    assert 8 <= len(batches(run)) < BATCHES * EPOCHS

    resumed = replace(run, name="resumed", pause=0.0, ranks=1, resume=str(last_checkpoint(run)))
    fit(resumed)
    assert batches(resumed) == list(range(len(batches(run)), BATCHES * EPOCHS))
    assert_close_to_one_rank(resumed)
    assert_checkpoints_load_safely(tmp_path)


def test_one_rank_goes_on_as_two(tmp_path: Path) -> None:
    """Who gets another GPU for the rest of a run trains the same model, with the same bank on both."""
    run = Run(str(tmp_path), "stopped", at=(("training_step", 8, int(signal.SIGTERM)),), double=True)
    with pytest.raises(SIGTERMException):
        fit(run)
    resumed = replace(run, name="resumed", at=(), ranks=2, resume=str(last_checkpoint(run)))
    port = free_port()
    end(resumed, *(start(resumed, torchrun(2, rank, port)) for rank in RANKS))
    assert batches(resumed) == list(range(8, BATCHES * EPOCHS))
    assert_equal(outcome(resumed, 1), outcome(resumed, 0))
    assert_close_to_one_rank(resumed)


def assert_close_to_one_rank(resumed: Run) -> None:
    """Ranks add their gradients in another order, which is all that may differ."""
    right = whole(replace(resumed, folder="", ranks=1, name="", resume=None))
    assert_equal(outcome(resumed), outcome(right), tolerance=1e-6)
