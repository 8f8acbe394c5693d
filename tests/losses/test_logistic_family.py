"""Lifted structure, binomial deviance and circle against slow textbooks, float64 and a peer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_metric_learning.losses as pml
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_dml.errors import InputError
from lightning_dml.losses.base import PairWeightingLoss
from lightning_dml.losses.logistic_losses import BinomialDevianceLoss, CircleLoss, LiftedStructureLoss
from lightning_dml.losses.mining import MultiSimilarityMiner, ThresholdMiner
from lightning_dml.losses.weighting.binomial import BinomialWeighting
from lightning_dml.losses.weighting.circle import CircleWeighting
from lightning_dml.losses.weighting.distance import MIN_DISTANCE
from lightning_dml.losses.weighting.lifted import LiftedWeighting, OriginalLiftedWeighting
from tests.helpers import run_ranks
from tests.losses import oracle
from tests.losses.cases import balanced, extremes, normalized
from tests.losses.oracle import RowLoss, batches, gradients, nothing


def unlike(similarity: Tensor, measure: str) -> Tensor:
    """Distance, or minus the similarity."""
    return -similarity if measure == "similarity" else (2 - 2 * similarity).clamp(min=MIN_DISTANCE**2).sqrt()


def lifted(measure: str, margin: float, alpha: float, beta: float) -> RowLoss:
    """Soft maximum of the positives' distances against the soft minimum of the negatives'."""

    def row(sp: Tensor, sn: Tensor) -> Tensor:
        if len(sp) == 0 or len(sn) == 0:
            return nothing(sp, sn)
        pull = torch.log(torch.stack([torch.exp(alpha * unlike(s, measure)) for s in sp]).sum()) / alpha
        push = torch.log(torch.stack([torch.exp(-beta * unlike(s, measure)) for s in sn]).sum()) / beta
        return torch.clamp(pull + push + margin, min=0)

    return row


def binomial(alpha: float, beta: float, base: float) -> RowLoss:
    """Mean deviance of each side."""

    def row(sp: Tensor, sn: Tensor) -> Tensor:
        total = nothing(sp, sn)
        for s in sp:
            total = total + torch.log1p(torch.exp(alpha * (base - s))) / len(sp)
        for s in sn:
            total = total + torch.log1p(torch.exp(beta * (s - base))) / len(sn)
        return total

    return row


def circle(margin: float, gamma: float, detach: bool) -> RowLoss:
    """The circle loss of a row: the sums of both sides, multiplied."""

    def row(sp: Tensor, sn: Tensor) -> Tensor:
        pull, push = nothing(sp, sn), nothing(sp, sn)
        for s in sp:
            a = torch.clamp(1 + margin - (s.detach() if detach else s), min=0)
            pull = pull + torch.exp(-gamma * a * (s - (1 - margin)))
        for s in sn:
            a = torch.clamp((s.detach() if detach else s) + margin, min=0)
            push = push + torch.exp(gamma * a * (s - margin))
        return torch.log1p(pull * push)

    return row


def circles(margin: float, gamma: float, detach: bool) -> tuple[PairWeightingLoss, RowLoss, None]:
    """A loss and its textbook of the same settings."""
    return CircleLoss(margin, gamma, detach=detach), circle(margin, gamma, detach), None


CASES: dict[str, tuple[PairWeightingLoss, RowLoss, Any]] = {
    "lifted": (LiftedStructureLoss(measure="distance"), lifted("distance", 1.0, 1.0, 1.0), None),
    "lifted, sharp": (
        LiftedStructureLoss(measure="distance", margin=0.3, alpha=3.0, beta=8.0),
        lifted("distance", 0.3, 3.0, 8.0),
        None,
    ),
    # Not the default margin of 0: a positive as near as a negative is then on the hinge's kink, where any slope is one.
    # That margin is in CHECKED below.
    "lifted, similarity": (
        LiftedStructureLoss(measure="similarity", margin=0.1),
        lifted("similarity", 0.1, 2.0, 40.0),
        None,
    ),
    "lifted, mined": (
        LiftedStructureLoss(measure="similarity", margin=0.2, miner=MultiSimilarityMiner(0.2)),
        lifted("similarity", 0.2, 2.0, 40.0),
        oracle.mine_relative(0.2),
    ),
    "binomial": (BinomialDevianceLoss(), binomial(2.0, 40.0, 0.5), None),
    "binomial, mined": (
        BinomialDevianceLoss(3.0, 10.0, 0.2, miner=MultiSimilarityMiner(0.1)),
        binomial(3.0, 10.0, 0.2),
        oracle.mine_relative(0.1),
    ),
    "circle": circles(0.4, 80.0, True),
    "circle, sharp": circles(0.25, 100.0, True),
    "circle, differentiated": circles(0.4, 80.0, False),
    "circle, no margin": circles(0.0, 8.0, False),
}


@pytest.mark.parametrize("name", CASES)
@given(batch=batches(), block=st.sampled_from([1, 100, 2**20]))
def test_value_and_gradient_equal_the_textbook(name: str, batch: dict[str, Any], block: int) -> None:
    """A closed form is worth nothing unless it is the derivative, for rows that lack a side as well."""
    loss, row_loss, mine = CASES[name]
    loss.block_bytes = block
    oracle.assert_textbook(loss, row_loss, batch, mine)


def original(embeddings: Tensor, labels: Tensor, indices: Tensor | None = None, **settings: Any) -> Tensor:
    """Half of the squared J of every unordered positive pair, over the number of anchors."""
    measure, margin = settings["measure"], settings["margin"]
    sets = [oracle.pairs_of(i, labels, labels, indices, indices, True) for i in range(len(labels))]
    total = embeddings.sum() * 0
    for i in range(len(labels)):
        for j in sets[i][0]:
            negatives = [(end, k) for end in (i, j) for k in sets[end][1]]
            if j < i or not negatives:
                continue
            terms = [
                torch.exp(margin - unlike((embeddings[end] * embeddings[k]).sum(), measure)) for end, k in negatives
            ]
            violation = torch.log(torch.stack(terms).sum()) + unlike((embeddings[i] * embeddings[j]).sum(), measure)
            total = total + torch.clamp(violation, min=0) ** 2 / 2
    return total / len(labels)


@pytest.mark.parametrize("measure", ["distance", "similarity"])
@given(batch=batches(), block=st.sampled_from([1, 100, 2**20]))
def test_original_lifted_equals_the_textbook(measure: str, batch: dict[str, Any], block: int) -> None:
    """A pair's J depends on rows of two anchors; only the right shares in both add up to its gradient."""
    batch = {name: value for name, value in batch.items() if not name.startswith("ref_")}
    loss = LiftedStructureLoss("original", measure=measure, margin=0.4, block_bytes=block)  # type: ignore[arg-type]

    def textbook(**kwargs: Any) -> Tensor:
        return original(**kwargs, measure=measure, margin=0.4)

    for ours, expected in zip(gradients(loss, batch), gradients(textbook, batch), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_original_lifted_with_a_threshold_on_each_pair() -> None:
    """A miner that treats both orders of a pair alike keeps value and gradient those of one function."""
    loss = LiftedStructureLoss("original", measure="distance", miner=ThresholdMiner(0.6, 0.1))
    embeddings, labels = balanced()
    value, gradient = gradients(loss, {"embeddings": embeddings, "labels": labels})
    step = 1e-6 * torch.randn_like(embeddings)
    difference = (loss(embeddings + step, labels) - loss(embeddings - step, labels)) / 2
    assert float(value) > 0
    torch.testing.assert_close(difference, (gradient * step).sum(), rtol=1e-6, atol=1e-13)


def circle_row(detach: bool) -> RowLoss:
    """The loss of one row, in log space."""

    def row(sp: Tensor, sn: Tensor) -> Tensor:
        ap = torch.relu(1.4 - (sp.detach() if detach else sp))
        an = torch.relu((sn.detach() if detach else sn) + 0.4)
        return F.softplus(torch.logsumexp(80 * an * (sn - 0.4), 0) + torch.logsumexp(-80 * ap * (sp - 0.6), 0))

    return row


def lifted_distance_row(sp: Tensor, sn: Tensor) -> Tensor:
    """The loss of one row, in log space."""
    pull, push = torch.logsumexp(unlike(sp, "distance"), 0), torch.logsumexp(1 - unlike(sn, "distance"), 0)
    return torch.relu(pull + push)


CHECKED: dict[str, tuple[Any, RowLoss]] = {
    # A threshold of 0.9 on both sides cancels.
    "lifted, similarity": (
        LiftedWeighting("similarity", 0.0, 2.0, 40.0),
        lambda sp, sn: torch.relu(torch.logsumexp(2 * (0.9 - sp), 0) / 2 + torch.logsumexp(40 * (sn - 0.9), 0) / 40),
    ),
    "lifted, distance": (LiftedWeighting("distance", 1.0, 1.0, 1.0), lifted_distance_row),
    "binomial": (
        BinomialWeighting(2.0, 40.0, 0.5),
        lambda sp, sn: torch.log1p(torch.exp(2 * (0.5 - sp))).mean() + torch.log1p(torch.exp(40 * (sn - 0.5))).mean(),
    ),
    "circle": (CircleWeighting(), circle_row(True)),
    "circle, differentiated": (CircleWeighting(detach=False), circle_row(False)),
}


@pytest.mark.parametrize("name", CHECKED)
def test_weights_of_a_row_are_the_derivative(name: str) -> None:
    """One anchor with the constants with which the closed forms were first derived."""
    weighting, formula = CHECKED[name]
    sp = (0.2 + 0.7 * torch.rand(5, dtype=torch.float64)).requires_grad_()
    sn = (-0.4 + 1.2 * torch.rand(40, dtype=torch.float64)).requires_grad_()
    positive = (torch.arange(45) < 5)[None]
    value = formula(sp, sn)
    losses, weights = weighting(torch.cat((sp, sn)).detach()[None], positive, ~positive)
    torch.testing.assert_close(losses[0], value.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weights[0], torch.cat(torch.autograd.grad(value, (sp, sn))), rtol=1e-9, atol=1e-9)


def test_negatives_are_attracted_only_if_the_weight_is_differentiated() -> None:
    """The reason why `detach` is the default of the circle loss."""
    positive = torch.tensor([[True, False]])
    constant, differentiated = (
        CircleWeighting(detach=detach)(torch.tensor([[0.5, -0.2]]), positive, ~positive)[1] for detach in (True, False)
    )
    assert constant[0, 1] > 0 > differentiated[0, 1]


WEIGHTINGS = [
    LiftedWeighting("distance", 1.0, 1.0, 1.0),
    LiftedWeighting("similarity", 0.1, 2.0, 50.0),
    BinomialWeighting(2.0, 50.0),
    CircleWeighting(),
    CircleWeighting(0.25, 256.0, detach=False),
    CircleWeighting(0.0, 80.0),
]


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
def test_extreme_rows_are_finite_and_near_float64(weighting: Any) -> None:
    """Logits of several hundred overflow any exponential; the sums must stay in log space."""
    similarity, positive, negative = extremes()
    losses, weights = weighting(similarity.clone(), positive, negative)
    exact_losses, exact_weights = weighting(similarity.double(), positive, negative)
    assert losses.dtype == weights.dtype == torch.float32
    assert torch.isfinite(losses).all() and torch.isfinite(weights).all()
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.double(), exact_weights, rtol=2e-4, atol=1e-4)
    assert losses[4] == 0 and torch.equal(weights[4], torch.zeros(8))
    if not isinstance(weighting, BinomialWeighting):  # whose sides stand alone
        assert torch.equal(losses[[2, 3]], torch.zeros(2)) and torch.equal(weights[[2, 3]], torch.zeros(2, 8))


@pytest.mark.parametrize("measure", ["distance", "similarity"])
def test_extreme_rows_of_the_original_lifted_loss(measure: Any) -> None:
    """Rows without negatives have a statistic of -inf, and two of them a difference that is no number."""
    similarity, positive, negative = extremes()
    weighting = OriginalLiftedWeighting(measure, 1.0)
    results = []
    for block in (similarity, similarity.double()):
        statistics = weighting.row_statistics(block, positive, negative)
        assert torch.equal(statistics.isinf(), ~negative.any(dim=1))
        results.append(weighting(block.clone(), positive, negative, (statistics, statistics)))
    for single, double in zip(*results, strict=True):
        assert torch.isfinite(single).all()
        torch.testing.assert_close(single.double(), double, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
def test_the_masks_are_left_alone(weighting: Any) -> None:
    """S may be overwritten, the masks may not: a miner could hand out its own."""
    similarity, *masks = extremes()
    before = [mask.clone() for mask in masks]
    weighting(similarity, *masks)
    assert all(torch.equal(*pair) for pair in zip(before, masks, strict=True))


@pytest.mark.parametrize("loss", [LiftedStructureLoss(measure="distance"), BinomialDevianceLoss(), CircleLoss()])
def test_an_empty_memory_gives_no_loss(loss: PairWeightingLoss) -> None:
    """The first step with a bank may find it empty."""
    value = loss(F.normalize(torch.randn(3, 4), dim=1), torch.arange(3), torch.zeros(0, 4), torch.zeros(0).long())
    assert float(value) == 0


PEERS: dict[str, tuple[PairWeightingLoss, Any]] = {
    "lifted, generalized": (
        LiftedStructureLoss(measure="distance", margin=0.9),
        pml.GeneralizedLiftedStructureLoss(1.0, 0.1),
    ),
    "circle": (CircleLoss(0.4, 8.0), pml.CircleLoss(0.4, 8.0)),
}


@pytest.mark.parametrize("name", PEERS)
def test_equal_to_pytorch_metric_learning(name: str) -> None:
    """Who moves from that library keeps values and gradients, in-batch and against references."""
    ours, theirs = PEERS[name]
    embeddings, labels = balanced()
    batch: dict[str, Any] = {"embeddings": embeddings, "labels": labels}
    for case in (batch, {**batch, **dict(zip(("ref_emb", "ref_labels"), balanced(), strict=True))}):
        for mine, other in zip(gradients(normalized(ours), case), gradients(normalized(theirs), case), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-8)


def test_original_lifted_is_pytorch_metric_learnings_in_a_batch() -> None:
    """It averages over the ordered positive pairs, three per anchor here; against a queue it pairs up wrong rows."""
    embeddings, labels = balanced()
    ours = LiftedStructureLoss("original", measure="distance")(embeddings, labels)
    expected = pml.LiftedStructureLoss()(embeddings, labels)
    torch.testing.assert_close(ours, expected * 1.5, rtol=1e-5, atol=0)


def test_binomial_means_are_over_the_mined_pairs() -> None:
    """Over all pairs of a large memory, its few hard negatives would weigh next to nothing."""
    anchor, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    references = torch.tensor([[0.6, 0.8]] + [[0.8, 0.6]] + [[-1.0, 0.0]] * 98)
    ref_labels = torch.tensor([0] + [1] * 99)
    mined = BinomialDevianceLoss(miner=MultiSimilarityMiner(0.1))(anchor, labels, references, ref_labels)
    alone = BinomialDevianceLoss()(anchor, labels, references[:2], ref_labels[:2])
    torch.testing.assert_close(mined, alone)


def on_rank(rank: int, ranks: int) -> tuple[float, Any]:
    """Value and gradient of the own part of a batch."""
    embeddings, labels, indices = spread()
    rows = slice(0, 5) if rank == 0 else slice(5, 16)
    leaf = embeddings.requires_grad_()
    value = LiftedStructureLoss("original", measure="distance")(leaf[rows], labels[rows], indices=indices[rows])
    (gradient,) = torch.autograd.grad(value / ranks, leaf)
    return float(value.detach()), gradient.numpy()


def spread() -> tuple[Tensor, Tensor, Tensor]:
    """A batch of two uneven ranks, with classes on both and a sample that occurs twice."""
    generator = torch.Generator().manual_seed(1)
    embeddings = F.normalize(torch.randn(16, 6, dtype=torch.float64, generator=generator), dim=1)
    return embeddings, torch.arange(16) % 5, torch.arange(16) % 13


def test_original_lifted_on_two_ranks() -> None:
    """A pair across ranks needs the statistic of a row that another rank has."""
    embeddings, labels, indices = spread()
    value, gradient = gradients(
        LiftedStructureLoss("original", measure="distance"),
        {"embeddings": embeddings, "labels": labels, "indices": indices},
    )
    results = run_ranks(2, on_rank)
    assert [part for part, _ in results] == pytest.approx([float(value)] * 2)
    np.testing.assert_allclose(sum(part for _, part in results), gradient.numpy(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LiftedStructureLoss("lifted"), "variant.*generalized, original.*'lifted'"),  # type: ignore[arg-type]
        (lambda: LiftedStructureLoss(measure="cosine"), "measure.*similarity, distance, got 'cosine'"),  # type: ignore[arg-type]
        (lambda: LiftedWeighting("cosine"), "measure.*similarity, distance, got 'cosine'"),  # type: ignore[arg-type]
        (lambda: LiftedStructureLoss(margin=float("nan")), "margin.*nan"),
        (lambda: LiftedStructureLoss(alpha=0), "alpha.*greater than 0.*got 0"),
        (lambda: LiftedStructureLoss("original", beta=2.0), "beta.*got 2.0.*generalized"),
        (lambda: LiftedStructureLoss("original")(*balanced(), *balanced()), "in-batch only.*variant"),
        (lambda: OriginalLiftedWeighting()(*extremes()), "statistics.*None"),
        (lambda: BinomialDevianceLoss(beta=-40), "beta.*got -40"),
        (lambda: BinomialDevianceLoss(base=float("inf")), "base.*inf"),
        (lambda: CircleLoss(margin=1.5), r"margin.*at most 1.*1\.5"),
        (lambda: CircleLoss(gamma=0), "gamma.*got 0"),
    ],
)
def test_wrong_settings_are_named(call: Callable[[], object], words: str) -> None:
    """An error names the argument, the value and what to give instead."""
    with pytest.raises(InputError, match=words):
        call()


def test_printed_losses_show_their_settings() -> None:
    """A log of a run should tell which margin it had."""
    assert all(name in repr(LiftedStructureLoss()) for name in ("'similarity'", "margin=0.0", "alpha=2.0"))
    on_distance = repr(LiftedStructureLoss(measure="distance"))
    assert all(name in on_distance for name in ("'distance'", "margin=1.0", "alpha=1.0"))
    assert "margin=0.2" in repr(LiftedStructureLoss("original", margin=0.2))
    assert "beta=40.0" in repr(BinomialDevianceLoss()) and "detach=True" in repr(CircleLoss())
