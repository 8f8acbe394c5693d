"""The entry of a batch into the slots of a bank, by either policy: which rows are refused, and where the others go."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dml.errors import InputError
from lightning_dml.labels import UNLABELLED
from lightning_dml.memory.slot_store import SlotStore
from lightning_dml.memory.slots import last_of_each, unit_rows


class Batch(NamedTuple):
    """Rows that are to enter a bank.

    Attributes:
        embeddings: (n, dim) float, of any dtype, on any device.
        labels: (n,) int64 on the bank's device; -1 for a row that is to take part in nothing.
        indices: (n,) int64 on the bank's device; -1 where unknown.
        step: the training step that made the rows; None if unknown.
        mask: (n,) bool, rows that are False do not enter; None, all do.
    """

    embeddings: Tensor
    labels: Tensor
    indices: Tensor
    step: int | None
    mask: Tensor | None


def write_oldest(store: SlotStore, batch: Batch) -> Tensor:
    """Writes the last `size` rows over the oldest ones of a queue.

    A row that is not finite takes its slot and leaves it empty, so that no shape depends on the values.

    Returns:
        How many rows were refused, 0-dim int64.
    """
    embeddings, labels, indices = batch.embeddings, batch.labels, batch.indices
    if batch.mask is not None:
        embeddings = embeddings[batch.mask.to(embeddings.device)]
        here = batch.mask.to(labels.device)
        labels, indices = labels[here], indices[here]
    skipped = max(0, len(labels) - store.size)
    rows = embeddings[skipped:].to(store.embeddings)
    finite = torch.isfinite(rows).all(dim=1)
    rows = torch.where(finite[:, None], rows, 0)
    labels = torch.where(finite, labels[skipped:], UNLABELLED)
    indices = torch.where(finite, indices[skipped:], UNLABELLED)
    store.write_ring((store.pointer + skipped) % store.size, rows, labels, indices, batch.step)
    return (~finite).sum()


def write_samples(store: SlotStore, batch: Batch, average: float) -> Tensor:
    """Writes each row to the slot of its index, the last one where a sample has several.

    Args:
        store: a slot for each training sample.
        batch: a row whose index is outside of [0, size) is refused.
        average: share of the old embedding in the new one of a sample that is there already.

    Returns:
        How many rows were refused, 0-dim int64.
    """
    rows = batch.embeddings.to(store.embeddings)
    wanted, inside = _wanted(batch), _inside(store, batch)
    usable = wanted & inside & torch.isfinite(rows).all(dim=1)
    slots = torch.where(usable, batch.indices, store.size)
    last = usable & last_of_each(slots)
    if average:
        stored = store.embeddings
        wide = torch.promote_types(stored.dtype, torch.float32)
        new, old = batch.embeddings.to(stored.device, wide), stored[store.own_slots(slots, last)[1]]
        mixed = unit_rows(average * old.to(wide) + (1 - average) * new, otherwise=new)
        rows = torch.where((store.labels[slots] != UNLABELLED)[:, None], mixed, new).to(stored.dtype)
    store.write_at(slots, last, rows, batch.labels, batch.step)
    return (wanted & ~usable).sum()


def check_indices(store: SlotStore, batch: Batch) -> None:
    """Raises InputError for an index without a slot; the host waits for an accelerator."""
    wrong = _wanted(batch) & ~_inside(store, batch)
    if bool(wrong.any()):
        raise InputError(
            f"indices must lie in [0, {store.size}), the memory size, with policy 'samples', got "
            f"{int(batch.indices[wrong][0])}; an index is the position in the training set, and the bank is to be as "
            "large as that"
        )


def _wanted(batch: Batch) -> Tensor:
    labelled = batch.labels != UNLABELLED
    return labelled if batch.mask is None else labelled & batch.mask.to(labelled.device)


def _inside(store: SlotStore, batch: Batch) -> Tensor:
    return (batch.indices >= 0) & (batch.indices < store.size)
