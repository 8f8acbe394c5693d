"""Pairs weighting: the signed weight dL/dS of each kept pair (second half of arXiv 1905.12837).

Weights are signed as derivatives are: positive on pairs that the loss pushes apart, negative on pairs that it
pulls together. Some losses change the sign within a set, so nothing here takes absolute values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_dml.errors import InputError
from lightning_dml.losses.curves import WeightCurve


class Weighting(nn.Module):
    """Row losses and pair weights of a block of the similarity matrix.

    A subclass gives either `row_losses` alone, the textbook formula, which is then differentiated by autograd
    block by block, or `forward` with a closed form of the derivative as well.
    """

    def row_losses(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Loss of each anchor.

        Args:
            similarity: (n, M) float32 or float64.
            positive: (n, M) bool, the kept positives.
            negative: (n, M) bool, the kept negatives.

        Returns:
            (n,), differentiable with respect to `similarity`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define row_losses or forward")

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and their derivative with respect to the similarities, (n, M), of the same dtype."""
        with torch.enable_grad():
            leaf = similarity.detach().requires_grad_()
            losses = self.row_losses(leaf, positive, negative)
            if not losses.requires_grad:  # no pair took part
                return losses, torch.zeros_like(similarity)
            (weights,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), weights


class ContrastiveWeighting(Weighting):
    r"""Weight 1 on positives, and 1 on negatives above the margin; see `ContrastiveLoss`."""

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


class MultiSimilarityWeighting(Weighting):
    r"""Softmax-with-one weights on both sides; see `MultiSimilarityLoss`."""

    def __init__(self, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5) -> None:
        super().__init__()
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} is the sharpness of an exponential and must be positive, got {value}")
        if not math.isfinite(base):
            raise InputError(f"base must be a finite similarity such as 0.5, got {base}")
        self.alpha = alpha
        self.beta = beta
        self.base = base

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form."""
        offset = similarity - self.base
        pull, pulled = _softmax_with_one((-self.alpha * offset).masked_fill_(~positive, -torch.inf))
        push, pushed = _softmax_with_one(offset.mul_(self.beta).masked_fill_(~negative, -torch.inf))
        return pull / self.alpha + push / self.beta, pushed.sub_(pulled)

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        return f"alpha={self.alpha}, beta={self.beta}, base={self.base}"


class DirectWeighting(Weighting):
    r"""Weights that are chosen, not derived from a loss; see `DirectWeightingLoss`."""

    def __init__(self, positive: WeightCurve, negative: WeightCurve) -> None:
        super().__init__()
        for name, curve in (("positive", positive), ("negative", negative)):
            if not callable(curve):
                raise InputError(
                    f"{name} must be a weight curve, a callable from similarities to weights such as "
                    f"lightning_dml.losses.curves.Step(0.5), got {curve!r}"
                )
        self.positive = positive
        self.negative = negative

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M)."""
        # masked_fill and not a product: an exponential curve may be infinite where there is no pair.
        weights = self.negative(similarity).detach().masked_fill(~negative, 0)
        weights = weights - self.positive(similarity).detach().masked_fill(~positive, 0)
        return (weights * similarity).sum(dim=1), weights

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        return f"positive={self.positive}, negative={self.negative}"


def _softmax_with_one(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 + sum exp) of each row, and its derivative; overwrites `logits`."""
    value = torch.logsumexp(logits, dim=1)
    value = torch.logaddexp(value, torch.zeros_like(value))
    return value, logits.sub_(value[:, None]).exp_()
