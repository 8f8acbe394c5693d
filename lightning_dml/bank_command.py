"""The command `lightning-dml bank`: a memory bank made from the training set of a data module."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader

from lightning_dml import distributed
from lightning_dml.callbacks.bank_feed import DTYPES
from lightning_dml.datamodules.samplers import UnpaddedDistributedSampler
from lightning_dml.errors import InputError
from lightning_dml.memory import MemoryBank


class DMLTrainer(Trainer):
    """Lightning's Trainer with the subcommands of `lightning-dml`."""

    def bank(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        output: str = "bank.pt",
        policy: Literal["queue", "samples"] = "queue",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> MemoryBank:
        """Embeds the training set and writes it as a memory bank, which MemoryBankCallback(bank_file=...) starts from.

        Images are loaded as the training loads them, augmentation included, and embedded in evaluation mode.

        Args:
            model: a LightningModule whose predict_step returns a dict of embeddings, labels and indices; of rows with
                enqueue, if it is there, False, none are taken.
            datamodule: gives the training set.
            ckpt_path: checkpoint of the weights; None takes those that the config builds.
            output: the file to write; it replaces an older one when it is complete.
            policy: queue, in random order, or one slot for each of the samples.
            dtype: of the stored embeddings.

        Returns:
            The bank, with all samples on every rank.

        Raises:
            InputError: without training data, for an output that cannot be written, or for another predict_step.
        """
        path = Path(output)
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise InputError(f"output must be a file in a folder that exists, got {output!r}")
        if datamodule is None:
            raise InputError("bank embeds the training set of a data module: give one with --data")
        outputs: Any = self.predict(model, datamodule=TrainingSet(datamodule), ckpt_path=ckpt_path)
        embeddings, labels, indices = columns_of(outputs, type(model).__name__, self.strategy.root_device, "a bank")
        # By index, so that the order is that of one rank; then by chance, as a smaller bank takes the last rows.
        order = torch.argsort(indices, stable=True)
        order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]
        size = int(indices.max()) + 1 if policy == "samples" else len(indices)
        bank = MemoryBank(size, embeddings.shape[1], DTYPES[dtype], policy=policy)
        bank.enqueue(embeddings[order], labels[order], indices[order])
        _write(bank, path)
        return bank


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
        """What the data module does to a batch before it is moved."""
        return self.inner.on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """How the data module moves a batch."""
        return self.inner.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """What the data module does to a batch on its device, augmentation for one."""
        return self.inner.on_after_batch_transfer(batch, dataloader_idx)

    def training_loader(self) -> Any:
        """The data module's training DataLoader.

        Raises:
            InputError: if it is none over a set of known length.
        """
        loader: Any = self.inner.train_dataloader()
        if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
            raise InputError(
                f"needed is one training DataLoader over a set of known length, got {type(loader).__name__}"
            )
        return loader

    def predict_dataloader(self) -> DataLoader[Any]:
        """The training images in their order."""
        loader = self.training_loader()
        sizes = getattr(self.inner, "eval_batch_size", None), loader.batch_size
        return DataLoader(
            loader.dataset,
            batch_size=next((each for each in sizes if each), 64),
            sampler=UnpaddedDistributedSampler(len(loader.dataset)),
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
        )


def columns_of(outputs: Any, name: str, device: torch.device, purpose: str) -> list[torch.Tensor]:
    """Embeddings, labels and indices that all ranks predicted, on the CPU, less the rows that are to stay out.

    Args:
        outputs: of `Trainer.predict`.
        name: of the module's class, for errors.
        device: where collectives work.
        purpose: what they are for, as an error says it.

    Raises:
        InputError: if a rank has none, or `predict_step` returns something else.
    """
    names = ("embeddings", "labels", "indices")
    fits = bool(outputs) and all(isinstance(each, dict) and set(names) <= set(each) for each in outputs)
    # Together, as a rank that raises alone would leave the others waiting.
    states = distributed.gather_numbers([bool(outputs), fits], device)
    if not all(has for has, _ in states):
        raise InputError(f"there are fewer training batches than the {len(states)} ranks: use fewer ranks")
    if not all(right for _, right in states):
        raise InputError(f"{name}.predict_step must return a dict with {', '.join(names)} for {purpose} to be made of")
    columns = [torch.cat([each[column] for each in outputs]).to(device) for column in names]
    if all("enqueue" in each for each in outputs):
        wanted = torch.cat([each["enqueue"] for each in outputs]).to(device)
        columns = [column[wanted] for column in columns]
    return [distributed.gather_rows(column).cpu() for column in columns]


@rank_zero_only
def _write(bank: MemoryBank, path: Path) -> None:
    bank.save(path)
    held = ", ".join(f"{name} {value:g}" for name, value in bank.summary().items())
    print(f"{path}: {bank} ({held})")
