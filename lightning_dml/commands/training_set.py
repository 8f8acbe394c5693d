"""The training set of a data module as `predict` sees it, and the columns that were predicted for it."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from lightning_dml import distributed
from lightning_dml.datamodules.samplers.evaluation import UnpaddedDistributedSampler
from lightning_dml.errors import InputError


class TrainingSet(LightningDataModule):
    """Shows the training set of another data module to `predict`, each sample once over all ranks."""

    def __init__(self, inner: LightningDataModule) -> None:
        super().__init__()
        self.inner = inner
        # Lightning would raise on a rank without a batch, and only there; `bank` has an error for all ranks.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def prepare_data(self) -> None:
        """Prepares the data module as for a training."""
        self.inner.trainer = self.trainer
        self.inner.prepare_data()

    def setup(self, stage: str) -> None:
        """Sets the data module up as for a training."""
        self.inner.trainer = self.trainer
        self.inner.setup("fit")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Does to a batch before it is moved as the data module does."""
        return self.inner.on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves a batch as the data module does."""
        return self.inner.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Does to a batch on its device as the data module does, augmentation for one."""
        return self.inner.on_after_batch_transfer(batch, dataloader_idx)

    def training_loader(self) -> Any:
        """The data module's training DataLoader.

        Raises:
            InputError: if there is no single loader, or its set has no known length.
        """
        loader: Any = self.inner.train_dataloader()
        if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
            raise InputError(
                f"train_dataloader must return one DataLoader over a set of known length, got {type(loader).__name__}"
            )
        return loader

    def predict_dataloader(self) -> DataLoader[Any]:
        """The training images in their order."""
        loader = self.training_loader()
        sizes = getattr(self.inner, "eval_batch_size", None), loader.batch_size
        return DataLoader(
            loader.dataset,
            batch_size=next((size for size in sizes if size), 64),
            sampler=UnpaddedDistributedSampler(len(loader.dataset)),
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
        )


def columns_of(outputs: Any, module_name: str, device: torch.device, purpose: str) -> list[torch.Tensor]:
    """Embeddings, labels and indices that all ranks predicted, on the CPU, less the rows that are to stay out.

    Args:
        outputs: of `Trainer.predict`.
        module_name: the module's class, for errors.
        device: where collectives work.
        purpose: what is made of them, as an error says it.

    Raises:
        InputError: if a rank has none, or `predict_step` returns something else.
    """
    names = ("embeddings", "labels", "indices")
    fits = bool(outputs) and all(isinstance(batch, dict) and set(names) <= set(batch) for batch in outputs)
    # Together, as a rank that raises alone would leave the others waiting.
    states = distributed.gather_numbers([bool(outputs), fits], device)
    if not all(any_batch for any_batch, _ in states):
        raise InputError(f"there are fewer training batches than the {len(states)} ranks: use fewer ranks")
    if not all(dicts for _, dicts in states):
        raise InputError(f"{module_name}.predict_step must return a dict with {', '.join(names)}, to make {purpose} of")
    columns = [torch.cat([batch[name] for batch in outputs]).to(device) for name in names]
    if all("enqueue" in batch for batch in outputs):
        wanted = torch.cat([batch["enqueue"] for batch in outputs]).to(device)
        columns = [column[wanted] for column in columns]
    return [distributed.gather_rows(column).cpu() for column in columns]
