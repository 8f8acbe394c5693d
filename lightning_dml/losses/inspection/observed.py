"""The weights that a loss gives the pairs of a real batch, against their similarities."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_dml.checks import check_count
from lightning_dml.losses.calling import index_keywords
from lightning_dml.losses.inspection.pair_weights import pair_weights
from lightning_dml.losses.labels import PairLabels


@dataclass(frozen=True)
class ObservedSide:
    """The positives, or the negatives, of a batch.

    Attributes:
        similarity: (E,) float64 of the pairs, all of them or an even draw.
        weight: (E,) float64 of these pairs: -dL/dS of positives, dL/dS of negatives, the reduction included.
        force: sum of the weights of all pairs.
        pairs: how many pairs there are.
        counts: (bins,) int64, how many of all pairs have a similarity in each bin.
    """

    similarity: Tensor
    weight: Tensor
    force: float
    pairs: int
    counts: Tensor


@dataclass(frozen=True)
class ObservedWeights:
    """Similarities and weights of the pairs of a batch, positives and negatives apart.

    Attributes:
        positives: pairs of one class; a sample's pairs with itself are in neither set.
        negatives: pairs of different classes.
        edges: (bins + 1,) float64 bounds of the bins, from -1 to 1. Similarities beyond, by rounding, count as 1 or -1.
        anchors: how many anchors the batch has. Weights times this are those of `weight_curve`, for a loss whose
            reduction is over anchors.
    """

    positives: ObservedSide
    negatives: ObservedSide
    edges: Tensor
    anchors: int


def observed_weights(
    loss: nn.Module,
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    indices: Tensor | None = None,
    ref_indices: Tensor | None = None,
    limit: int | None = None,
    seed: int = 0,
    bins: int = 100,
) -> ObservedWeights:
    """Similarities and weights of the pairs of a batch, by itself or against references such as a bank.

    The weights are those of `pair_weights`, which takes N x M numbers in float64; positives with the sign turned, so
    that both sides have positive numbers where they are pulled, or pushed, as expected.

    Args:
        loss: one of ours, or any other; see `pair_weights`.
        embeddings: (N, D) float anchors with unit rows.
        labels: (N,) integer labels; rows with label -1 take part in no pair.
        ref_emb: (M, D) float references; None for in-batch, where each pair is seen from both ends.
        ref_labels: (M,) integer labels of the references.
        indices: (N,) sample indices. Another library's loss does not get them, and they leave pairs out here only.
        ref_indices: (M,) sample indices of the references.
        limit: most pairs of each side to return, drawn evenly; None returns all. Forces and counts are of all.
        seed: of that draw.
        bins: how many of equal width the similarities are counted in.

    Raises:
        InputError: for a loss without weights of pairs of samples, or a limit or number of bins below 1.

    Examples:
        >>> from lightning_dml.losses import ContrastiveLoss
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
        >>> observed = observed_weights(ContrastiveLoss(margin=0.5), embeddings, torch.tensor([0, 0, 1]))
        >>> observed.negatives.pairs, round(observed.negatives.force, 4)  # four pairs of weight 1 / 3
        (4, 1.3333)
    """
    if limit is not None:
        check_count("limit", limit, hint="None returns all pairs")
    check_count("bins", bins)
    known = index_keywords(loss, indices, ref_indices)
    weights = pair_weights(loss, embeddings, labels, ref_emb, ref_labels, **known)
    if ref_emb is None or ref_labels is None:
        references, pairs = embeddings, PairLabels(labels, labels, indices, indices, own_column=0)
    else:
        references, pairs = ref_emb, PairLabels(labels, ref_labels, indices, ref_indices)
    similarity = embeddings.detach().double() @ references.detach().double().T
    positive, negative = pairs.masks(slice(0, len(embeddings)), slice(0, len(references)))
    edges = torch.linspace(-1, 1, bins + 1, dtype=torch.float64)
    observed = ObservedWeights(
        _side(similarity[positive], -weights[positive], edges),
        _side(similarity[negative], weights[negative], edges),
        edges,
        len(embeddings),
    )
    return observed if limit is None else thinned(observed, limit, seed)


def thinned(observed: ObservedWeights, points: int, seed: int) -> ObservedWeights:
    """At most `points` pairs of each side, drawn evenly; forces and counts stay those of all."""
    generator = torch.Generator().manual_seed(seed)

    def draw(side: ObservedSide) -> ObservedSide:
        if len(side.similarity) <= points:
            return side
        places = torch.randperm(len(side.similarity), generator=generator)[:points].sort().values
        return replace(side, similarity=side.similarity[places], weight=side.weight[places])

    return replace(observed, positives=draw(observed.positives), negatives=draw(observed.negatives))


def _side(similarity: Tensor, weight: Tensor, edges: Tensor) -> ObservedSide:
    similarity, weight = similarity.cpu(), weight.cpu()
    bins = len(edges) - 1
    places = torch.bucketize(similarity, edges, right=True).sub_(1).clamp_(0, bins - 1)
    counts = torch.bincount(places, minlength=bins)
    return ObservedSide(similarity, weight, float(weight.sum()), len(weight), counts)
