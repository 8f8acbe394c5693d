"""N-pair, NT-Xent, tuplet margin, SupCon and NCA against slow textbooks, float64 and a peer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_metric_learning.losses as pml
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_dml.errors import InputError
from lightning_dml.losses.base import PairWeightingLoss
from lightning_dml.losses.mining import MultiSimilarityMiner
from lightning_dml.losses.softmax_losses import NCALoss, NPairLoss, NTXentLoss, SupConLoss, TupletMarginLoss
from lightning_dml.losses.weighting.distance import MIN_DISTANCE
from lightning_dml.losses.weighting.softmax import (
    NCAWeighting,
    NPairWeighting,
    SupConWeighting,
    TupletMarginWeighting,
)
from tests.losses import oracle
from tests.losses.cases import balanced, extremes, normalized
from tests.losses.oracle import RowLoss, batches, gradients, nothing
from tests.tolerances import rounding


def n_pair(scale: float, mean: bool = True, margin: float = 0.0) -> RowLoss:
    """The loss of each positive against the negatives, with a margin on its angle in radians."""

    def row(sp: Tensor, sn: Tensor) -> Tensor:
        total = nothing(sp, sn)
        for s in sp:
            if margin:
                if 1 - s**2 > MIN_DISTANCE**2:
                    s = torch.cos(torch.acos(s) - margin)
                else:
                    s = s * math.cos(margin) + MIN_DISTANCE * math.sin(margin)
            total = total + torch.log1p(sum(torch.exp(scale * (n - s)) for n in sn) + 0 * s)
        return total / len(sp) if mean and len(sp) else total

    return row


def sup_con(temperature: float) -> RowLoss:
    """Log softmax over positives and negatives, averaged over the positives."""

    def row(sp: Tensor, sn: Tensor) -> Tensor:
        total = nothing(sp, sn)
        denominator = sum(torch.exp(s / temperature) for s in torch.cat((sp, sn)))
        for s in sp:
            total = total - torch.log(torch.exp(s / temperature) / denominator) / len(sp)
        return total

    return row


def nca(scale: float) -> RowLoss:
    """Minus the log probability of a positive."""

    def row(sp: Tensor, sn: Tensor) -> Tensor:
        if len(sp) == 0:
            return nothing(sp, sn)
        numerator = torch.exp(scale * sp).sum()
        return -torch.log(numerator / (numerator + torch.exp(scale * sn).sum()))

    return row


CASES: dict[str, tuple[PairWeightingLoss, RowLoss, Any]] = {
    "n-pair": (NPairLoss(), n_pair(16.0), None),
    "n-pair, sum": (NPairLoss(5.0, positives="sum"), n_pair(5.0, mean=False), None),
    "n-pair, mined": (NPairLoss(miner=MultiSimilarityMiner(0.1)), n_pair(16.0), oracle.mine_relative(0.1)),
    "nt-xent": (NTXentLoss(), n_pair(1 / 0.07), None),
    "nt-xent, sum": (NTXentLoss(0.5, positives="sum"), n_pair(2.0, mean=False), None),
    "tuplet margin": (TupletMarginLoss(), n_pair(64.0, margin=math.radians(5.73)), None),
    "tuplet margin, sum": (TupletMarginLoss(8.0, 20.0, positives="sum"), n_pair(8.0, False, math.radians(20.0)), None),
    "supcon": (SupConLoss(), sup_con(0.1), None),
    "supcon, mined": (SupConLoss(0.3, miner=MultiSimilarityMiner(0.2)), sup_con(0.3), oracle.mine_relative(0.2)),
    "nca": (NCALoss(), nca(2.0), None),
    "nca, sharp": (NCALoss(16.0), nca(16.0), None),
}


@pytest.mark.parametrize("name", CASES)
@given(batch=batches(), block=st.sampled_from([1, 100, 2**20]))
def test_value_and_gradient_equal_the_textbook(name: str, batch: dict[str, Any], block: int) -> None:
    """A closed form is worth nothing unless it is the derivative, for rows that lack a side as well."""
    loss, row_loss, mine = CASES[name]
    loss.block_bytes = block
    oracle.assert_textbook(loss, row_loss, batch, mine)


CHECKED: dict[str, tuple[Any, RowLoss, int]] = {
    "n-pair": (NPairWeighting(16.0), lambda sp, sn: torch.log1p(torch.exp(16 * (sn - sp[0])).sum()), 1),
    "nca": (
        NCAWeighting(8.0),
        lambda sp, sn: torch.logsumexp(8 * torch.cat((sp, sn)), 0) - torch.logsumexp(8 * sp, 0),
        5,
    ),
    "nt-xent": (
        NPairWeighting(10.0, positives="sum"),
        lambda sp, sn: (torch.log(torch.exp(sp / 0.1) + torch.exp(sn / 0.1).sum()) - sp / 0.1).sum(),
        5,
    ),
    "supcon": (
        SupConWeighting(0.1),
        lambda sp, sn: -(sp / 0.1 - torch.logsumexp(torch.cat((sp, sn)) / 0.1, 0)).mean(),
        5,
    ),
    "tuplet margin": (
        TupletMarginWeighting(64.0, math.degrees(0.1)),
        lambda sp, sn: torch.log1p(torch.exp(64 * (sn - torch.cos(torch.acos(sp[0]) - 0.1))).sum()),
        1,
    ),
}


@pytest.mark.parametrize("name", CHECKED)
def test_weights_of_a_row_are_the_derivative(name: str) -> None:
    """One anchor with the constants with which the closed forms were first derived."""
    weighting, formula, positives = CHECKED[name]
    sp = (0.2 + 0.7 * torch.rand(positives, dtype=torch.float64)).requires_grad_()
    sn = (-0.4 + 1.2 * torch.rand(40, dtype=torch.float64)).requires_grad_()
    positive = (torch.arange(positives + 40) < positives)[None]
    value = formula(sp, sn)
    losses, weights = weighting(torch.cat((sp, sn)).detach()[None], positive, ~positive)
    torch.testing.assert_close(losses[0], value.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weights[0], torch.cat(torch.autograd.grad(value, (sp, sn))), rtol=1e-9, atol=1e-9)


def test_a_positive_with_more_than_its_share_is_pushed() -> None:
    """Signed weights are the reason why nothing here takes absolute values."""
    _, weights = SupConWeighting(0.1)(
        torch.tensor([[0.9, 0.1, 0.0]]), torch.tensor([[True, True, False]]), torch.tensor([[False, False, True]])
    )
    assert weights[0, 0] > 0 > weights[0, 1]


@pytest.mark.parametrize("edge", [1.0, -1.0])
def test_tuplet_margin_has_the_slope_of_its_value_at_the_ends(edge: float) -> None:
    """The factor sin(th - be) / sin(th) is infinite there; equal vectors must not be thrown apart by it."""
    positive = torch.tensor([[True, False]])
    weighting = TupletMarginWeighting(2.0, 20.0)
    row = torch.tensor([[edge, 0.7]], dtype=torch.float64)
    step = torch.tensor([[1e-8, 0.0]], dtype=torch.float64)
    _, weights = weighting(row.clone(), positive, ~positive)
    above, below = (weighting(moved, positive, ~positive)[0] for moved in (row + step, row - step))
    torch.testing.assert_close(weights[0, 0], ((above - below) / 2e-8)[0], rtol=1e-6, atol=0)
    assert -2 <= float(weights[0, 0]) < 0


WEIGHTINGS = [
    NPairWeighting(64.0),
    NPairWeighting(1 / 0.07, positives="sum"),
    TupletMarginWeighting(64.0),
    SupConWeighting(0.02),
    NCAWeighting(64.0),
]


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
def test_extreme_rows_are_finite_and_near_float64(weighting: Any) -> None:
    """e^64 overflows half of float32's range when squared; the sums must stay in log space."""
    similarity, positive, negative = extremes()
    losses, weights = weighting(similarity.clone(), positive, negative)
    exact_losses, exact_weights = weighting(similarity.double(), positive, negative)
    assert losses.dtype == weights.dtype == torch.float32
    assert torch.isfinite(losses).all() and torch.isfinite(weights).all()
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.double(), exact_weights, rtol=2e-4, atol=1e-4)
    assert torch.equal(losses[[2, 4]], torch.zeros(2)) and torch.equal(weights[[2, 4]], torch.zeros(2, 8))


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
def test_the_masks_are_left_alone(weighting: Any) -> None:
    """S may be overwritten, the masks may not: a miner could hand out its own."""
    similarity, *masks = extremes()
    before = [mask.clone() for mask in masks]
    weighting(similarity, *masks)
    assert all(torch.equal(*pair) for pair in zip(before, masks, strict=True))


@pytest.mark.parametrize("loss", [NPairLoss(), TupletMarginLoss(), SupConLoss(), NCALoss()])
def test_an_empty_memory_gives_no_loss(loss: PairWeightingLoss) -> None:
    """The first step with a bank may find it empty."""
    value = loss(F.normalize(torch.randn(3, 4), dim=1), torch.arange(3), torch.zeros(0, 4), torch.zeros(0).long())
    assert float(value) == 0


PEERS: dict[str, tuple[PairWeightingLoss, Any]] = {
    "nt-xent": (NTXentLoss(0.2), pml.NTXentLoss(0.2)),
    "tuplet margin": (TupletMarginLoss(), pml.TupletMarginLoss(5.73, 64)),
    "supcon": (SupConLoss(0.1), pml.SupConLoss(0.1)),
    "nca": (NCALoss(4.0), pml.NCALoss(softmax_scale=2)),
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


def test_n_pairs_of_pytorch_metric_learning_are_one_pair_of_each_class() -> None:
    """It draws the first pair of each class; those anchors against those positives are our loss."""
    embeddings, labels = balanced()
    expected = pml.NPairsLoss()(embeddings, labels)
    ours = NPairLoss(scale=1.0)(embeddings[:6], labels[:6], embeddings[6:12], labels[6:12])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)


def test_nca_leaves_out_the_own_copy_in_a_memory() -> None:
    """pytorch-metric-learning counts it as a positive, the easiest there is, and the loss all but vanishes."""
    embeddings, labels = balanced()
    indices = torch.arange(24)
    ours = NCALoss(16.0)(embeddings, labels, embeddings, labels, indices=indices, ref_indices=indices)
    torch.testing.assert_close(ours, NCALoss(16.0)(embeddings, labels))
    assert float(pml.NCALoss(8)(embeddings, labels, ref_emb=embeddings.clone(), ref_labels=labels)) < 0.5 * float(ours)


def test_one_positive_and_one_negative_pair_have_a_loss() -> None:
    """pytorch-metric-learning returns 0 for exactly one pair of each kind."""
    anchor, references = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.8, 0.6], [0.6, 0.8]])
    labels = torch.tensor([0, 1])
    ours = NTXentLoss(0.5)(anchor, labels[:1], references, labels)
    torch.testing.assert_close(ours, torch.log1p(torch.exp(torch.tensor((0.6 - 0.8) / 0.5))))
    assert float(NCALoss(2.0)(anchor, labels[:1], references, labels)) == pytest.approx(
        float(ours),
        rel=rounding(2 * 2 + 8),  # similarities of two products at rate 2; sums, exponentials, logarithms
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: NPairLoss(scale=0), "scale.*greater than 0.*got 0"),
        (lambda: NPairLoss(positives="max"), "positives.*mean, sum.*'max'"),  # type: ignore[arg-type]
        (lambda: NTXentLoss(temperature=-0.1), r"temperature.*such as 0\.1.*-0\.1"),
        (lambda: NTXentLoss(temperature=0), "temperature.*got 0"),
        (lambda: TupletMarginLoss(margin=-1), "margin.*degrees.*got -1"),
        (lambda: TupletMarginLoss(scale=float("inf")), "scale.*got inf"),
        (lambda: SupConLoss(temperature=float("nan")), "temperature.*nan"),
        (lambda: NCALoss(scale=-2), "scale.*got -2"),
    ],
)
def test_wrong_settings_are_named(call: Callable[[], object], words: str) -> None:
    """An error names the argument, the value and what to give instead."""
    with pytest.raises(InputError, match=words):
        call()


def test_printed_losses_show_their_settings() -> None:
    """A log of a run should tell which temperature it had."""
    assert "temperature=0.07" in repr(NTXentLoss())
    assert all(name in repr(TupletMarginLoss(positives="sum")) for name in ("scale=64.0", "margin=5.73", "'sum'"))
    assert "temperature=0.1" in repr(SupConLoss()) and "scale=2.0" in repr(NCALoss())
