"""What the memory bank reads of a training's batches and of its data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytorch_lightning import Trainer
from torch import Tensor

from lightning_dml.errors import InputError

BATCH = {"image", "label", "index"}


def identity_of(batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Labels (N,), sample indices (N,) and, where there is one, the mask (N,) of the rows that enter the bank.

    Raises:
        InputError: for a batch that is no dict with `image`, `label` and `index`.
    """
    if not (isinstance(batch, Mapping) and set(batch) >= BATCH):
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise InputError(
            "keys that enter the memory bank before the loss are made from a batch that is a dict with 'image', "
            f"'label' and 'index', got {found}; return such a dict from the dataset, or set momentum=None and "
            "enqueue='after'"
        )
    return batch["label"], batch["index"], mask_of(batch)


def mask_of(batch: Any) -> Tensor | None:
    """The mask (N,) of the rows that enter the bank; None for all."""
    mask: Tensor | None = batch.get("enqueue") if isinstance(batch, Mapping) else None
    return mask


def training_samples(trainer: Trainer, setting: object) -> int:
    """Length of the training set, which `setting` (a ratio, or the name of an option) needs to know.

    Raises:
        InputError: if the training dataloader does not tell.
    """
    loader: Any = trainer.train_dataloader
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError) as error:
        what = f"memory size {setting} is a ratio of" if isinstance(setting, float) else f"{setting} draws from"
        raise InputError(
            f"{what} the training set, whose length the training dataloader does not tell; give the number of entries, "
            "and initial_fill=False"
        ) from error
