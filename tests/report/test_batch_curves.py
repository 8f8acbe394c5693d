"""Curves that stand at an anchor of a batch: that anchor's points lie on them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_dml.errors import InputError
from lightning_dml.losses import (
    BinomialDevianceLoss,
    CircleLoss,
    Context,
    MultiSimilarityLoss,
    NTXentLoss,
    PairWeightingLoss,
    SupConLoss,
    TripletLoss,
    pair_weights,
)
from lightning_dml.losses.calling import Rows
from lightning_dml.report.batch_curves import curve_on_the_batch, per_anchor, typical_context

WHOLE_ROWS: dict[str, PairWeightingLoss] = {
    "binomial deviance": BinomialDevianceLoss(),
    "circle": CircleLoss(),
    "multi-similarity": MultiSimilarityLoss(),
    "NT-Xent": NTXentLoss(),
    "SupCon": SupConLoss(),
    "triplet": TripletLoss(margin=0.3),
}


def rows(count: int, classes: int, first: int = 0) -> Rows:
    """Unit rows in float64 with labels in turn and indices of their own."""
    embeddings = F.normalize(torch.randn(count, 6, dtype=torch.float64), dim=1)
    return Rows(embeddings, torch.arange(count) % classes, torch.arange(first, first + count))


@pytest.mark.parametrize("against", ["a bank", "itself"])
@pytest.mark.parametrize("name", WHOLE_ROWS)
def test_the_anchors_points_lie_on_its_curve(name: str, against: str) -> None:
    """At a context of its own the curve of a triplet lay at nearly 0, and the points of the batch floated above it."""
    loss = WHOLE_ROWS[name]
    batch, bank = rows(9, 3), rows(60, 3, first=100) if against == "a bank" else None
    context = typical_context(batch, bank)
    assert context is not None
    columns = batch if bank is None else bank
    similarity = batch.embeddings @ columns.embeddings.T
    pulled, pushed = sorted(context.negative.positives), sorted(context.positive.negatives)
    anchor = next(
        place
        for place in range(9)
        if torch.allclose(
            similarity[place][columns.labels != batch.labels[place]].sort().values, similarity.new_tensor(pushed)
        )
    )
    assert f"{len(pulled)} positives from {pulled[0]:.2f} to {pulled[-1]:.2f}" in context.text
    references = (None, None) if bank is None else (bank.embeddings, bank.labels)
    weights = pair_weights(loss, batch.embeddings, batch.labels, *references)[anchor] * 9
    for side, values, sign in ((0, pulled, -1.0), (1, pushed, 1.0)):
        # The pair that is left out of the context is at the median of its side.
        middle = values[len(values) // 2]
        curve, text = curve_on_the_batch(loss, similarity.new_tensor([middle]), context)
        assert text == context.text
        place = int((similarity[anchor] - middle).abs().argmin())
        drawn = float((curve.positive, curve.negative)[side])
        assert drawn == pytest.approx(sign * float(weights[place]), rel=1e-6, abs=1e-9)


def test_a_long_context_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four hundred rows of a large bank at a time would take gigabytes."""
    batch, bank = rows(9, 3), rows(60, 3, first=100)
    context, similarity = typical_context(batch, bank), torch.linspace(-1, 1, 21, dtype=torch.float64)
    whole, _ = curve_on_the_batch(MultiSimilarityLoss(), similarity, context)
    monkeypatch.setattr("lightning_dml.report.batch_curves.ENTRIES", 130)
    parts, _ = curve_on_the_batch(MultiSimilarityLoss(), similarity, context)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_a_batch_without_pairs_has_the_stated_context() -> None:
    """There is no anchor to take; the caption must not name one."""
    batch = Rows(rows(3, 3).embeddings, torch.arange(3), torch.arange(3))
    assert typical_context(batch, None) is None
    similarity = torch.linspace(-1, 1, 21, dtype=torch.float64)
    curve, text = curve_on_the_batch(MultiSimilarityLoss(), similarity, None)
    assert text == f"an anchor with {Context()}" and bool(curve.positive.any())


def test_the_reduction_is_in_the_force_and_not_in_the_points() -> None:
    """The force is that of the training, and the points are on the scale of a curve."""
    batch = rows(9, 3)
    plain, reduced = (per_anchor(SupConLoss(reduction=name), batch, None) for name in ("anchors", "pairs"))
    assert plain is not None and reduced is not None
    assert torch.equal(plain.negatives.weight, reduced.negatives.weight)
    weights = pair_weights(SupConLoss(reduction="pairs"), batch.embeddings, batch.labels)
    pushed = batch.labels[:, None] != batch.labels
    assert reduced.negatives.force == pytest.approx(float(weights[pushed].sum()))
    assert reduced.negatives.force != pytest.approx(plain.negatives.force)


def test_another_librarys_loss_has_no_curve_on_a_batch() -> None:
    """Its mean over a batch is its own, so that no scale is known on which both would lie."""
    with pytest.raises(InputError, match="a mean of its own"):
        curve_on_the_batch(nn.Identity(), torch.zeros(1, dtype=torch.float64), None)
