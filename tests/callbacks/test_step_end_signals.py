"""A process sends itself the signal in the middle of a step; what is saved is the state at the step's end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException

from lightning_dml.callbacks import MemoryBankCallback
from lightning_dml.callbacks.step_end_signals import StepEndSignals
from tests.callbacks.interrupted_runs import (
    assert_checkpoints_load_safely,
    assert_equal,
    assert_resumed,
    batches,
    log,
    outcome,
    requeue_calls,
    slurm,
    whole,
)
from tests.scripts.fit_interrupted import Run, fit
from tests.tiny import QUIET, TinyData, tiny_module

REQUEUE, TERMINATE = int(signal.SIGUSR1), int(signal.SIGTERM)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a SLURM job that this process is the only task of."""
    for name, value in slurm(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path


def requeue(folder: Path, *at: tuple[str, int, int], **settings: Any) -> tuple[Run, Run, Run]:
    """The job until SIGTERM, the job that follows it, and the job as it would be without either."""
    right = whole(Run("", "whole", **settings))
    first = replace(right, folder=str(folder), name="first", at=at)
    with pytest.raises(SIGTERMException):
        fit(first)
    assert requeue_calls(folder) == ["requeue 1234"]
    second = replace(first, name="second", at=())
    fit(second)
    assert_checkpoints_load_safely(folder)
    return first, second, right


@pytest.mark.parametrize(
    ("place", "momentum", "first"),
    [
        ("transfer", 0.9, 8),  # the loader has counted the batch, Lightning has not
        ("enqueue", 0.9, 9),  # the bank starts a step late
        ("enqueue", None, 9),
        ("training_step", 0.9, 8),
        ("optimizer_step", 0.9, 8),
        ("encoder", 0.9, 9),  # the embedder has moved, the encoder has not
    ],
)
def test_a_requeued_job_is_the_uninterrupted_one(job: Path, place: str, momentum: float | None, first: int) -> None:
    """Wherever in a step the time is up, nothing of that step may be lost, done twice or half."""
    _, second, right = requeue(job, (place, 8, REQUEUE), ("training_step", 11, TERMINATE), momentum=momentum)
    assert_resumed(second, right, first)


def test_without_it_the_step_is_torn(job: Path) -> None:
    """The tests above can fail: Lightning alone saves a batch as seen that was not trained."""
    _, second, right = requeue(job, ("enqueue", 8, REQUEUE), ("training_step", 11, TERMINATE), deferred=False)
    with pytest.raises(AssertionError):
        assert_resumed(second, whole(replace(right, deferred=True)))


@pytest.mark.parametrize("count", [8, 9, 10])
def test_accumulated_gradients_are_not_cut_off(job: Path, count: int) -> None:
    """A checkpoint holds no gradients: one from the middle of an accumulation would lose those of its first batches."""
    at = ("training_step", count, REQUEUE), ("training_step", 12, TERMINATE)
    _, second, right = requeue(job, *at, accumulate=4)
    assert_resumed(second, right, first=10)


@pytest.mark.parametrize(
    ("place", "count"),
    # One batch is in the sanity check, and three are in the validation after each epoch.
    [
        ("validation_step", 5),
        ("validation_step", 6),
        ("validation_step", 7),
        ("validation_epoch_end", 2),
        ("epoch_end", 1),
    ],
)
def test_validation_is_whole_or_left_out(job: Path, place: str, count: int) -> None:
    """Lightning alone measures a part of the images after the resume (map@r 1.0 for 0.28), which is then the best."""
    _, second, right = requeue(job, (place, count, REQUEUE), (place, count + 1, TERMINATE), validation=3)
    assert_resumed(second, right)
    assert "val2" in log(second)


def test_the_signal_in_the_last_step_is_not_lost(job: Path) -> None:
    """A job that ends as its time does must be requeued all the same: testing may follow the fit."""
    right = whole(Run("", "whole"))
    fit(replace(right, folder=str(job), name="first", at=(("epoch_end", 3, REQUEUE),)))
    assert requeue_calls(job) == ["requeue 1234"]
    second = replace(right, folder=str(job), name="second")
    fit(second)
    assert batches(second) == []
    for part in ("weights", "ended"):
        assert_equal(outcome(second)[part], outcome(right)[part])


@pytest.mark.parametrize("again", [("optimizer_step", 8, REQUEUE), ("training_step", 9, REQUEUE)])
def test_a_signal_that_comes_twice_is_one(job: Path, again: tuple[str, int, int]) -> None:
    """SLURM may send it to the step and to the batch script, and to tasks at different times; one requeue will do."""
    first, second, right = requeue(job, ("training_step", 8, REQUEUE), again, ("training_step", 10, TERMINATE))
    assert batches(first)[-1] == 9
    assert_resumed(second, right, first=8)


def test_what_saves_comes_before_what_stops(job: Path) -> None:
    """Both in one step, in the wrong order: the checkpoint is written all the same."""
    at = ("training_step", 8, TERMINATE), ("optimizer_step", 8, REQUEUE)
    first, second, right = requeue(job, *at)
    assert batches(first)[-1] == 7
    assert_resumed(second, right, first=8)


def test_a_signal_in_the_sanity_check_waits_for_a_step(job: Path) -> None:
    """There is nothing to save yet, and loops of the sanity check are not those to resume with."""
    at = ("validation_step", 1, REQUEUE), ("training_step", 3, TERMINATE)
    _, second, right = requeue(job, *at, validation=3)
    assert_resumed(second, right, first=1)


class Handlers(Callback):
    """Notes the handler of SIGTERM in a step, and breaks off where it is told to."""

    def __init__(self, during: Callable[[], None] = lambda: None) -> None:
        self.during = during
        self.handler: Any = None

    def on_before_zero_grad(self, *_: Any) -> None:
        """Runs in a step."""
        self.handler = signal.getsignal(signal.SIGTERM)
        self.during()


def trainer(*callbacks: Callback, **settings: Any) -> Trainer:
    """Trains two steps."""
    options = {**QUIET, "max_steps": 2, "limit_val_batches": 0, **settings}
    return Trainer(callbacks=list(callbacks), **options)


def is_deferred(handler: Any) -> bool:
    """True for the handler of the callback."""
    return isinstance(getattr(handler, "__self__", None), StepEndSignals)


def test_handlers_are_given_back() -> None:
    """Who trains in a notebook or a service gets back the handlers that were there, also after an error."""
    mine: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: mine.append(signum))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        watch = Handlers()
        trainer(watch, StepEndSignals()).fit(tiny_module(), TinyData())
        assert is_deferred(watch.handler)
        assert signal.getsignal(signal.SIGTERM) is handler

        def fail() -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            trainer(Handlers(fail), StepEndSignals()).fit(tiny_module(), TinyData())
        assert signal.getsignal(signal.SIGTERM) is handler

        # The user's own handler, which Lightning's calls, runs too, once.
        with pytest.raises(SIGTERMException):
            stop = Handlers(lambda: signal.raise_signal(signal.SIGTERM))
            trainer(stop, StepEndSignals(), max_steps=3).fit(tiny_module(), TinyData())
        assert mine == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_failing_step_says_what_it_did_not_handle() -> None:
    """Half a step must not be saved over a good checkpoint, and the log must tell why nothing was."""

    def fail() -> None:
        signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError

    with pytest.warns(UserWarning, match="SIGTERM came in a training step that ended in ZeroDivisionError"):
        with pytest.raises(ZeroDivisionError):
            trainer(Handlers(fail), StepEndSignals()).fit(tiny_module(), TinyData())


def test_foreign_handlers_are_left_alone() -> None:
    """A signal that Lightning does not handle is somebody else's, and may mean anything."""

    def mine(signum: int, frame: object) -> None:
        pass

    before = signal.getsignal(signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, mine)
    try:
        watch = Handlers()
        trainer(watch, StepEndSignals()).fit(tiny_module(), TinyData())
        assert is_deferred(watch.handler)
        assert signal.getsignal(signal.SIGUSR2) is mine
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_outside_of_the_main_thread_nothing_changes() -> None:
    """Python takes handlers from the main thread only; a fit in another one must not fail over them."""
    watch = Handlers()
    fitting = trainer(watch, StepEndSignals())
    thread = threading.Thread(target=fitting.fit, args=(tiny_module(), TinyData()))
    thread.start()
    thread.join()
    assert fitting.global_step == 2
    assert not is_deferred(watch.handler)


def test_it_comes_last_and_once(tmp_path: Path) -> None:
    """In front of ModelCheckpoint, the requeued run would not know the file of its last step, and never delete it."""
    mine = StepEndSignals()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    fitting = trainer(mine, saver, enable_checkpointing=True)
    StepEndSignals.add_to(fitting)
    fitting.fit(tiny_module(), TinyData())
    callbacks: list[Callback] = fitting.callbacks  # type: ignore[attr-defined]
    assert [callback for callback in callbacks if isinstance(callback, StepEndSignals)] == [mine]
    assert callbacks[-1] is mine

    without = trainer(saver, enable_checkpointing=True)
    StepEndSignals.add_to(without)
    assert isinstance(without.callbacks[-1], StepEndSignals)  # type: ignore[attr-defined]


def test_the_memory_brings_it() -> None:
    """Nobody thinks of it before the first torn checkpoint."""
    watch = Handlers()
    trainer(watch, MemoryBankCallback(size=20)).fit(tiny_module(), TinyData())
    assert is_deferred(watch.handler)
