"""A fit of the tiny module that a test kills, stops or requeues, in this process or in some of its own.

Called as `fit_interrupted.py RUN`, a `Run` as JSON. Each rank writes a line for each batch to `NAME-RANK.jsonl`, and
what it ended with to `NAME-RANK.pt`. Checkpoints of all runs in a folder go to its `checkpoints`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_dml import MemoryBank, MetricLearningModule
from lightning_dml.callbacks import MemoryBankCallback
from lightning_dml.callbacks.step_end_signals import StepEndSignals
from lightning_dml.losses import ContrastiveLoss
from lightning_dml.memory import MomentumEncoder
from tests.tiny import QUIET, TinyData, TinyEmbedder

EPOCHS, BATCHES, CLASSES = 3, 6, 8  # CLASSES of the global batch


@dataclass(frozen=True)
class Run:
    """A fit and the signals that come into it.

    `at` holds (place, count, signal): the process sends itself the signal when it is in that place for the count-th
    time. `pause` is in seconds, in each training step.
    """

    folder: str
    name: str
    momentum: float | None = 0.9
    accumulate: int = 1
    ranks: int = 1
    resume: str | None = None
    at: tuple[tuple[str, int, int], ...] = ()
    pause: float = 0.0
    deferred: bool = True
    double: bool = False
    validation: int = 0
    sharded: bool = False


class Interruptions:
    """Sends this process a signal at the places that a run names."""

    def __init__(self, at: tuple[tuple[str, int, int], ...]) -> None:
        self.at = {(place, count): signum for place, count, signum in at}
        self.counts: Counter[str] = Counter()

    def visit(self, place: str) -> None:
        """Counts the visit; the handler has run when this returns, as Python runs it before its next statement."""
        self.counts[place] += 1
        if (signum := self.at.get((place, self.counts[place]))) is not None:
            os.kill(os.getpid(), signum)

    @contextmanager
    def inside_the_memory(self) -> Iterator[None]:
        """Visits when the keys are made but not enqueued, and when the encoder has yet to follow the optimizer."""
        enqueue, update = MemoryBank.enqueue, MomentumEncoder.update

        def enqueue_late(*args: Any, **options: Any) -> None:
            self.visit("enqueue")
            enqueue(*args, **options)

        def update_late(*args: Any, **options: Any) -> None:
            self.visit("encoder")
            update(*args, **options)

        with (
            mock.patch.object(MemoryBank, "enqueue", enqueue_late),
            mock.patch.object(MomentumEncoder, "update", update_late),
        ):
            yield


class Module(MetricLearningModule):
    """The tiny module, with interruptions in its hooks."""

    # Not arguments, which would be hyperparameters in the checkpoint.
    interruptions: Interruptions
    pause: float

    def __init__(self) -> None:
        rule = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        super().__init__(TinyEmbedder(), ContrastiveLoss(0.3), optimizer=rule)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The loader has counted the batch, Lightning has not."""
        if self.trainer.training:
            self.interruptions.visit("transfer")
        return batch

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Takes long enough for a signal from outside to come in it."""
        outputs = super().training_step(batch, batch_idx)
        self.interruptions.visit("training_step")
        time.sleep(self.pause)
        return outputs

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """The optimizer has stepped, the momentum encoder has not followed."""
        super().optimizer_step(*args, **options)
        self.interruptions.visit("optimizer_step")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """A part of the validation images is in the metric."""
        super().validation_step(batch, batch_idx, dataloader_idx)
        self.interruptions.visit("validation_step")
        time.sleep(self.pause)

    def on_validation_epoch_end(self) -> None:
        """Every batch is validated, the metrics are not logged."""
        self.interruptions.visit("validation_epoch_end")
        super().on_validation_epoch_end()

    def on_train_epoch_end(self) -> None:
        """Between the last step of an epoch and the first of the next."""
        self.interruptions.visit("epoch_end")


class Log(Callback):
    """A line for each batch and each validation, on the disk when the process is killed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The loss, to the last bit."""
        self._write(str(trainer.current_epoch * BATCHES + batch_idx), float(outputs["loss"].detach()))

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The metric that chooses the best checkpoint."""
        if not trainer.sanity_checking:
            self._write(f"val{trainer.current_epoch}", float(trainer.callback_metrics["val/map@r"]))

    def _write(self, place: str, value: float) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([place, value.hex()]) + "\n")


def fit(run: Run) -> None:
    """Fits and writes how it ended, if it gets that far."""
    torch.set_num_threads(1)
    folder = Path(run.folder)
    interruptions = Interruptions(run.at)
    module = Module()
    module.interruptions, module.pause = interruptions, run.pause
    memory = MemoryBankCallback(size=50, start_step=1, momentum=run.momentum, sharded=run.sharded)
    rank = int(os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0")))
    saver = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=1, save_last=True)
    trainer = Trainer(
        max_epochs=EPOCHS,
        accumulate_grad_batches=run.accumulate,
        limit_val_batches=run.validation,
        num_sanity_val_steps=1,
        precision="64-true" if run.double else "32-true",
        devices=run.ranks,
        strategy="ddp" if run.ranks > 1 else "auto",
        default_root_dir=folder,
        callbacks=[
            *([StepEndSignals()] if run.deferred else []),
            memory,
            Log(folder / f"{run.name}-{rank}.jsonl"),
            saver,
        ],
        **{**QUIET, "enable_checkpointing": True},
    )
    data = TinyData(classes_per_batch=CLASSES // run.ranks, augment=True, batches_per_epoch=BATCHES)
    with interruptions.inside_the_memory(), _without_step_end_signals(run.deferred):
        trainer.fit(module, data, ckpt_path=run.resume, weights_only=True)
    encoder, optimizer = memory.momentum_encoder, trainer.optimizers[0].state_dict()
    state = {
        "weights": module.state_dict(),
        "bank": {} if memory.bank is None else memory.bank.state_dict(),
        "encoder": {} if encoder is None else encoder.state_dict(),
        "optimizer": {str(key): state["momentum_buffer"] for key, state in optimizer["state"].items()},
        "ended": {"step": trainer.global_step, "epoch": trainer.current_epoch},
    }
    torch.save(state, folder / f"{run.name}-{rank}.pt")


@contextmanager
def _without_step_end_signals(deferred: bool) -> Iterator[None]:
    # The bank's callback adds them; this is how Lightning alone would do.
    if deferred:
        yield
    else:
        with mock.patch.object(StepEndSignals, "add_to"):
            yield


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    try:
        fit(Run(**{**settings, "at": tuple(tuple(place) for place in settings["at"])}))
    finally:
        if dist.is_initialized():  # an interpreter that ends with the group still up may abort in one of its threads
            dist.destroy_process_group()
