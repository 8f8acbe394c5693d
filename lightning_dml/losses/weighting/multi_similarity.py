"""The weighting of the multi-similarity loss."""

from __future__ import annotations

from torch import Tensor

from lightning_dml.checks import check_number
from lightning_dml.losses.weighting.base import Weighting
from lightning_dml.losses.weighting.rows import Positives, row_softmax, side_softmax


class MultiSimilarityWeighting(Weighting):
    r"""Softmax-with-one weights on both sides; see `MultiSimilarityLoss`."""

    def __init__(self, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5) -> None:
        super().__init__()
        for name, value in (("alpha", alpha), ("beta", beta)):
            check_number(name, value, "the sharpness of an exponential such as 2.0", above=0)
        check_number("base", base, "a similarity such as 0.5")
        self.alpha = alpha
        self.beta = beta
        self.base = base

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form."""
        pairs = Positives.of(similarity, positive)
        push = row_softmax(similarity.sub_(self.base).mul_(self.beta), negative, with_one=True)
        pull = side_softmax(pairs, (self.base - pairs.values) * self.alpha, with_one=True)
        weights = push.shares()
        weights[pairs.row, pairs.column] = -pull.shares()[pairs.row, pairs.slot]
        return pull.log_sum / self.alpha + push.log_sum / self.beta, weights

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"alpha={self.alpha}, beta={self.beta}, base={self.base}"
