"""Weightings of the contrastive family: each pair by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dml.checks import check_number
from lightning_dml.losses.curves import unit_step, unit_step_
from lightning_dml.losses.weighting.base import Weighting
from lightning_dml.losses.weighting.rows import Positives


class ContrastiveWeighting(Weighting):
    r"""Weight 1 on positives, and 1 on negatives above the margin; see `ContrastiveLoss`."""

    separable = True

    def __init__(self, margin: float = 0.5, pos_margin: float | None = None) -> None:
        super().__init__()
        for name, value in (("margin", margin), ("pos_margin", pos_margin)):
            if value is not None:
                check_number(name, value, "a cosine similarity such as 0.5", least=-1, most=1)
        self.margin = margin
        self.pos_margin = pos_margin

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form."""
        pairs = Positives.of(similarity, positive)
        if self.pos_margin is None:
            shortfall, pull = 1 - pairs.values, torch.ones_like(pairs.values)
        else:
            shortfall = (self.pos_margin - pairs.values).relu_()
            pull = unit_step(shortfall)
        # In place: the block itself becomes the weights.
        excess = similarity.sub_(self.margin).relu_().masked_fill_(~negative, 0)
        losses = excess.sum(dim=1) + pairs.sums(shortfall)
        weights = unit_step_(excess)
        weights[pairs.row, pairs.column] = -pull
        return losses, weights

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"margin={self.margin}, pos_margin={self.pos_margin}"
