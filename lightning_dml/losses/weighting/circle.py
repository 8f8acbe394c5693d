"""The weighting of the circle loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dml.checks import check_number
from lightning_dml.losses.weighting.base import ChunkedWeighting
from lightning_dml.losses.weighting.rows import Positives, row_softmax, side_softmax, softplus


class CircleWeighting(ChunkedWeighting):
    """Softmax weights of each side, times how far a pair is from its optimum; see `CircleLoss`."""

    def __init__(self, margin: float = 0.4, gamma: float = 80.0, *, detach: bool = True) -> None:
        super().__init__()
        check_number("margin", margin, "a relaxation of cosine similarities such as 0.4", least=0, most=1)
        check_number("gamma", gamma, "the scale of the logits such as 80.0", above=0)
        self.margin = margin
        self.gamma = gamma
        self.detach = detach

    def chunk(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form."""
        pairs = Positives.of(similarity, positive)
        lacking = (1 + self.margin - pairs.values).relu_()
        exceeding = (similarity + self.margin).relu_()
        pull = side_softmax(pairs, (1 - self.margin - pairs.values).mul_(self.gamma).mul_(lacking))
        push = row_softmax(similarity.sub_(self.margin).mul_(self.gamma).mul_(exceeding), negative)

        excess = push.log_sum + pull.log_sum  # -inf where a side is empty
        total = self.gamma * torch.sigmoid(excess)
        pull_slope, push_slope = lacking, exceeding
        if not self.detach:
            # 0 where the factor is 0, else twice the factor less the margin.
            pull_slope, push_slope = (
                F.threshold(factor, 0, self.margin, inplace=True).sub_(self.margin).mul_(2)
                for factor in (lacking, exceeding)
            )
        weights = push.shared(total).mul_(push_slope)
        weights[pairs.row, pairs.column] = -pull.shared(total)[pairs.row, pairs.slot] * pull_slope
        return softplus(excess), weights

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"margin={self.margin}, gamma={self.gamma}, detach={self.detach}"
