"""A foreign module that reads a memory bank, and its training."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from lightning_dml import MemoryBank
from lightning_dml.callbacks import MemoryBankCallback
from lightning_dml.losses import ContrastiveLoss
from tests.tiny import QUIET, TinyData, TinyEmbedder

Records = list[tuple[dict[str, Tensor], Tensor, dict[str, Any] | None, float]]


class Foreign(LightningModule):
    """Somebody else's module by the dict contract; notes batch, embeddings, bank and weight as its loss sees them."""

    memory_bank: MemoryBank | None

    def __init__(self, net: nn.Module | None = None, manual: bool = False) -> None:
        super().__init__()
        self.net = TinyEmbedder() if net is None else net
        self.loss = ContrastiveLoss(0.3)
        self.automatic_optimization = not manual
        self.records: Records = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Uses the bank as the README says."""
        embeddings, labels, indices = self.net(batch["image"]), batch["label"], batch["index"]
        bank = self.memory_bank
        state = None if bank is None else bank.state_dict()
        self.records.append((batch, embeddings.detach(), state, 1.0 if bank is None else bank.weight))
        loss = self.loss(embeddings, labels, indices=indices)
        if bank is not None:
            against = self.loss(
                embeddings, labels, bank.embeddings, bank.labels, indices=indices, ref_indices=bank.indices
            )
            loss = loss + bank.weight * against
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return {"loss": loss, "embeddings": embeddings.detach(), "labels": labels, "indices": indices}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A rate that moves the weights visibly, so that stale keys differ from fresh ones."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(callbacks: Any, module: Any = None, steps: int = 6, data: Any = None, **settings: Any) -> Any:
    """Trains a few steps."""
    module = Foreign() if module is None else module
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    trainer = Trainer(max_steps=steps, limit_val_batches=0, callbacks=listed, **QUIET, **settings)
    trainer.fit(module, TinyData() if data is None else data)
    return module


def assert_bank(state: dict[str, Any] | None, expected: MemoryBank) -> None:
    """Compares rows, labels, indices and steps."""
    assert state is not None
    right = expected.state_dict()
    for part in ("embeddings", "labels", "indices", "steps"):
        torch.testing.assert_close(state[part], right[part], rtol=0, atol=0)


class Masked(TinyData):
    """Keeps images with an odd index out of the bank."""

    def setup(self, stage: str | None = None) -> None:
        """Adds the mask to every sample."""
        super().setup(stage)
        inner: Any = self.train_set

        class WithMask(torch.utils.data.Dataset[Any]):
            labels = inner.labels

            def __len__(self) -> int:
                return len(inner)

            def __getitem__(self, position: int) -> dict[str, Any]:
                return {**inner[position], "enqueue": position % 2 == 0}

        self.train_set = WithMask()  # type: ignore[assignment]


def bank_of_callback(callback: MemoryBankCallback) -> MemoryBank:
    """The bank that a callback must hold after a training."""
    assert callback.bank is not None
    return callback.bank
