"""The pair engine: any mining with any weighting over blocks of anchor rows, in bounded memory.

Anchors are independent of one another, so a loss needs only a few rows of the similarity matrix S = A R^T at
a time. For each block the engine computes S, mines, asks the weighting for the row losses and for dL/dS, and
multiplies dL/dS straight back into the gradients of anchors and references. Nothing of the size of S outlives
its block, whatever the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_dml.losses.mining import Miner
from lightning_dml.losses.weighting import Weighting

UNLABELLED = -1
"""Label of a row that takes part in no pair: an empty or refused slot of a memory bank."""


@dataclass(frozen=True)
class PairLabels:
    """What decides which pairs are positive, negative or none.

    Attributes:
        anchors: (N,) int64 labels.
        references: (M,) int64 labels.
        anchor_indices: (N,) int64 sample indices, or None; -1 where unknown.
        ref_indices: (M,) int64 sample indices, or None; -1 where unknown.
        own_column: column of the first anchor's own row where the references hold the anchors in order
            (in-batch), else None.
    """

    anchors: Tensor
    references: Tensor
    anchor_indices: Tensor | None = None
    ref_indices: Tensor | None = None
    own_column: int | None = None

    def masks(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Positive and negative masks, (n, M) bool, of the anchors in `rows`.

        A pair of a sample with itself (its own row, or any reference with the same sample index) is neither
        positive nor negative, and so is a pair with an unlabelled side.
        """
        anchors = self.anchors[rows, None]
        positive = anchors == self.references
        negative = ~positive
        if self.own_column is not None:
            own = torch.arange(len(anchors), device=anchors.device)
            positive[own, own + (self.own_column + (rows.start or 0))] = False
        if self.anchor_indices is not None and self.ref_indices is not None:
            indices = self.anchor_indices[rows, None]
            copies = (indices == self.ref_indices) & (indices >= 0)
            positive &= ~copies
            negative &= ~copies
        for labels in (anchors, self.references):
            # On an accelerator asking would be a synchronisation that costs more than the mask.
            if labels.is_cuda or bool((labels == UNLABELLED).any()):
                labelled = labels != UNLABELLED
                positive &= labelled
                negative &= labelled
        return positive, negative


class PairSums(NamedTuple):
    """What a loss reduces: sums over this call's anchors, as 0-dim tensors.

    Attributes:
        loss: sum of the row losses; carries the gradient.
        active_anchors: how many anchors have a pair with a weight other than zero.
        pairs: how many pairs have a weight other than zero.
    """

    loss: Tensor
    active_anchors: Tensor
    pairs: Tensor


def pair_sums(
    anchors: Tensor,
    references: Tensor,
    labels: PairLabels,
    miner: Miner | None,
    weighting: Weighting,
    block_bytes: int,
    count: bool,
) -> PairSums:
    """Runs the engine.

    Args:
        anchors: (N, D) float embeddings.
        references: (M, D) float embeddings; may be `anchors` itself.
        labels: decides which pairs exist.
        miner: keeps the informative pairs; None keeps all.
        weighting: row losses and their derivative with respect to S.
        block_bytes: upper limit of one block of S, in bytes; at least one row is taken.
        count: whether to count active anchors and pairs (one more pass over each block); else both are 0.
    """
    loss, active_anchors, pairs = _PairSums.apply(anchors, references, labels, miner, weighting, block_bytes, count)
    return PairSums(loss, active_anchors, pairs)


class _PairSums(torch.autograd.Function):
    """Value and gradients in one sweep over the blocks; the backward only scales what the forward kept."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        references: Tensor,
        labels: PairLabels,
        miner: Miner | None,
        weighting: Weighting,
        block_bytes: int,
        count: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_anchors, wants_references = ctx.needs_input_grad[:2]
        # Exponentials of alpha = 50 overflow half precision, so the mathematics is float32 at least.
        dtype = torch.promote_types(torch.promote_types(anchors.dtype, references.dtype), torch.float32)
        left, right = anchors.detach().to(dtype), references.detach().to(dtype)
        loss = left.new_zeros(())
        active, pairs = (torch.zeros((), dtype=torch.int64, device=left.device) for _ in range(2))
        grad_left = torch.zeros_like(left) if wants_anchors else None
        grad_right = torch.zeros_like(right) if wants_references else None

        step = max(1, block_bytes // max(1, len(right) * left.element_size()))
        with torch.autocast(left.device.type, enabled=False):
            for start in range(0, len(left), step):
                rows = slice(start, start + step)
                similarity = left[rows] @ right.T
                positive, negative = labels.masks(rows)
                if miner is not None:
                    positive, negative = miner(similarity, positive, negative)
                row_losses, weights = weighting(similarity, positive, negative)
                loss += row_losses.sum()
                if count:
                    per_row = torch.count_nonzero(weights, dim=1)
                    active += torch.count_nonzero(per_row)
                    pairs += per_row.sum()
                if grad_left is not None:
                    torch.mm(weights, right, out=grad_left[rows])
                if grad_right is not None:
                    grad_right.addmm_(weights.T, left[rows])
        ctx.gradients = (
            None if grad_left is None else grad_left.to(anchors.dtype),
            None if grad_right is None else grad_right.to(references.dtype),
        )
        ctx.mark_non_differentiable(active, pairs)
        return loss, active, pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.gradients
        return (
            None if left is None else left * grad_loss.to(left.dtype),
            None if right is None else right * grad_loss.to(right.dtype),
            *(None,) * 5,
        )
