"""The weights of a real batch, and the weight curves that its points lie on: both per anchor, without the reduction."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_dml.errors import InputError
from lightning_dml.losses import Context, ObservedWeights, PairWeightingLoss, weight_curve
from lightning_dml.losses.calling import Rows
from lightning_dml.losses.inspection.weight_curves import DRAWS, draws_pairs
from lightning_dml.losses.labels import PairLabels
from lightning_dml.losses.weighting.row_weights import MeasuredWeights
from lightning_dml.report.curve_figure import DrawnCurve
from lightning_dml.report.pair_observation import observe

ENTRIES = 4_000_000
"""The most similarities that a curve's rows hold at a time."""


class AnchorContext(NamedTuple):
    """The other pairs of an anchor of a batch, one pair less on the side whose curve is asked for.

    Attributes:
        positive: of a positive: all positives of the anchor but one, and all negatives.
        negative: of a negative: all negatives but one, and all positives.
        text: describes the anchor, for a caption.
    """

    positive: Context
    negative: Context
    text: str


def per_anchor(loss: nn.Module, batch: Rows, references: Rows | None) -> ObservedWeights | None:
    """The weights of all pairs of a batch on the scale of `weight_curve`, times its anchors; forces with the reduction.

    A loss of ours is asked without its own reduction: weights over the number of pairs would lie far below the curve.

    Args:
        loss: one of ours or another library's, whose own mean over a batch stays.
        batch: N rows.
        references: rows of a bank; None for in-batch.

    Returns:
        None where the loss gets no rows to work on.
    """
    observed = observe(loss, batch, references, [len(batch.labels)])
    if observed is None or not isinstance(loss, PairWeightingLoss) or loss.reduction == "anchors":
        return observed
    plain = copy.deepcopy(loss)
    plain.reduction = "anchors"
    unreduced = observe(plain, batch, references, [len(batch.labels)])
    assert unreduced is not None
    return replace(
        unreduced,
        positives=replace(unreduced.positives, force=observed.positives.force),
        negatives=replace(unreduced.negatives, force=observed.negatives.force),
    )


def typical_context(batch: Rows, references: Rows | None) -> AnchorContext | None:
    """The other pairs of the anchor whose mean similarity to its positives is the median of the batch.

    Args:
        batch: N rows.
        references: rows of a bank; None for in-batch.

    Returns:
        None where no anchor has a positive and a negative.
    """
    if references is None:
        columns, pairs = batch, PairLabels(batch.labels, batch.labels, batch.indices, batch.indices, own_column=0)
    else:
        columns = references
        pairs = PairLabels(batch.labels, references.labels, batch.indices, references.indices)
    similarity = (batch.embeddings.double() @ columns.embeddings.double().T).clamp(-1, 1)
    positive, negative = pairs.masks(slice(0, len(batch.labels)), slice(0, len(columns.labels)))
    anchors = (positive.any(dim=1) & negative.any(dim=1)).nonzero()[:, 0]
    if not len(anchors):
        return None
    means = (similarity * positive).sum(dim=1)[anchors] / positive.sum(dim=1)[anchors]
    anchor = anchors[means.argsort()[(len(means) - 1) // 2]]
    own = similarity[anchor]
    pulled, pushed = own[positive[anchor]].sort().values.tolist(), own[negative[anchor]].sort().values.tolist()
    return AnchorContext(
        Context(_less_median(pulled), pushed),
        Context(pulled, _less_median(pushed)),
        f"the batch's median anchor ({_described(pulled, 'positive')}, {_described(pushed, 'negative')})",
    )


def curve_on_the_batch(loss: nn.Module, similarity: Tensor, context: AnchorContext | None) -> tuple[DrawnCurve, str]:
    """The curve that the points of a batch lie on or about, and at which context it stands; "" for at none.

    The points of a loss on single pairs lie on its curve. The curve of any other loss is that of one anchor of the
    batch, whose points lie on it; those of other anchors lie about it.

    Args:
        loss: one of ours.
        similarity: (n,) float64 ascending, within [-1, 1].
        context: that of the anchor; None takes `Context()`.

    Raises:
        InputError: for another library's loss, whose mean over a batch is on another scale, and see `weight_curve`.
    """
    if not isinstance(loss, PairWeightingLoss):
        raise InputError(
            "another library's loss takes a mean of its own over a batch, so that the weights there are on another "
            "scale than the curve of an anchor; leave --training out for the curve"
        )
    if loss.weighting.separable and (loss.miner is None or loss.miner.separable):
        return DrawnCurve.of(loss, similarity), ""
    # A loss that is measured makes a matrix of the context's pairs, which are thousands against a bank.
    if context is None or any(isinstance(module, MeasuredWeights) for module in loss.modules()):
        return DrawnCurve.of(loss, similarity, Context()), f"an anchor with {Context()}"
    positive, negative = (
        torch.cat([weight_curve(loss, part, context=pairs)[side] for part in _parts(loss, similarity, pairs)])
        for side, pairs in enumerate((context.positive, context.negative))
    )
    return DrawnCurve(similarity, positive, negative), context.text


def _parts(loss: nn.Module, similarity: Tensor, context: Context) -> Iterable[Tensor]:
    row = (1 + len(context.positives) + len(context.negatives)) * (DRAWS if draws_pairs(loss) else 1)
    return torch.split(similarity, max(1, ENTRIES // row))


def _less_median(values: list[float]) -> list[float]:
    middle = len(values) // 2
    return values[:middle] + values[middle + 1 :]


def _described(values: list[float], name: str) -> str:
    return f"{len(values):,} {name}{'s' * (len(values) > 1)} from {values[0]:.2f} to {values[-1]:.2f}"
