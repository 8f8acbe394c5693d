"""Losses, batches and calls that several test files share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytorch_metric_learning.losses as pml
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dml import distributed, losses
from lightning_dml.losses import (
    ContrastiveLoss,
    DirectWeightingLoss,
    FromLoss,
    MultiSimilarityLoss,
    PairWeightingLoss,
)

SIZES = {2: (5, 11), 3: (7, 0, 9)}
REFERENCES, DIM = 31, 8  # shares of 16 and 15 rows, or of 11, 10 and 10

LOSSES: dict[str, losses.PairWeightingLoss] = {
    "contrastive": ContrastiveLoss(0.2),
    "contrastive, mined": ContrastiveLoss(0.2, miner=losses.MultiSimilarityMiner(0.1)),
    "multi-similarity": losses.MultiSimilarityLoss(2.0, 10.0, 0.2),
    "direct": losses.DirectWeightingLoss(losses.curves.Constant(), losses.curves.Linear(0.1)),
    "general": losses.GeneralPairWeightingLoss("triplet_violation", "linear", "softmax", normalization="mean"),
    "triplet": losses.TripletLoss(0.2),
    "triplet, soft": losses.TripletLoss(scale=4.0, measure="distance"),
    "margin, learned": losses.MarginLoss(learn_beta=True).double(),
    "ranked list": losses.RankedListLoss(),
    "fastap": losses.FastAPLoss(),
    "n-pair": losses.NPairLoss(4.0),
    "nt-xent": losses.NTXentLoss(0.5),
    "tuplet margin": losses.TupletMarginLoss(8.0),
    "supcon": losses.SupConLoss(0.5),
    "nca": losses.NCALoss(),
    "lifted": losses.LiftedStructureLoss(measure="distance"),
    "binomial": losses.BinomialDevianceLoss(2.0, 10.0, 0.2),
    "circle": losses.CircleLoss(0.4, 8.0),
}

MINED: dict[str, PairWeightingLoss] = {
    "all pairs": ContrastiveLoss(0.2, miner=losses.mining.AllPairs()),
    "threshold": MultiSimilarityLoss(2.0, 10.0, 0.2, miner=losses.ThresholdMiner(0.9, 0.1)),
    "batch hard": losses.TripletLoss(0.2, miner=losses.BatchHardMiner()),
    "top k": ContrastiveLoss(0.2, miner=losses.TopKMiner(2, 3)),
    "triplets": ContrastiveLoss(0.2, miner=losses.TripletViolationMiner()),
    "semi-hard": losses.TripletLoss(0.2, miner=losses.SemiHardMiner(measure="distance", seed=4)),
    "distance weighted": losses.MarginLoss(learn_beta=True, miner=losses.DistanceWeightedMiner(DIM)).double(),
}

OURS: dict[str, PairWeightingLoss] = {
    name: copy.deepcopy(loss).requires_grad_(False) for name, loss in (LOSSES | MINED).items()
} | {
    "contrastive on distance": ContrastiveLoss(measure="distance"),
    "contrastive on squared distance": ContrastiveLoss(measure="squared_distance"),
    "circle, not detached": losses.CircleLoss(0.4, 8.0, detach=False),
    "halves of halves": DirectWeightingLoss(FromLoss(MultiSimilarityLoss()), FromLoss(losses.SupConLoss(0.5))),
}

THEIRS: dict[str, Callable[[], nn.Module]] = {
    "contrastive": lambda: pml.ContrastiveLoss(1.0, 0.3, distance=CosineSimilarity()),
    "contrastive on distance": pml.ContrastiveLoss,
    "multi-similarity": lambda: pml.MultiSimilarityLoss(2.0, 10.0, 0.5),
    "triplet": lambda: pml.TripletMarginLoss(0.2),
    "n-pair of tuplets": pml.TupletMarginLoss,
    "nt-xent": lambda: pml.NTXentLoss(0.2),
    "supcon": pml.SupConLoss,
    "circle": pml.CircleLoss,
    "lifted": pml.LiftedStructureLoss,
    "lifted, generalized": pml.GeneralizedLiftedStructureLoss,
    "nca": pml.NCALoss,
    "margin": pml.MarginLoss,
    "intra-pair variance": pml.IntraPairVarianceLoss,
}

ValueAndGradients = tuple[float, list[Any]]


def balanced() -> tuple[Tensor, Tensor]:
    """A P x K batch, where a mean over anchors is a mean over positive pairs."""
    return F.normalize(torch.randn(24, 8, dtype=torch.float64), dim=1), torch.arange(24) % 6


def extremes() -> tuple[Tensor, Tensor, Tensor]:
    """Rows without positives, negatives or either, with one side only, all equal, S beyond 1 and at -1."""
    similarity = torch.tensor([1.0, 1 + 1e-6, -1.0, 0.0, 1 - 1e-7, -1 - 1e-6, 0.3, 1.0]).repeat(8, 1)
    similarity[6], similarity[7] = 1.0, -1.0
    positive = torch.zeros(8, 8, dtype=torch.bool)
    negative = torch.zeros(8, 8, dtype=torch.bool)
    positive[0, :4], negative[0, 4:] = True, True
    positive[1, 4:], negative[1, :4] = True, True
    negative[2] = True
    positive[3] = True
    positive[5, 2], negative[5, 0] = True, True
    positive[6:, ::2], negative[6:, 1::2] = True, True
    return similarity, positive, negative


def normalized(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss of rows made unit, as the peer makes them again; its gradient has no part along the rows."""

    def call(**batch: Any) -> Tensor:
        return loss(
            **{
                name: F.normalize(tensor, dim=1) if tensor.is_floating_point() else tensor
                for name, tensor in batch.items()
            }
        )

    return call


def tangential(gradient: Tensor, embeddings: Tensor) -> Tensor:
    """The part of a gradient that moves unit rows; losses that normalise anew have no other part."""
    return gradient - (gradient * embeddings).sum(dim=1, keepdim=True) * embeddings


def net() -> nn.Module:
    """The same network on every rank."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8)).double()


def grad_of(parameter: Tensor) -> Tensor:
    """The gradient of a parameter that the loss must reach."""
    assert parameter.grad is not None
    return parameter.grad


def anchors_and_references(
    ranks: int, rank: int, references: int = REFERENCES
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's anchors, and all references: some of an anchor's sample, some without a label or an index."""
    generator = torch.Generator().manual_seed(1)
    start = sum(SIZES[ranks][:rank])
    rows = slice(start, start + SIZES[ranks][rank])
    embeddings = F.normalize(torch.randn(16, DIM, generator=generator, dtype=torch.float64), dim=1)
    bank = F.normalize(torch.randn(references, DIM, generator=generator, dtype=torch.float64), dim=1)
    labels, ref_labels = torch.arange(16) % 5, torch.arange(references) % 6
    labels[[2, 12]], ref_labels[3::7] = -1, -1
    ref_indices = torch.arange(references) - 1
    anchors = {"embeddings": embeddings[rows], "labels": labels[rows], "indices": torch.arange(16)[rows]}
    return anchors, {"ref_emb": bank, "ref_labels": ref_labels, "ref_indices": ref_indices}


def own_share(whole: dict[str, Tensor]) -> dict[str, Any]:
    """This rank's rows, and the word that they are a share."""
    own = slice(distributed.rank(), None, distributed.world_size())
    return {**{name: rows[own] for name, rows in whole.items()}, "ref_sharded": True}


def value_and_gradients(
    loss: PairWeightingLoss, anchors: dict[str, Tensor], references: dict[str, Any], calls: int = 1, wants: bool = True
) -> ValueAndGradients:
    """Value of the last of some calls, gradient of the anchors and, as DDP takes their mean, of the parameters."""
    loss = copy.deepcopy(loss)  # the draws of both calls must start at the same place
    embeddings = anchors["embeddings"].clone().requires_grad_(wants)
    for _ in range(calls):
        value = loss(**{**anchors, "embeddings": embeddings}, **references)
    if not value.requires_grad:
        return float(value), []
    value.backward()
    gradients = [grad_of(embeddings)]
    for parameter in loss.parameters():
        gradients.append(distributed.all_reduce_sum(grad_of(parameter)) / distributed.world_size())
    return float(value.detach()), [gradient.numpy() for gradient in gradients]
