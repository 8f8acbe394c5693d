"""Weightings of the contrastive family: each pair by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dml.errors import InputError
from lightning_dml.losses.weighting.base import Weighting


class ContrastiveWeighting(Weighting):
    r"""Weight 1 on positives, and 1 on negatives above the margin; see `ContrastiveLoss`."""

    separable = True

    def __init__(self, margin: float = 0.5, pos_margin: float | None = None) -> None:
        super().__init__()
        for name, value in (("margin", margin), ("pos_margin", pos_margin)):
            if value is not None and not -1 <= value <= 1:
                raise InputError(f"{name} is a cosine similarity and must lie in [-1, 1], got {value}")
        self.margin = margin
        self.pos_margin = pos_margin

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form."""
        excess = (similarity - self.margin).relu_().mul_(negative)
        weights = torch.sign(excess)
        losses = excess.sum(dim=1)
        # Positives are few: picking them out is cheaper than another pass over the block.
        row, column = positive.nonzero(as_tuple=True)
        shortfall = (1.0 if self.pos_margin is None else self.pos_margin) - similarity[row, column]
        pull = torch.ones_like(shortfall)
        if self.pos_margin is not None:
            shortfall = shortfall.relu()
            pull = torch.sign(shortfall)
        losses.index_add_(0, row, shortfall)
        weights[row, column] = -pull
        return losses, weights

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        return f"margin={self.margin}, pos_margin={self.pos_margin}"
