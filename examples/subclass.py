"""A LightningModule of your own with this library's memory bank: `python examples/subclass.py`."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_dml import Embedder, MemoryBank, RetrievalMetrics
from lightning_dml.callbacks import MemoryBankCallback
from lightning_dml.datamodules import GlyphsDataModule
from lightning_dml.losses import MultiSimilarityLoss


class MyModule(pl.LightningModule):
    """Has an encoder under a name, returns the dict, reads `self.memory_bank`: all that the callback asks."""

    memory_bank: MemoryBank | None = None

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Embedder("test_efficientnet", dim=64, in_chans=1)
        self.loss = MultiSimilarityLoss()
        self.metrics = RetrievalMetrics(ks=(1, 10))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Returns the dict of the contract; the bank is None until it holds something."""
        embeddings, labels, indices = self.encoder(batch["image"]), batch["label"], batch["index"]
        loss = self.loss(embeddings, labels, indices=indices)
        if (bank := self.memory_bank) is not None:
            loss = loss + bank.weight * self.loss(
                embeddings, labels, bank.embeddings, bank.labels, indices=indices, ref_indices=bank.indices
            )
        return {"loss": loss, "embeddings": embeddings.detach(), "labels": labels, "indices": indices}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Collects embeddings; metrics are computed at the end."""
        self.metrics.update(self.encoder(batch["image"]), batch["label"], batch["index"])

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics; they are equal on all ranks, so no sync_dist."""
        self.log_dict({f"val/{name}": value for name, value in self.metrics.compute().items()}, prog_bar=True)
        self.metrics.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Makes the optimizer; any will do."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(**trainer_settings: Any) -> pl.Trainer:
    """Trains for two epochs; the keyword arguments go to the Trainer."""
    memory = MemoryBankCallback(size=2048, start_step=50, encoder="encoder")
    trainer = pl.Trainer(max_epochs=2, callbacks=[memory], use_distributed_sampler=False, **trainer_settings)
    trainer.fit(MyModule(), GlyphsDataModule())
    return trainer


if __name__ == "__main__":
    main(accelerator="cpu")
