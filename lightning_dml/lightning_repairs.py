"""All that touches what Lightning and torch keep to themselves: why, and in which version it was observed.

Each repair has a test in tests/test_lightning_repairs.py that fails when Lightning does without it. One stands
elsewhere, `uncompiled` in memory/momentum.py, since the memory must do without Lightning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.core.mixins import hparams_mixin
from pytorch_lightning.trainer.connectors import signal_connector
from torch import nn
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
        for saver in trainer.checkpoint_callbacks:
            if getattr(saver, "_every_n_train_steps", 0) and getattr(saver, "_last_global_step_saved", None) == 0:
                saver._last_global_step_saved = trainer.global_step  # type: ignore[attr-defined]


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
    """The parts of Lightning's evaluation loop that are used here."""

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
        somewhere = [max(flags) for flags in zip(*ranks, strict=True)]
        loop._max_batches = [max(pair) for pair in zip(loop._max_batches, somewhere, strict=True)]
        _share_buffers(loop.trainer.strategy.model)


def _share_buffers(model: Any) -> None:
    """Gives every rank the buffers of rank 0, as DDP does at the next forward pass, which not every rank may run."""
    ddp: Any = model if isinstance(model, DistributedDataParallel) else None
    if ddp is not None and ddp.will_sync_module_buffers():
        for buffer in ddp.modules_buffers:
            dist.broadcast(buffer, 0, group=ddp.process_group)
        ddp.require_forward_param_sync = False


def made_from_a_config() -> bool:
    """True inside the `__init__` of a module that the command line makes from a config.

    There the arguments that `save_hyperparameters` sees are class paths, with which `load_from_checkpoint` makes the
    objects anew. In Python they are the objects themselves, which no checkpoint should pickle. Lightning (2.6,
    observed) drops what it is told to ignore in both cases, and says nowhere in public which of them it is.
    """
    return hparams_mixin._given_hyperparameters.get() is not None


def is_handler_of_lightning(handler: object) -> bool:
    """True for a signal handler that Lightning has set for a fit.

    Lightning (2.6, observed) calls its handlers in the middle of whatever the step was doing, and names them nowhere in
    public. A user's own handler must not be taken for one of them.
    """
    return isinstance(handler, signal_connector._HandlersCompose)


def batch_on_device(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """A batch in the trainer's precision, through the batch transfer hooks, on the module's device.

    Lightning (2.6, observed) does these steps in its loops only: `strategy.batch_to_device` alone leaves out the hook
    `on_before_batch_transfer`, and calling the hook by its public name misses one that the data module has.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def replaces_samplers(trainer: Trainer) -> bool:
    """True if Lightning would wrap the samplers of the loaders in distributed ones.

    `Trainer(use_distributed_sampler=...)` can be set in public, but not be read (Lightning 2.6, observed).
    """
    connector = getattr(trainer, "_accelerator_connector", None)
    return bool(getattr(connector, "use_distributed_sampler", False))


def add_callback(trainer: Trainer, kind: type[Callback]) -> None:
    """Gives the trainer a callback of this class unless it has one.

    `Trainer.callbacks` is public, but Lightning (2.6, observed) does not declare it; mypy tells when it does.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, kind) for callback in callbacks):
        callbacks.append(kind())


def move_callback(trainer: Trainer, callback: Callback, *, first: bool) -> None:
    """Moves a callback before or behind all others, ModelCheckpoint too, while Lightning calls their hooks.

    Lightning (2.6, observed) calls callbacks in the order of the list, with ModelCheckpoint last, and has no other way
    to set an order. It goes through the list itself: where one moves back in place, the next one is left out. So the
    list is replaced.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    others = [other for other in callbacks if other is not callback]
    trainer.callbacks = [callback, *others] if first else [*others, callback]  # type: ignore[attr-defined]


@contextmanager
def without_forward_hooks(module: nn.Module) -> Iterator[None]:
    """A block in which calls of the module run none of its forward hooks; pre-hooks and those of its parts run.

    torch (2.14, observed) has no public way. `module.forward(...)` would leave out the pre-hooks as well, of which
    weight normalisation and the like are made.
    """
    hooks, module._forward_hooks = module._forward_hooks, type(module._forward_hooks)()
    try:
        yield
    finally:
        module._forward_hooks = hooks
