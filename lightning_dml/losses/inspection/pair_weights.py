"""`pair_weights`: the signed weights that a loss gives each pair, for our losses and for any other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_dml.errors import InputError
from lightning_dml.losses.base import PairWeightingLoss, reduction_divisor
from lightning_dml.losses.engine import drawing_again
from lightning_dml.losses.inspection.measured import measured_weights


def pair_weights(
    loss: nn.Module,
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    indices: Tensor | None = None,
    ref_indices: Tensor | None = None,
) -> Tensor:
    r"""Signed pair weights :math:`dL/dS` of a loss at given embeddings, the reduction included.

    Positive weights push apart, negative ones pull together. The gradient of the anchors is `weights @ ref_emb`;
    in-batch, where each row is an anchor and a reference, it is `(weights + weights.T) @ embeddings`.

    The weights of our losses are what the engine uses. Those of any other loss that depends on inner products, cosines
    or distances of unit rows are measured, to about ten digits; see `measured_weights`. In-batch, such a loss tells
    only the sum of both directions of a pair; the answer then holds half of it at both places.

    Args:
        loss: one of ours, or any module called `loss(embeddings, labels[, ref_emb=..., ref_labels=...])`.
        embeddings: (N, D) float anchors with unit rows.
        labels: (N,) integer labels.
        ref_emb: (M, D) float references; None for in-batch.
        ref_labels: (M,) integer labels of the references.
        indices: (N,) sample indices, for our losses only.
        ref_indices: (M,) sample indices of the references, for our losses only.

    Returns:
        (N, M) float64; M is N in-batch.

    Raises:
        InputError: if the loss cannot be called so, as a loss with proxies of its own dimension, or depends on more
            than the similarities of pairs.

    Examples:
        >>> from lightning_dml.losses import ContrastiveLoss
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
        >>> pair_weights(ContrastiveLoss(margin=0.5), embeddings, torch.tensor([0, 0, 1])) * 3
        tensor([[ 0., -1.,  1.],
                [-1.,  0.,  1.],
                [ 1.,  1.,  0.]], dtype=torch.float64)
    """
    embeddings = embeddings.detach().double()
    ref_emb = None if ref_emb is None else ref_emb.detach().double()
    if isinstance(loss, PairWeightingLoss):
        return _own_weights(loss, embeddings, labels, ref_emb, ref_labels, indices, ref_indices)
    if indices is not None or ref_indices is not None:
        raise InputError(f"{type(loss).__name__} takes no indices; leave indices and ref_indices out")
    return measured_weights(loss, embeddings, labels, ref_emb, ref_labels)


@torch.no_grad()
def _own_weights(
    loss: PairWeightingLoss,
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    indices: Tensor | None,
    ref_indices: Tensor | None,
) -> Tensor:
    references, task = loss.prepare(embeddings, labels, ref_emb, ref_labels, indices, ref_indices, together=False)
    similarity = embeddings @ references.T
    extra = () if task.statistics is None else (task.statistics,)
    with drawing_again(loss.miner), drawing_again(task.weighting):  # looking must not change what training draws
        masks = task.kept_masks(similarity, slice(0, len(embeddings)), slice(0, len(references)))
        _, weights = task.weighting(similarity, *masks, *extra)
    active = weights != 0
    divisor = reduction_divisor(loss.reduction, len(embeddings), active.any(dim=1).sum(), active.sum())
    scaled: Tensor = weights / divisor.clamp_min(1)
    return scaled
