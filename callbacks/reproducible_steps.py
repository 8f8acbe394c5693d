"""`ReproducibleSteps`: dropout and drop path that a resumed run draws as the uninterrupted one does."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_dml.checks import check_count
from lightning_dml.lightning_repairs import move_callback
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
        seed: of the draws, at least 0; another seed gives other draws.

    Raises:
        InputError: for a seed that is no integer of at least 0.

    Examples:
        >>> trainer = Trainer(callbacks=[ReproducibleSteps(seed=3)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        check_count("seed", seed, least=0)
        self.seed = seed

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves before all other callbacks: a momentum encoder draws as well."""
        move_callback(trainer, self, first=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seeds for the batch that begins."""
        torch.manual_seed(mixed_seed(self.seed, trainer.fit_loop.total_batch_idx, trainer.global_rank))
