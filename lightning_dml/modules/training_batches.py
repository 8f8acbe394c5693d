"""Reading the batches, the step outputs and the training set of a training, with errors that say what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lightning_dml.errors import InputError
from lightning_dml.losses.calling import Rows

BATCH = {"image", "label", "index"}


def identity_of(batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Labels (N,), sample indices (N,) and, where there is one, the mask (N,) of the rows that enter the bank.

    Raises:
        InputError: for a batch that is no dict with `image`, `label` and `index`.
    """
    if not (isinstance(batch, Mapping) and set(batch) >= BATCH):
        content = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise InputError(
            "keys that enter the memory bank before the loss are made from a batch that is a dict with 'image', "
            f"'label' and 'index', got {content}; return such a dict from the dataset, or set momentum=None and "
            "enqueue='after'"
        )
    return batch["label"], batch["index"], mask_of(batch)


def outputs_of(outputs: Any, purpose: str, embeddings: str = "embeddings") -> tuple[Tensor, Tensor, Tensor]:
    """The outputs `embeddings` (N, D), `labels` (N,) and `indices` (N,) of a training step.

    Args:
        outputs: of `training_step`.
        purpose: who needs them for what, as the error says it.
        embeddings: the name of the embeddings.

    Raises:
        InputError: if one is missing.
    """
    names = (embeddings, "labels", "indices")
    if missing := set(names) - set(outputs if isinstance(outputs, Mapping) else ()):
        raise InputError(
            f"training_step must return a dict with 'loss', {embeddings!r}, 'labels' and 'indices' for {purpose}; "
            f"{', '.join(sorted(missing))} missing"
        )
    return outputs[embeddings], outputs["labels"], outputs["indices"]


def mask_of(batch: Any) -> Tensor | None:
    """The mask (N,) of the rows that enter the bank; None for all."""
    mask: Tensor | None = batch.get("enqueue") if isinstance(batch, Mapping) else None
    return mask


def warn_of_missed_steps(trainer: Trainer, name: str, every_n_steps: int) -> None:
    """Warns if a callback of this name logs at steps at which the trainer's loggers do not write."""
    logged = getattr(trainer, "log_every_n_steps", 0)
    if trainer.loggers and logged and every_n_steps % logged:
        rank_zero_warn(
            f"every_n_steps={every_n_steps} of {name} is no multiple of Trainer(log_every_n_steps={logged}), so the "
            "logger misses some of the figures"
        )


def training_samples(trainer: Trainer, setting: object) -> int:
    """Length of the training set, which `setting` (a ratio, or the name of an option) needs to know.

    Raises:
        InputError: if the training dataloader does not tell.
    """
    try:
        return _length_of_training_set(trainer)
    except (AttributeError, TypeError) as error:
        what = f"memory size {setting} is a ratio of" if isinstance(setting, float) else f"{setting} draws from"
        raise InputError(
            f"{what} the training set, whose length the training dataloader does not tell; give the number of entries, "
            "and initial_fill=False"
        ) from error


def bank_entries(trainer: Trainer, size: int | float, policy: str) -> int:
    """Entries of a memory bank in this training.

    Args:
        trainer: in a fit that has started.
        size: entries, or as a float the share of the training set.
        policy: `queue` or `samples`; with `samples` every training sample needs a slot.

    Raises:
        InputError: for a share of a training set of unknown length, or too few slots, as far as the number of samples
            is known.
    """
    if isinstance(size, float):
        return max(1, round(size * training_samples(trainer, size)))
    if policy == "samples":
        _check_slots(trainer, size)
    return size


def _check_slots(trainer: Trainer, slots: int) -> None:
    try:
        samples = _length_of_training_set(trainer)
    except (AttributeError, TypeError):
        return  # the first batch with an index that is outside tells
    if samples > slots:
        raise InputError(
            f"policy='samples' needs a slot for each of the {samples} training samples, got size {slots}; "
            "set size to 1.0"
        )


def _length_of_training_set(trainer: Trainer) -> int:
    loader: Any = trainer.train_dataloader
    return len(loader.dataset)


def batch_of(outputs: Any, automatic: bool) -> tuple[Rows | None, str]:
    """The rows that a training step returned, or why it cannot be used; neither for a batch that the step left out.

    Args:
        outputs: of `training_step`, as callbacks get them.
        automatic: whether Lightning takes the optimizer steps; a step output without loss is then that of a batch left
            out.
    """
    if automatic and (outputs.get("loss") if isinstance(outputs, Mapping) else outputs) is None:
        return None, ""
    try:
        embeddings, labels, indices = outputs_of(outputs, "WeightCurveLogger to see the pairs")
    except InputError as error:
        return None, str(error)
    tensors = all(isinstance(column, Tensor) for column in (embeddings, labels, indices))
    if not tensors or embeddings.ndim != 2 or not labels.shape == indices.shape == embeddings.shape[:1]:
        return None, "'embeddings', 'labels' and 'indices' of training_step must be tensors (N, D), (N,) and (N,)"
    return Rows(embeddings.detach(), labels, indices), ""
