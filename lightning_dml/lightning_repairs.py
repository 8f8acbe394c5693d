"""All that touches Lightning's private attributes: what each repair mends, and in which version it was observed."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.nn.parallel import DistributedDataParallel

from lightning_dml import distributed


class CountResumedEpoch(Callback):
    """Makes Lightning count the epoch that follows a resume from the last batch of an epoch.

    Lightning (2.6, observed) takes that epoch for the rest of the one before: it skips `on_train_epoch_start` and does
    not count the epoch as begun, so checkpoints from the middle of it and of later ones look like ends of epochs, and
    a second resume repeats their epoch from the first batch. `RetrievalDataModule` adds this callback to its trainer.

    It also tells each ModelCheckpoint the step that was resumed from. Lightning (2.6, observed) forgets it, and with
    gradient accumulation `every_n_train_steps` then saves a second time for that step, in the middle of the
    accumulation for the next one, whose gradients no checkpoint holds.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the restart where the epoch that it would complete is complete."""
        loop = trainer.fit_loop
        epoch = loop.epoch_progress.current
        processed = getattr(epoch, "processed", 0)  # Lightning declares a type that is too narrow to have it
        if getattr(loop, "restarted_mid_epoch", False) and processed >= epoch.ready:
            loop.reset_restart_stage()
        for each in trainer.checkpoint_callbacks:
            if getattr(each, "_every_n_train_steps", 0) and getattr(each, "_last_global_step_saved", None) == 0:
                each._last_global_step_saved = trainer.global_step  # type: ignore[attr-defined]


def evaluate_on_every_rank(trainer: Trainer, module: LightningModule) -> None:
    """Makes the ranks evaluate together where some have no batches; to be called from the module's `setup`.

    On a rank whose loaders are all empty Lightning (2.6, observed) raises, and where it is allowed to go on
    (`allow_zero_length_dataloader_with_multiple_devices`) it leaves the evaluation out there: hooks and callbacks of
    that rank are not called, and the others wait for it in theirs. With this, such a rank passes through the loop
    without a batch.
    """
    for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        loop.setup_data = partial(_set_up_data, loop, module)  # type: ignore[method-assign]


class _Loop(Protocol):
    """What is used of Lightning's evaluation loop."""

    trainer: Trainer
    _max_batches: list[int | float]

    def setup_data(self) -> None:
        """Makes the loaders and counts their batches."""


def _set_up_data(loop: _Loop, module: LightningModule) -> None:
    set_up = partial(type(loop).setup_data, loop)
    if loop.trainer.lightning_module is not module or not distributed.is_distributed():
        set_up()
        return
    # Not for good: a rank whose *training* loader is empty would no longer raise but let the others wait for it.
    before = module.allow_zero_length_dataloader_with_multiple_devices
    module.allow_zero_length_dataloader_with_multiple_devices = True
    try:
        set_up()
    finally:
        module.allow_zero_length_dataloader_with_multiple_devices = before
    if loop._max_batches:
        own = [int(batches > 0) for batches in loop._max_batches]
        ranks = distributed.gather_numbers(own, distributed.collective_device())
        # Lightning skips a loop without batches; with a limit of one it looks for the batch and finds none.
        somewhere = [max(rank) for rank in zip(*ranks, strict=True)]
        loop._max_batches = [max(pair) for pair in zip(loop._max_batches, somewhere, strict=True)]
        _share_buffers(loop.trainer.strategy.model)


def _share_buffers(model: Any) -> None:
    """Gives every rank the buffers of rank 0, as DDP does at the next forward pass, which not every rank may run."""
    ddp: Any = model if isinstance(model, DistributedDataParallel) else None
    if ddp is not None and ddp.will_sync_module_buffers():
        for buffer in ddp.modules_buffers:
            dist.broadcast(buffer, 0, group=ddp.process_group)
        ddp.require_forward_param_sync = False
