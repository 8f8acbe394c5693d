"""Weightings of the lifted structure loss: soft hardest positive against soft hardest negative."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dml.checks import check_number
from lightning_dml.errors import InputError
from lightning_dml.losses.measure import UnsquaredMeasure, check_unsquared_measure
from lightning_dml.losses.weighting.base import ChunkedWeighting, Weighting
from lightning_dml.losses.weighting.distance import distance_and_slope_, distances
from lightning_dml.losses.weighting.rows import Positives, row_softmax, side_softmax


class LiftedWeighting(ChunkedWeighting):
    """Softmax weights of each side while the row's hinge is open; see `LiftedStructureLoss`."""

    def __init__(
        self, measure: UnsquaredMeasure = "similarity", margin: float = 0.0, alpha: float = 2.0, beta: float = 40.0
    ) -> None:
        super().__init__()
        check_unsquared_measure(measure)
        check_number("margin", margin, "a number in the units of the measure, such as 1.0")
        for name, value in (("alpha", alpha), ("beta", beta)):
            check_number(name, value, "the sharpness of an exponential such as 1.0", above=0)
        self.measure: UnsquaredMeasure = measure
        self.margin = margin
        self.alpha = alpha
        self.beta = beta

    def chunk(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form."""
        closeness, slope = _closeness_(similarity, self.measure)
        pairs = Positives.of(closeness, positive)
        push = row_softmax(closeness.mul_(self.beta), negative)
        pull = side_softmax(pairs, -self.alpha * pairs.values)
        # -inf where a side is empty: the hinge is closed.
        losses = (pull.log_sum / self.alpha).add_(push.log_sum / self.beta).add_(self.margin).relu_()
        active = torch.sign(losses)
        weights = push.shared(active)
        weights[pairs.row, pairs.column] = -pull.shared(active)[pairs.row, pairs.slot]
        return losses, weights if slope is None else weights.mul_(slope)

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"measure={self.measure!r}, margin={self.margin}, alpha={self.alpha}, beta={self.beta}"


class OriginalLiftedWeighting(Weighting):
    r"""Weights of each positive pair against the negatives of both its ends; see `LiftedStructureLoss`.

    The rows of a batch are coupled: the pair's J needs :math:`E_i = \log \sum_{k \in N_i} e^{M - u_{ik}}` of both ends,
    which is the row statistic. An ordered pair has :math:`\frac14 [J_{ij}]_+^2`, so that an unordered one has half of
    J's square. Row i holds the weights of its own negatives for both orders,
    :math:`\sum_{j \in P_i} [J_{ij}]_+ \, \sigma(E_i - E_j)` shared by softmax, and half of each positive's
    :math:`[J_{ij}]_+`, the other half of which is in row j.

    This is the gradient of the loss wherever a pair is kept in both orders, as without a miner and with one that looks
    at a pair's own similarity; a miner that keeps (i, j) without (j, i) still selects the pairs of these weights.
    """

    def __init__(self, measure: UnsquaredMeasure = "similarity", margin: float = 0.0) -> None:
        super().__init__()
        check_unsquared_measure(measure)
        check_number("margin", margin, "a number in the units of the measure, such as 1.0")
        self.measure: UnsquaredMeasure = measure
        self.margin = margin

    def row_statistics(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Log-sum-exp of each anchor's negatives, (n,); -inf without any."""
        closeness = similarity if self.measure == "similarity" else -distances(similarity)
        return torch.logsumexp(closeness.masked_fill(~negative, -torch.inf), dim=1) + self.margin

    def forward(
        self,
        similarity: Tensor,
        positive: Tensor,
        negative: Tensor,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form, from the statistics of the block's and of all rows."""
        if statistics is None:
            raise InputError("statistics must be those of the block's anchors and of all references, got None")
        own, everyone = statistics
        closeness, slope = _closeness_(similarity, self.measure)
        pairs = Positives.of(closeness, positive)
        here, there = own[pairs.row], everyone[pairs.column]
        violation = torch.logaddexp(here, there).sub_(pairs.values).relu_()
        # Where neither end has negatives their difference is no number; the violation is 0 there.
        share = torch.sigmoid(here - there).masked_fill_(violation == 0, 0)
        push = row_softmax(closeness, negative)
        weights = push.shared(pairs.sums(violation * share))
        weights[pairs.row, pairs.column] = violation / -2
        return pairs.sums(violation.square() / 4), weights if slope is None else weights.mul_(slope)

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"measure={self.measure!r}, margin={self.margin}"


def _closeness_(similarity: Tensor, measure: UnsquaredMeasure) -> tuple[Tensor, Tensor | None]:
    """S or -d in the memory of S, and its derivative by S; None for 1."""
    if measure == "similarity":
        return similarity, None
    distance, slope = distance_and_slope_(similarity)
    return distance.neg_(), slope
