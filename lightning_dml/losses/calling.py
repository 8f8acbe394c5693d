"""Calls of a loss as training makes them: a loss of ours and another library's, in-batch and against references.

A loss of ours knows sample indices, unlabelled rows, ranks and precision. Another library's loss knows none of them: it
gets the gathered batch on every rank, and of the references only what it may take for pairs, in the precision of the
anchors. Its keywords are those of pytorch-metric-learning.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_dml import distributed
from lightning_dml.errors import InputError
from lightning_dml.labels import UNLABELLED
from lightning_dml.losses.base import PairWeightingLoss


class Rows(NamedTuple):
    """Samples as a loss gets them.

    Attributes:
        embeddings: (n, D) float.
        labels: (n,) integers.
        indices: (n,) integer sample indices.
    """

    embeddings: Tensor
    labels: Tensor
    indices: Tensor


def call_loss(loss: nn.Module, batch: Rows, references: Rows | None = None, *, sharded: bool = False) -> Tensor:
    """Loss of this rank's batch; every rank must call, and DDP's mean of the gradients is that of one process.

    Args:
        loss: one of ours, or any module called `loss(embeddings, labels[, ref_emb=..., ref_labels=...])`.
        batch: of this rank, with a gradient of the embeddings.
        references: rows of a memory bank, empty slots included; None for in-batch.
        sharded: whether the references are this rank's share of them.

    Returns:
        0-dim loss; 0 with a zero gradient where another library's loss has no reference to work against.

    Raises:
        InputError: for another library's loss against sharded references, or around a loss of ours that gathers the
            batches itself; and what the loss of ours raises.
    """
    if isinstance(loss, PairWeightingLoss):
        return _call_ours(loss, batch, references, sharded)
    return _call_other(loss, batch, references, sharded)


def call_plainly(
    loss: nn.Module, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
) -> Tensor:
    """Calls another library's loss by the keywords of pytorch-metric-learning, without looking at ranks."""
    references = {} if ref_emb is None else {"ref_emb": ref_emb, "ref_labels": ref_labels}
    value: Tensor = loss(embeddings, labels, **references)
    return value


def index_keywords(loss: nn.Module, indices: Tensor | None, ref_indices: Tensor | None) -> dict[str, Tensor | None]:
    """The sample indices as keywords for a loss of ours; nothing for another library's, which takes none."""
    return {"indices": indices, "ref_indices": ref_indices} if isinstance(loss, PairWeightingLoss) else {}


def references_for(loss: nn.Module, references: Rows, indices: Tensor) -> Rows:
    """The references that a loss gets: all of them, or for another library's loss those that it may take for pairs.

    Our losses know empty slots, and by its index a sample's own copies; to others they would be pairs.

    Args:
        loss: one of ours or another library's.
        references: (M, ...) rows.
        indices: sample indices of the batches of all ranks; negative where unknown.
    """
    if isinstance(loss, PairWeightingLoss):
        return references
    own = (references.indices >= 0) & torch.isin(references.indices, indices)
    mask = (references.labels != UNLABELLED) & ~own
    return Rows(*(column[mask] for column in references))


def _call_ours(loss: PairWeightingLoss, batch: Rows, references: Rows | None, sharded: bool) -> Tensor:
    if references is None:
        value: Tensor = loss(batch.embeddings, batch.labels, indices=batch.indices)
        return value
    value = loss(
        batch.embeddings,
        batch.labels,
        references.embeddings,
        references.labels,
        indices=batch.indices,
        ref_indices=references.indices,
        ref_sharded=sharded,
    )
    return value


def _call_other(loss: nn.Module, batch: Rows, references: Rows | None, sharded: bool) -> Tensor:
    if references is not None and sharded:
        raise InputError(
            f"{type(loss).__name__} knows nothing of ranks and cannot work against a sharded memory bank: set "
            "MemoryBankCallback(sharded=False), or take a loss of lightning_dml"
        )
    if distributed.is_distributed() and any(
        isinstance(module, PairWeightingLoss) and module.gather for module in loss.modules()
    ):
        raise InputError(
            f"{type(loss).__name__} contains a loss of lightning_dml, which gathers the batches itself, inside one "
            "that is given the gathered batch: make the inner loss with gather=False"
        )
    # A loss that knows nothing of ranks: every rank computes it on the whole batch. The backward pass of the gather
    # sums the ranks' equal gradients and DDP takes the mean, which leaves the gradient of one process.
    counts = distributed.row_counts(len(batch.embeddings), batch.embeddings.device)
    ref_emb = ref_labels = None
    if references is not None:
        references = references_for(loss, references, distributed.gather_rows(batch.indices, counts))
        if not len(references.labels):  # on every rank; not all of these losses can do without rows
            return 0 * batch.embeddings.sum()
        # Our losses compute in a fitting precision, others in that of what they are given.
        ref_emb, ref_labels = references.embeddings.to(batch.embeddings.dtype), references.labels
    embeddings = distributed.gather_rows_with_grad(batch.embeddings, counts)
    return call_plainly(loss, embeddings, distributed.gather_rows(batch.labels, counts), ref_emb, ref_labels)
