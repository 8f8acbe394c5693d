"""`StepEndSignals`: signals that stop or requeue a job act between training steps, on every rank at the same one."""

from __future__ import annotations

import inspect
import math
import signal
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.exceptions import SIGTERMException

from lightning_dml import distributed
from lightning_dml.lightning_repairs import add_callback, is_handler_of_lightning, move_callback

_SAME_SIGNAL = 30.0  # seconds in which SLURM's signal to other tasks, steps later, is the one that was handled


class StepEndSignals(Callback):
    """Lets Lightning's handlers of SIGTERM and of SLURM's requeue signal run at the end of a training step.

    Lightning saves the requeue checkpoint inside the signal handler, in the middle of whatever the step was doing: a
    batch that counts as handed out but was not trained, a bank half written, a momentum encoder that has yet to follow
    the optimizer. On several ranks the handler ends in a barrier while another rank may wait in another collective.

    This callback notes a signal and calls the handler later, where a checkpoint is whole:

    * at the end of the first training batch after which the optimizer has stepped, behind all other callbacks, so
      that neither accumulated gradients nor what the others did in that step are lost;
    * in validation, at the end of the validation batch in one process, of the validation on several ranks, which may
      have different numbers of batches;
    * at the end of training. What arrives in the sanity check waits for the first step.

    Where there are several ranks, they agree by an all-reduce of one number for each signal, so one rank that got the
    signal is enough. Lightning has a collective in each step of its own for SIGTERM; this adds one of that size. A
    signal that comes again while it waits, or to another rank up to 30 seconds later, is handled once.

    `MemoryBankCallback` adds one to its trainer. Handlers that are not Lightning's are left alone, and so are all of
    them on Windows, outside of the main thread, and on several processes without `torch.distributed`.

    Examples:
        >>> trainer = Trainer(callbacks=[StepEndSignals()], logger=False, enable_checkpointing=False)
        >>> StepEndSignals.add_to(trainer)  # there is one already
        >>> sum(isinstance(callback, StepEndSignals) for callback in trainer.callbacks)
        1
    """

    def __init__(self) -> None:
        super().__init__()
        self._deferred: dict[int, Any] = {}  # Lightning's type for a handler is not that of signal.signal
        self._pending: set[int] = set()
        self._deaf_until: dict[int, float] = {}
        self._last_step = 0

    @classmethod
    def add_to(cls, trainer: Trainer) -> None:
        """Adds this callback to a trainer without one; for the `setup` of another callback."""
        add_callback(trainer, cls)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves behind all other callbacks: what ModelCheckpoint saves in a step is then in our checkpoint."""
        move_callback(trainer, self, first=False)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the handlers, the first hook after Lightning registers them."""
        self._defer(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the handlers where there was no sanity check."""
        self._defer(trainer)
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Handles pending signals, unless gradients are being accumulated, which no checkpoint holds."""
        stepped = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        if stepped or trainer.is_last_batch:
            self._handle(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Handles pending signals in one process.

        Not at once: Lightning takes a checkpoint from the middle of a validation step for a validation to finish, and
        then measures a part of the images only (observed with 2.6).
        """
        if not trainer.sanity_checking and not distributed.is_distributed():
            self._handle(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handles pending signals; the ranks may have come here by different numbers of batches."""
        if not trainer.sanity_checking:
            self._handle(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handles signals that came after the last step, and gives the handlers back."""
        while self._handle(trainer):
            pass
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the handlers back.

        Pending signals are handled in one process that SIGTERM has stopped between two steps. After any other exception
        the state may be half of a step's, and other ranks may be elsewhere.
        """
        if isinstance(exception, SIGTERMException) and not distributed.is_distributed():
            self._handle(trainer)
        names = ", ".join(signal.Signals(signum).name for signum in sorted(self._pending))
        self._restore()
        if names:
            rank_zero_warn(f"{names} came in a training step that ended in {type(exception).__name__}: not handled")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the handlers back where that has not happened yet."""
        self._restore()

    def _defer(self, trainer: Trainer) -> None:
        several = trainer.world_size > 1 and not distributed.is_distributed()
        in_main_thread = threading.current_thread() is threading.main_thread()
        if self._deferred or several or not in_main_thread or sys.platform == "win32":
            return
        self._pending, self._deaf_until = set(), {}
        # SIGTERM comes last: what saves must not come after what ends the training.
        for signum in sorted(signal.valid_signals(), key=lambda number: (number == signal.SIGTERM, number)):
            handler = signal.getsignal(signum)
            if is_handler_of_lightning(handler):
                self._deferred[signum] = handler
                signal.signal(signum, self._note)

    def _note(self, signum: int, frame: object) -> None:
        if time.monotonic() >= self._deaf_until.get(signum, 0.0):
            self._pending.add(signum)

    def _handle(self, trainer: Trainer) -> bool:
        """Calls the handlers of the signals that are pending on any rank; returns True if there are any."""
        if not self._deferred:
            return False
        signums = list(self._deferred)
        flags = [signum in self._pending for signum in signums]
        if distributed.is_distributed():
            everywhere = torch.tensor(flags, dtype=torch.int64, device=trainer.strategy.root_device)
            dist.all_reduce(everywhere, dist.ReduceOp.MAX)
            flags = [bool(flag) for flag in everywhere.tolist()]
        for signum, pending in zip(signums, flags, strict=True):
            if pending:
                # SIGTERM comes once: Lightning's handler passes it on to the ranks that it launched, which know by now.
                again = math.inf if signum == signal.SIGTERM else time.monotonic() + _SAME_SIGNAL
                self._deaf_until[signum] = again
                self._pending.discard(signum)
                self._deferred[signum](signum, inspect.currentframe())
        return any(flags)

    def _restore(self) -> None:
        for signum, handler in self._deferred.items():
            if signal.getsignal(signum) == self._note:  # Lightning, or the user, may have been here before
                signal.signal(signum, handler)
        self._deferred, self._pending = {}, set()
