"""Trainings with the logger of pair weights, and its figures by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_dml import MemoryBank
from lightning_dml.callbacks import MemoryBankCallback, WeightCurveLogger
from lightning_dml.losses import (
    MultiSimilarityLoss,
    SupConLoss,
)
from tests.tiny import QUIET, TinyData, TinyEmbedder, tiny_module


class Witness(Callback):
    """Notes, after the logger, what each step was about and what was logged."""

    def __init__(self) -> None:
        self.outputs: dict[int, Any] = {}
        self.banks: dict[int, dict[str, Any]] = {}
        self.logged: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Copies, as the next step changes it."""
        step, bank = trainer.global_step, getattr(pl_module, "memory_bank", None)
        self.outputs[step] = outputs
        self.banks[step] = {} if bank is None else bank.state_dict()
        self.logged[step] = {
            name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("pairs/")
        }


def fit(
    logger: WeightCurveLogger,
    /,
    module: LightningModule | None = None,
    steps: int = 8,
    bank: dict[str, Any] | None = None,
    data: Any = None,
    **settings: Any,
) -> Witness:
    """A short training with the logger, and with a bank where its settings are given."""
    witness = Witness()
    memory = [] if bank is None else [MemoryBankCallback(**{"size": 20, "momentum": None, **bank})]
    trainer = Trainer(
        max_steps=steps,
        limit_val_batches=0,
        callbacks=[*memory, logger, witness],
        **{**QUIET, "log_every_n_steps": 1, **settings},
    )
    trainer.fit(module or tiny_module(), data or TinyData())
    return witness


def silent(every_n_steps: int = 2, **options: Any) -> WeightCurveLogger:
    """A logger that draws nothing, which takes longer than a test should."""
    return WeightCurveLogger(every_n_steps, **{"figures": False, **options})


def part_of(figures: dict[str, float], part: str) -> dict[str, float]:
    """The figures of one part by their own names."""
    start = f"pairs/{part}/"
    return {name.removeprefix(start): value for name, value in figures.items() if name.startswith(start)}


def warnings_of(call: Callable[[], object]) -> list[str]:
    """The warnings of the logger during a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if "WeightCurveLogger" in str(warning.message)]


class Foreign(LightningModule):
    """Somebody else's module: other names, no factors, and a bank of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyEmbedder()
        self.criterion = MultiSimilarityLoss()
        self.against = SupConLoss()
        self.queue: MemoryBank | None = None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        """Leaves out every third batch."""
        if batch_idx % 3 == 2:
            return None
        embeddings, labels, indices = self.net(batch["image"]), batch["label"], batch["index"]
        loss = self.criterion(embeddings, labels, indices=indices)
        return {"loss": loss, "embeddings": embeddings.detach(), "labels": labels, "indices": indices}

    def configure_optimizers(self) -> Any:
        """Plain steps."""
        return torch.optim.SGD(self.parameters(), lr=0.01)
