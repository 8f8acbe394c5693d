"""One embedded batch of a training, its memory bank and its loss, from the files that the training left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_dml.commands.training_set import TrainingSet, columns_of
from lightning_dml.errors import InputError
from lightning_dml.losses.calling import Rows
from lightning_dml.memory import MemoryBank


def bank_of(bank_file: str | None, ckpt_path: str | None) -> MemoryBank | None:
    """The memory bank in a file, else that in a checkpoint; None where there is none.

    Raises:
        InputError: for a file that is missing, damaged or empty, or a checkpoint with several banks.
    """
    if bank_file is not None:
        bank = MemoryBank.load(bank_file)
        if not len(bank):
            raise InputError(f"bank_file {bank_file!r} holds an empty memory bank: leave it out for pairs in the batch")
        return bank
    if ckpt_path is None:
        return None
    if not Path(ckpt_path).is_file():
        raise InputError(f"ckpt_path {ckpt_path!r} does not exist")
    try:
        callbacks = torch.load(ckpt_path, map_location="cpu", weights_only=True)["callbacks"]
    except Exception as error:
        raise InputError(f"ckpt_path {ckpt_path!r} is no checkpoint of a training, or is damaged") from error
    states = {str(key): state["bank"] for key, state in callbacks.items() if str(key).startswith("MemoryBankCallback")}
    states = {key: state for key, state in states.items() if state is not None}
    if not states:
        return None
    if len(states) > 1 and "MemoryBankCallback" not in states:
        raise InputError(
            f"ckpt_path {ckpt_path!r} has several memory banks, {', '.join(states)}: write one to a file with "
            "MemoryBank.from_state_dict(...).save(...), and give it as bank_file"
        )
    bank = MemoryBank.from_state_dict(states.get("MemoryBankCallback", next(iter(states.values()))))
    return bank if len(bank) else None


def loss_of(model: LightningModule, bank: MemoryBank | None) -> nn.Module:
    """The loss of a training, that against the bank where there is one.

    Raises:
        InputError: if the module has none.
    """
    memory_loss = getattr(model, "memory_loss", None) if bank is not None else None
    loss = getattr(model, "loss", None) if memory_loss is None else memory_loss
    if not isinstance(loss, nn.Module):
        raise InputError(f"{type(model).__name__} has no loss in an attribute of that name: name losses with --losses")
    return loss


def embedded_batch(
    model: LightningModule, data: LightningDataModule, ckpt_path: str | None, bank: MemoryBank | None, seed: int
) -> Rows:
    """The first batch of the training by its sampler, embedded in evaluation mode, with unit rows on the CPU.

    Args:
        model: the module, which is moved to the CPU afterwards.
        data: its data.
        ckpt_path: checkpoint with the weights; None takes those of the module.
        bank: what the batch is to be held against.
        seed: which batch, by the epoch of its sampler where that has any.

    Raises:
        InputError: for a bank of another dimension, and for a training without a batch.
    """
    trainer = Trainer(
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    outputs: Any = trainer.predict(model, datamodule=_OneBatch(data, seed), ckpt_path=ckpt_path)
    embeddings, labels, indices = columns_of(outputs, type(model).__name__, trainer.strategy.root_device, "curves")
    if bank is not None and bank.dim != embeddings.shape[1]:
        raise InputError(
            f"the memory bank has embeddings of {bank.dim} columns and the model gives {embeddings.shape[1]}: take a "
            "bank and a config of one training"
        )
    model.to("cpu")
    return Rows(nn.functional.normalize(embeddings.float(), dim=1), labels, indices)


class _OneBatch(TrainingSet):
    """Shows one batch of the training to `predict`, the first that its sampler gives."""

    def __init__(self, inner: LightningDataModule, seed: int) -> None:
        super().__init__(inner)
        self.seed = seed

    def predict_dataloader(self) -> DataLoader[Any]:
        """The images of one training batch."""
        loader = self.training_loader()
        torch.manual_seed(self.seed)  # of samplers that draw from torch's generator, and of augmentation
        batches: Any = loader.batch_sampler
        for sampler in (batches, loader.sampler):
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(self.seed)
        drawn = next(iter(batches), None)
        if not drawn:
            raise InputError("the training has no batch: make its set larger or its batch smaller")
        return DataLoader(Subset(loader.dataset, list(drawn)), batch_size=len(drawn), collate_fn=loader.collate_fn)
