"""Distance, triplet and ranking losses against slow oracles: value and gradient in float64, and awkward rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_dml.errors import InputError
from lightning_dml.losses import MultiSimilarityMiner, PairWeightingLoss
from lightning_dml.losses.pairwise_losses import MarginLoss
from lightning_dml.losses.ranking_losses import FastAPLoss, RankedListLoss
from lightning_dml.losses.triplet_losses import TripletLoss
from lightning_dml.losses.weighting import Weighting
from lightning_dml.losses.weighting.distance import (
    MIN_DISTANCE,
    DistanceContrastiveWeighting,
    HadsellWeighting,
    MarginWeighting,
)
from lightning_dml.losses.weighting.ranking import FastAPWeighting, RankedListWeighting
from lightning_dml.losses.weighting.triplet import SoftTripletWeighting, TripletWeighting
from tests.losses import oracle
from tests.losses.oracle import RowLoss, batches, gradients


def nothing(sp: Tensor, sn: Tensor) -> Tensor:
    """A zero that depends on the similarities, so that autograd has a gradient to give."""
    return sp.sum() * 0 + sn.sum() * 0


def distance(s: Tensor) -> Tensor:
    """The documented rule: nearer pairs are at the least distance, and clamped, so without a slope."""
    return torch.sqrt(torch.clamp(2 - 2 * s, min=MIN_DISTANCE**2))


def squared_distance(s: Tensor) -> Tensor:
    """Squared distance of unit vectors."""
    return 2 - 2 * s


def triplets(compare: Callable[[Tensor], Tensor], cost: Callable[[Tensor], Tensor]) -> RowLoss:
    """Sum over triplets of `cost` of how much nearer the negative is than the positive, by `compare`, a distance."""

    def row(sp: Tensor, sn: Tensor) -> Tensor:
        total = nothing(sp, sn)
        for p in sp:
            for n in sn:
                total = total + cost(compare(p) - compare(n))
        return total

    return row


def hinge(margin: float) -> Callable[[Tensor], Tensor]:
    """A triplet's cost with a hard margin."""
    return lambda violation: torch.clamp(violation + margin, min=0)


def soft(scale: float) -> Callable[[Tensor], Tensor]:
    """A triplet's cost with a soft margin."""
    return lambda violation: torch.log(1 + torch.exp(scale * violation)) / scale


def each_pair(positive: Callable[[Tensor], Tensor], negative: Callable[[Tensor], Tensor]) -> RowLoss:
    """Sum of a cost of distance over positives and of another over negatives."""

    def row(sp: Tensor, sn: Tensor) -> Tensor:
        total = nothing(sp, sn)
        for p in sp:
            total = total + positive(distance(p))
        for n in sn:
            total = total + negative(distance(n))
        return total

    return row


def hinges(pos_margin: float, margin: float) -> RowLoss:
    """Positives beyond one distance, negatives within another."""
    return each_pair(lambda d: torch.clamp(d - pos_margin, min=0), lambda d: torch.clamp(margin - d, min=0))


def hadsell(margin: float) -> RowLoss:
    """Half the squared distance of positives, half the squared lack of distance of negatives."""
    push = each_pair(lambda d: 0 * d, lambda d: torch.clamp(margin - d, min=0) ** 2 / 2)
    return lambda sp, sn: (squared_distance(sp) / 2).sum() + push(sp, sn)


def ranked_list(margin: float, alpha: float, neg: float, pos: float, balance: float) -> RowLoss:
    """Mean violations of both sides, weighted by exponentials of themselves that are held constant."""

    def side(violations: list[Tensor], temperature: float) -> Tensor | float:
        open_hinges = [v for v in violations if v > 0]
        if not open_hinges:
            return 0.0
        weights = [torch.exp(temperature * v.detach()) for v in open_hinges]
        return sum(w * v for w, v in zip(weights, open_hinges, strict=True)) / sum(weights)

    def row(sp: Tensor, sn: Tensor) -> Tensor:
        pull = side([distance(p) - (alpha - margin) for p in sp], pos)
        push = side([alpha - distance(n) for n in sn], neg)
        return nothing(sp, sn) + (1 - balance) * pull + balance * push

    return row


def fast_ap(bins: int) -> RowLoss:
    """Average precision with each pair in the two bins around it, and on a centre in those of the documented rule."""

    def histogram(similarities: Tensor) -> list[Tensor]:
        counts = [torch.zeros((), dtype=torch.float64) for _ in range(bins + 1)]
        for s in similarities:
            position = (2 - 2 * s) / (4 / bins)
            cell = min(max(int(position), 0), bins - 1)
            counts[cell] = counts[cell] + (cell + 1 - position)
            counts[cell + 1] = counts[cell + 1] + (position - cell)
        return counts

    def row(sp: Tensor, sn: Tensor) -> Tensor:
        if len(sp) == 0:
            return nothing(sp, sn)
        positives, negatives = histogram(sp), histogram(sn)
        total = nothing(sp, sn)
        for i in range(bins + 1):
            before, all_before = sum(positives[: i + 1]), sum(positives[: i + 1]) + sum(negatives[: i + 1])
            if all_before > 0:
                total = total + positives[i] * before / all_before
        return 1 - total / len(sp)

    return row


CASES: dict[str, tuple[PairWeightingLoss, RowLoss, Any]] = {
    "triplet, similarity": (TripletLoss(), triplets(lambda s: -s, hinge(0.1)), None),
    "triplet, distance": (TripletLoss(measure="distance"), triplets(distance, hinge(0.2)), None),
    "triplet, squared": (TripletLoss(0.3, measure="squared_distance"), triplets(squared_distance, hinge(0.3)), None),
    "triplet, wide margin": (TripletLoss(5.0, measure="distance"), triplets(distance, hinge(5.0)), None),
    "triplet, mined": (
        TripletLoss(0.2, miner=MultiSimilarityMiner(0.1)),
        triplets(lambda s: -s, hinge(0.2)),
        oracle.mine_relative(0.1),
    ),
    "soft triplet": (TripletLoss(scale=10.0), triplets(lambda s: -s, soft(10.0)), None),
    "soft triplet, distance": (TripletLoss(measure="distance", scale=3.0), triplets(distance, soft(3.0)), None),
    "soft triplet, squared": (
        TripletLoss(measure="squared_distance", scale=30.0),
        triplets(squared_distance, soft(30.0)),
        None,
    ),
    "hadsell": (PairWeightingLoss(HadsellWeighting(1.1)), hadsell(1.1), None),
    "contrastive, distance": (PairWeightingLoss(DistanceContrastiveWeighting(1.1, 0.3)), hinges(0.3, 1.1), None),
    "contrastive, distance, no positive margin": (
        PairWeightingLoss(DistanceContrastiveWeighting()),
        hinges(0.0, 1.0),
        None,
    ),
    "margin": (MarginLoss(), hinges(1.0, 1.4), None),
    "ranked list": (RankedListLoss(), ranked_list(0.4, 1.2, 10.0, 0.0, 0.5), None),
    "ranked list, sharp": (
        RankedListLoss(0.7, 1.3, neg_temperature=3.0, pos_temperature=8.0, balance=0.2),
        ranked_list(0.7, 1.3, 3.0, 8.0, 0.2),
        None,
    ),
    "fast ap": (FastAPLoss(), fast_ap(10), None),
    "fast ap, one bin": (FastAPLoss(bins=1), fast_ap(1), None),
    "fast ap, fine": (FastAPLoss(bins=37), fast_ap(37), None),
}


@pytest.mark.parametrize("name", CASES)
@given(batch=batches(), block=st.sampled_from([1, 100, 2**20]))
def test_value_and_gradient_equal_the_textbook(name: str, batch: dict[str, Any], block: int) -> None:
    """A closed form is trusted only where it equals what autograd makes of the formula, duplicates included."""
    loss, row_loss, mine = CASES[name]
    loss.block_bytes = block
    oracle.assert_textbook(loss, row_loss, batch, mine)


@pytest.mark.parametrize("learned", [True, False])
@given(batch=batches())
def test_beta_is_learned(learned: bool, batch: dict[str, Any]) -> None:
    """With the boundary as a parameter all gradients come from autograd; frozen, from the closed form."""
    loss = MarginLoss(margin=0.1, beta=0.9, learn_beta=True).double()
    (beta,) = loss.parameters()
    assert isinstance(loss.weighting, MarginWeighting) and beta is loss.weighting.beta
    beta.requires_grad_(learned)
    for ours, expected in zip(gradients(loss, batch), gradients(MarginLoss(0.1, 0.9), batch), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)  # beta passed through float32
    if learned:
        free = torch.tensor(beta.item(), dtype=torch.float64, requires_grad=True)
        rows = oracle.oracle(each_pair(lambda d: (d - free + 0.1).relu(), lambda d: (free + 0.1 - d).relu()), **batch)
        (expected,) = torch.autograd.grad(torch.stack(rows).mean() + 0 * free, free)
        embeddings = batch["embeddings"].clone().requires_grad_()
        loss(**{**batch, "embeddings": embeddings}).backward()
        torch.testing.assert_close(beta.grad, expected, rtol=1e-9, atol=1e-9)


def test_a_fixed_beta_is_no_parameter() -> None:
    """An optimizer must not find, nor weight decay shrink, a boundary that was to stay."""
    assert not list(MarginLoss().parameters())


WEIGHTINGS: dict[str, Weighting] = {
    "triplet": TripletWeighting(),
    "triplet, distance": TripletWeighting(0.2, measure="distance"),
    "soft triplet": SoftTripletWeighting(50.0, measure="distance"),
    "hadsell": HadsellWeighting(),
    "contrastive": DistanceContrastiveWeighting(),
    "margin": MarginWeighting(),
    "ranked list": RankedListWeighting(neg_temperature=1000.0),
    "fast ap": FastAPWeighting(),
}


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_awkward_rows_stay_finite(name: str, dtype: torch.dtype) -> None:
    """One NaN in one row of one step ends a run: equal and opposite vectors, empty sets, and rounding beyond them."""
    eps = torch.finfo(dtype).eps
    similarity = torch.tensor([1.0, 1 + 2 * eps, 1 - eps, 0.5, -0.9, -1.0, -1 - 2 * eps, 1.0], dtype=dtype).repeat(7, 1)
    every = torch.ones(8, dtype=torch.bool)
    odd = torch.arange(8) % 2 == 0
    positive = torch.stack([odd, ~odd, every, ~every, ~every, ~every, odd])
    negative = torch.stack([~odd, odd, ~every, every, ~every, odd, ~every])
    before = similarity.clone()
    losses, weights = WEIGHTINGS[name](similarity, positive, negative)
    assert losses.dtype == weights.dtype == dtype
    assert losses.shape == (7,) and weights.shape == (7, 8)
    assert losses.isfinite().all() and weights.isfinite().all()
    assert (losses >= -10 * eps).all()
    assert (weights[~(positive | negative)] == 0).all()
    assert losses[4] == 0 and (weights[4] == 0).all()
    if "triplet" in name or name == "fast ap":  # without positives, no triplet and no precision
        assert (losses[3:6] == 0).all() and (weights[3:6] == 0).all()
    assert torch.equal(similarity, before), "the block is the engine's"


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_no_rows_and_no_references(name: str) -> None:
    """An empty shard of references must not be the end of a job."""
    for shape in ((0, 5), (3, 0)):
        none = torch.zeros(shape, dtype=torch.bool)
        losses, weights = WEIGHTINGS[name](torch.zeros(shape), none, none)
        assert losses.shape == shape[:1] and weights.shape == shape
        assert float(losses.sum()) == 0


def test_equal_vectors_are_neither_pulled_nor_pushed() -> None:
    """In float32 the distance of a duplicate is rounding; a weight of 1/d would drown every other pair's."""
    row = F.normalize(torch.randn(1, 512), dim=1)
    embeddings = torch.cat([row, row * (1 + 2e-7), F.normalize(torch.randn(1, 512), dim=1)])
    labels = torch.tensor([0, 0, 1])
    batch = {"embeddings": embeddings, "labels": labels, "ref_emb": embeddings, "ref_labels": labels}
    for loss in (TripletLoss(3.0, measure="distance"), PairWeightingLoss(DistanceContrastiveWeighting())):
        for gradient in gradients(loss, batch)[1:]:
            assert float(gradient.abs().max()) < 3


@pytest.mark.parametrize("dim", [64, 512])
def test_no_row_has_a_slope_against_its_own_copy(dim: int) -> None:
    """One in a thousand, by the order in which a processor adds, would get a weight of a thousand."""
    rows = F.normalize(torch.randn(1500, dim), dim=1)
    itself = torch.eye(1500, dtype=torch.bool)
    _, weights = DistanceContrastiveWeighting()(rows @ rows.T, itself, ~itself)
    assert (weights.diag() == 0).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TripletLoss(margin=-0.1), "margin.*at least 0.*-0.1"),
        (lambda: TripletLoss(margin=float("nan")), "margin.*nan"),
        (lambda: TripletLoss(measure="cosine"), "measure.*squared_distance.*'cosine'"),  # type: ignore[arg-type]
        (lambda: TripletLoss(scale=1.0, measure="cosine"), "measure.*'cosine'"),  # type: ignore[arg-type]
        (lambda: TripletLoss(scale=0.0), "scale.*greater than 0.*0.0"),
        (lambda: TripletLoss(margin=0.1, scale=10.0), "margin=0.1 and scale=10.0.*leave out"),
        (lambda: HadsellWeighting(0.0), "margin.*greater than 0.*0.0"),
        (lambda: DistanceContrastiveWeighting(1.0, -0.5), "pos_margin.*at least 0.*-0.5"),
        (lambda: MarginLoss(margin=-1.0), "margin.*-1.0"),
        (lambda: MarginLoss(beta=float("inf")), "beta.*inf"),
        (lambda: RankedListLoss(neg_temperature=-1.0), "neg_temperature.*at least 0.*-1.0"),
        (lambda: RankedListLoss(pos_temperature=-2.0), "pos_temperature.*at least 0.*-2.0"),
        (lambda: RankedListLoss(balance=1.5), "balance.*at most 1.*1.5"),
        (lambda: RankedListLoss(alpha=0.0), "alpha.*greater than 0"),
        (lambda: FastAPLoss(bins=0), "bins.*integer of at least 1.*0"),
        (lambda: FastAPLoss(bins=2.5), "bins.*integer of at least 1.*2.5"),  # type: ignore[arg-type]
    ],
)
def test_wrong_settings_are_named(call: Callable[[], object], words: str) -> None:
    """The message must lead from a config to the line that is wrong."""
    with pytest.raises(InputError, match=words):
        call()
