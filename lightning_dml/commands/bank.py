"""The command `lightning-dml bank`: a memory bank made from the training set of a data module."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only

from lightning_dml.commands.training_set import TrainingSet, columns_of
from lightning_dml.errors import InputError
from lightning_dml.memory import MemoryBank
from lightning_dml.memory.slots import DTYPES


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
        """Embeds the training set and writes it as a memory bank, from which MemoryBankCallback(bank_file=...) starts.

        Images are loaded as the training loads them, augmentation included, and embedded in evaluation mode.

        Args:
            model: a LightningModule whose predict_step returns a dict of embeddings, labels and indices; it may also
                return enqueue, which is False for rows that are to stay out.
            datamodule: its training set is embedded.
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


@rank_zero_only
def _write(bank: MemoryBank, path: Path) -> None:
    bank.save(path)
    summary = ", ".join(f"{name} {value:g}" for name, value in bank.summary().items())
    print(f"{path}: {bank} ({summary})")
