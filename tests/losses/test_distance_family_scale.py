"""Distance, triplet and ranking losses at the size of a memory, and beside pytorch-metric-learning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_metric_learning.losses as pml
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.reducers import SumReducer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dml.losses import PairWeightingLoss
from lightning_dml.losses.pairwise_losses import MarginLoss
from lightning_dml.losses.ranking_losses import FastAPLoss, RankedListLoss
from lightning_dml.losses.triplet_losses import TripletLoss
from lightning_dml.losses.weighting import Weighting
from lightning_dml.losses.weighting.distance import DistanceContrastiveWeighting, HadsellWeighting, MarginWeighting
from lightning_dml.losses.weighting.ranking import FastAPWeighting, RankedListWeighting
from lightning_dml.losses.weighting.triplet import (
    SoftTripletWeighting,
    TripletWeighting,
    _count_below_by_grid,
    count_below,
)
from tests.losses.oracle import gradients


def clusters(rows: int, classes: int, dim: int, spread: float) -> tuple[Tensor, Tensor]:
    """Unit rows around unit class centres, and their labels."""
    labels = torch.arange(rows) % classes
    centres = F.normalize(torch.randn(classes, dim, generator=torch.Generator().manual_seed(1)), dim=1)
    return F.normalize(centres[labels] + spread * torch.randn(rows, dim), dim=1), labels


@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 300),
    spread=st.sampled_from([0.0, 1e-7, 1e-3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_grid_counts_what_a_binary_search_counts(seed: int, width: int, spread: float, dtype: torch.dtype) -> None:
    """Ties, crowded cells, empty rows and values at a threshold are where a grid could be off by one."""
    generator = torch.Generator().manual_seed(seed)
    thresholds = 0.3 + spread * torch.randn(4, width, generator=generator, dtype=dtype)
    thresholds[:, ::3] = thresholds[:, :1].clone()
    thresholds[1, width // 2 :] = torch.inf
    thresholds[2] = torch.inf
    thresholds = thresholds.sort(dim=1).values
    near = thresholds.masked_fill(thresholds.isinf(), 0.3)
    values = torch.cat(
        [
            near,
            near.nextafter(torch.ones_like(near)),
            near.nextafter(-torch.ones_like(near)),
            torch.randn(4, 50, generator=generator, dtype=dtype),
            torch.full((4, 1), -torch.inf, dtype=dtype),
        ],
        dim=1,
    )
    expected = torch.stack(
        [(row < row_values[:, None]).sum(1) for row, row_values in zip(thresholds, values, strict=True)]
    )
    assert torch.equal(_count_below_by_grid(thresholds, values), expected)
    assert torch.equal(count_below(thresholds, values), expected)


@pytest.mark.parametrize("measure", ["similarity", "distance"])
@pytest.mark.parametrize(("classes", "spread", "margin"), [(50, 0.05, 0.6), (50, 10.0, 0.4), (3, 10.0, 0.4)])
def test_triplet_sums_keep_their_digits_in_float32(measure: Any, classes: int, spread: float, margin: float) -> None:
    """Millions of triplets, few of them violated or nearly all: the value is a difference of large sums."""
    anchors, labels = clusters(6, 3, 64, spread)
    references, ref_labels = clusters(9000, classes, 64, spread)
    similarity = anchors @ references.T
    positive = labels[:, None] == ref_labels
    losses, weights = TripletWeighting(margin, measure=measure)(similarity, positive, ~positive)

    exact = similarity.double()
    far = 2 - 2 * exact
    far = far.clamp(min=0).sqrt() if measure == "distance" else -exact
    slope = far.reciprocal() if measure == "distance" else torch.ones_like(far)
    for i in range(6):
        p, n = far[i, positive[i]], far[i, ~positive[i]]
        violation = p[:, None] - n + margin
        assert 0 < violation.gt(0).any(0).double().mean()
        assert (violation.gt(0).any(0).double().mean() > 1 / 8) == (spread > 1)  # the path that is taken
        torch.testing.assert_close(losses[i].double(), violation.relu().sum(), rtol=1e-5, atol=0)
        counts = violation > 0
        # A triplet whose float32 violation is rounding may be counted or not.
        near = int((violation.abs() < 1e-5).sum())
        expected = torch.zeros_like(far[i])
        expected[positive[i]], expected[~positive[i]] = -counts.sum(1).double(), counts.sum(0).double()
        assert float((weights[i] / slope[i] - expected).abs().sum()) <= 2 * near + 1e-5 * float(expected.abs().sum())


@pytest.mark.parametrize("loss", [TripletLoss(), TripletLoss(measure="distance"), FastAPLoss(), RankedListLoss()])
def test_nothing_cubic_is_made(loss: PairWeightingLoss) -> None:
    """32 anchors with 16,384 positives and 16,384 negatives each: a list of triplets would fill 34 GB of floats."""
    anchors, labels = clusters(32, 2, 8, 2.0)
    references, ref_labels = clusters(2**15, 2, 8, 2.0)
    anchors.requires_grad_()
    value = loss(anchors, labels, references, ref_labels)
    value.backward()
    assert anchors.grad is not None
    assert value.isfinite() and anchors.grad.isfinite().all() and anchors.grad.any()


def row_of_the_facts() -> tuple[Tensor, Tensor]:
    """Positives and negatives of one anchor, drawn as where the closed forms were first checked."""
    draws = torch.rand(45, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return 0.2 + 0.7 * draws[:5], -0.4 + 1.2 * draws[5:]


def one(condition: Tensor) -> Tensor:
    """1 where true."""
    return condition.double()


def d(s: Tensor) -> Tensor:
    """Distance of unit vectors."""
    return (2 - 2 * s).sqrt()


def triplet_weights(sp: Tensor, sn: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of violated triplets."""
    active = one(sn[None] - sp[:, None] + 0.1 > 0)
    return active.sum(1), active.sum(0)


def triplet_distance_weights(sp: Tensor, sn: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of violated triplets over distances."""
    active = one(d(sp)[:, None] - d(sn)[None] + 0.2 > 0)
    return active.sum(1) / d(sp), active.sum(0) / d(sn)


def triplet_squared_weights(sp: Tensor, sn: Tensor) -> tuple[Tensor, Tensor]:
    """Twice the numbers of violated triplets."""
    active = one(2 * (sn[None] - sp[:, None]) + 0.2 > 0)
    return 2 * active.sum(1), 2 * active.sum(0)


def soft_triplet_weights(sp: Tensor, sn: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of sigmoids."""
    sigmoid = torch.sigmoid(10 * (sn[None] - sp[:, None]))
    return sigmoid.sum(1), sigmoid.sum(0)


def ranked_list_weights(sp: Tensor, sn: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised exponentials over distances."""
    wp, wn = one(d(sp) > 0.8), torch.exp(10 * (1.2 - d(sn))) * one(d(sn) < 1.2)
    return 0.5 * wp / wp.sum() / d(sp), 0.5 * wn / wn.sum() / d(sn)


def fast_ap_weights(sp: Tensor, sn: Tensor) -> tuple[Tensor, Tensor]:
    """The source's derivative by the histograms, times that of the pulses."""
    width, centres = 0.4, torch.linspace(0, 4, 11, dtype=torch.float64)
    hp = torch.relu(1 - (2 - 2 * sp[:, None] - centres).abs() / width).sum(0)
    hn = torch.relu(1 - (2 - 2 * sn[:, None] - centres).abs() / width).sum(0)
    sums_p, sums = hp.cumsum(0), (hp + hn).cumsum(0)
    sums_n, safe = sums - sums_p, torch.where(sums == 0, 1e300, sums)
    t1, t0 = hp * sums_n / safe**2, hp * sums_p / safe**2
    by_hp = ((sums_p * safe + hp * sums_n) / safe**2 * (sums > 0) + (t1.sum() - t1.cumsum(0))) / len(sp)
    by_hn = -(t0.sum() - t0.cumsum(0) + t0) / len(sp)

    def pulse(s: Tensor) -> Tensor:
        squared = 2 - 2 * s[:, None]
        rising = (squared > centres - width) & (squared <= centres)
        return (one(rising) - one((squared > centres) & (squared <= centres + width))) / width

    return -2 * (by_hp * pulse(sp)).sum(1), 2 * (by_hn * pulse(sn)).sum(1)


FACTS: dict[str, tuple[Weighting, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]] = {
    "hadsell": (HadsellWeighting(1.0), lambda sp, sn: (one(sp < 2), torch.relu(1 / d(sn) - 1))),
    "contrastive": (DistanceContrastiveWeighting(1.0), lambda sp, sn: (1 / d(sp), one(d(sn) < 1) / d(sn))),
    "triplet": (TripletWeighting(0.1), triplet_weights),
    "triplet, distance": (TripletWeighting(0.2, measure="distance"), triplet_distance_weights),
    "triplet, squared": (TripletWeighting(0.2, measure="squared_distance"), triplet_squared_weights),
    "soft triplet": (SoftTripletWeighting(10.0), soft_triplet_weights),
    "ranked list": (RankedListWeighting(), ranked_list_weights),
    "margin": (
        MarginWeighting(),
        lambda sp, sn: (one(d(sp) > 1.2 - 0.2) / d(sp), one(d(sn) < 1.2 + 0.2) / d(sn)),
    ),
    "fast ap": (FastAPWeighting(10), fast_ap_weights),
}


@pytest.mark.parametrize("name", FACTS)
def test_weights_are_the_closed_forms_of_the_literature(name: str) -> None:
    """Pairs weighting is read off these formulas; equal gradients of whole batches would not show a swapped pair."""
    weighting, formula = FACTS[name]
    sp, sn = row_of_the_facts()
    positive = torch.arange(45)[None] < 5
    _, weights = weighting(torch.cat([sp, sn])[None], positive, ~positive)
    pull, push = formula(sp, sn)
    torch.testing.assert_close(weights[0], torch.cat([-pull, push]), rtol=1e-9, atol=1e-9)


def in_batch(classes: int = 6) -> dict[str, Tensor]:
    """A batch in which each row has positives."""
    rows, labels = clusters(24, classes, 8, 0.5)
    return {"embeddings": rows.double(), "labels": labels}


def with_references() -> dict[str, Tensor]:
    """Two classes, as many references of each: every anchor has as many positives as negatives."""
    rows, labels = clusters(10, 2, 8, 0.8)
    references, ref_labels = clusters(24, 2, 8, 0.8)
    return {
        "embeddings": rows.double(),
        "labels": labels,
        "ref_emb": references.double(),
        "ref_labels": ref_labels,
    }


SUM = {"reducer": SumReducer()}
PEERS: dict[str, tuple[PairWeightingLoss, nn.Module, float]] = {
    "triplet": (TripletLoss(0.1), pml.TripletMarginLoss(0.1, distance=CosineSimilarity(), **SUM), 1),
    "triplet, distance": (TripletLoss(0.2, measure="distance"), pml.TripletMarginLoss(0.2, **SUM), 1),
    "triplet, squared": (
        TripletLoss(0.2, measure="squared_distance"),
        pml.TripletMarginLoss(0.2, distance=LpDistance(power=2), **SUM),
        1,
    ),
    "soft triplet": (
        TripletLoss(scale=1.0),
        pml.TripletMarginLoss(0, smooth_loss=True, distance=CosineSimilarity(), **SUM),
        1,
    ),
    "contrastive, distance": (
        PairWeightingLoss(DistanceContrastiveWeighting(1.1, 0.2)),
        pml.ContrastiveLoss(0.2, 1.1, **SUM),
        1,
    ),
    # The peer's sum runs over triplets: each of the twelve positives (negatives) counts twelve times.
    "margin": (MarginLoss(), pml.MarginLoss(**SUM), 12),
}


@pytest.mark.parametrize("name", PEERS)
def test_equals_pytorch_metric_learning(name: str) -> None:
    """Who changes over must find the same gradient, up to the reduction."""
    ours, theirs, times = PEERS[name]
    batch = with_references()
    factor = times * len(batch["embeddings"])

    def mine(embeddings: Tensor, ref_emb: Tensor, **labels: Tensor) -> Tensor:
        value: Tensor = factor * ours(F.normalize(embeddings), ref_emb=F.normalize(ref_emb), **labels)
        return value

    def peer(embeddings: Tensor, ref_emb: Tensor, labels: Tensor, ref_labels: Tensor) -> Tensor:
        value: Tensor = theirs(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
        return value

    for value, expected in zip(gradients(mine, batch), gradients(peer, batch), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_equals_pytorch_metric_learning_fast_ap() -> None:
    """Theirs takes no references, so in-batch; both are means over anchors."""
    batch = in_batch()

    def mine(embeddings: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = FastAPLoss(12)(F.normalize(embeddings), labels)
        return value

    for value, expected in zip(gradients(mine, batch), gradients(pml.FastAPLoss(12), batch), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


def test_agrees_with_pytorch_metric_learning_ranked_list_in_value() -> None:
    """Theirs adds 1e-5 per column to its sums of weights and lets gradient through them: values agree, roughly."""
    batch = in_batch()
    ours = RankedListLoss(0.4, 1.2, neg_temperature=4.0, pos_temperature=2.0, balance=0.3)
    theirs = pml.RankedListLoss(0.4, Tn=4.0, imbalance=0.3, alpha=1.2, Tp=2.0)
    torch.testing.assert_close(ours(**batch), theirs(**batch), rtol=3e-4, atol=0)


def test_agrees_with_pytorch_metric_learning_ranked_list_without_temperatures() -> None:
    """Constant weights have no gradient in either library; what is left of the difference is their 1e-5."""
    batch = in_batch(3)

    def mine(embeddings: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = RankedListLoss(0.9, 1.4, neg_temperature=0.0)(F.normalize(embeddings), labels)
        return value

    theirs = pml.RankedListLoss(0.9, Tn=0, alpha=1.4)
    for value, expected in zip(gradients(mine, batch), gradients(theirs, batch), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=3e-4 * float(expected.abs().max()))
