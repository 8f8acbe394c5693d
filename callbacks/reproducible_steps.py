"""`ReproducibleSteps`: dropout and drop path that a resumed run draws as the uninterrupted one does."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_dml.errors import InputError
from lightning_dml.seeds import mixed_seed


class ReproducibleSteps(Callback):
    """Seeds torch's generators, those of the GPUs included, before each training batch.

    No checkpoint of Lightning holds the state of the generators, so a model with dropout or drop path that is resumed
    in mid-epoch draws other numbers than one that was never stopped. With this callback, what a training step draws
    follows from the seed, the number of the batch since the training began, and the rank, and a resumed run equals
    the uninterrupted one, bit for bit where the operations themselves are deterministic.

    Data that draw from torch's global generator in the process of the training (augmentation without workers) are not
    made reproducible by it; the data modules here draw from generators of their own.

    Args:
        seed: another one, other draws; not negative.

    Raises:
        InputError: for a negative seed.

    Examples:
        >>> trainer = Trainer(callbacks=[ReproducibleSteps(seed=3)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        if seed < 0:
            raise InputError(f"seed must not be negative, got {seed}")
        self.seed = seed

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves before all other callbacks: a momentum encoder draws as well.

        The list is replaced and not changed, as Lightning is going through it.
        """
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [self, *(each for each in callbacks if each is not self)]  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seeds for the batch that begins."""
        torch.manual_seed(mixed_seed(self.seed, trainer.fit_loop.total_batch_idx, trainer.global_rank))
