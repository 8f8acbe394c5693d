"""Weightings on the distance d = sqrt(2 - 2 S) of unit vectors, and what other weightings on it share.

The derivative of d with respect to S is -1/d, infinite for two equal vectors. So d is clamped at `MIN_DISTANCE`, and
nearer pairs have no slope: the similarity of two equal float32 vectors is off from 1 by up to 6e-7, their d by up to
1.1e-3, and a weight of 1/d would be rounding, amplified. Nothing is lost, for equal vectors have no direction to be
pulled or pushed along.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dml.checks import check_number
from lightning_dml.losses.weighting.base import ChunkedWeighting
from lightning_dml.losses.weighting.rows import Positives

MIN_DISTANCE = 2e-3
"""Distance that nearer pairs are taken to have, without a slope. Ours.

Its square, 4e-6, is three times the most that 2 - 2 S was for 8,000 unit rows of 64 to 2,048 columns with themselves;
processors differ in the order of the sums.
"""


class HadsellWeighting(ChunkedWeighting):
    r"""Contrastive weights on squared distances, the form of Hadsell, Chopra and LeCun (2006).

    .. math::
        L_i = \tfrac12 \sum_{j \in P_i} d_{ij}^2 + \tfrac12 \sum_{k \in N_i} [M - d_{ik}]_+^2

    The weight of a positive is 1, that of a negative :math:`[M / d - 1]_+`, and 0 for negatives nearer than
    `MIN_DISTANCE`. The formula is that of the documentation of pytorch-metric-learning.

    Args:
        margin: distance below which a negative counts; distances of unit vectors lie in [0, 2].

    Raises:
        InputError: for a margin that is not positive.
    """

    separable = True

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        check_number("margin", margin, "a distance between unit vectors such as 1.0", above=0)
        self.margin = margin

    def chunk(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form."""
        distance, slope = distance_and_slope(similarity)
        excess = distance.neg_().add_(self.margin).relu_().mul_(negative)
        weights = slope.mul_(excess)
        losses = excess.square_().sum(dim=1).div_(2)
        pairs = Positives.of(similarity, positive)
        weights[pairs.row, pairs.column] = -1.0
        return losses.add_(pairs.sums(1 - pairs.values)), weights

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"margin={self.margin}"


class DistanceContrastiveWeighting(ChunkedWeighting):
    r"""Contrastive weights on plain distances, the form of pytorch-metric-learning.

    .. math::
        L_i = \sum_{j \in P_i} [d_{ij} - m_p]_+ + \sum_{k \in N_i} [m_n - d_{ik}]_+

    The weight of a pair is :math:`1 / d` where its hinge is open, and 0 nearer than `MIN_DISTANCE`.

    Args:
        margin: distance :math:`m_n` below which a negative counts.
        pos_margin: distance :math:`m_p` above which a positive counts.

    Raises:
        InputError: for a margin that is not positive, or a negative positive margin.
    """

    separable = True

    def __init__(self, margin: float = 1.0, pos_margin: float = 0.0) -> None:
        super().__init__()
        check_number("margin", margin, "a distance between unit vectors such as 1.0", above=0)
        check_number("pos_margin", pos_margin, "a distance between unit vectors such as 0.0", least=0)
        self.margin = margin
        self.pos_margin = pos_margin

    def chunk(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form."""
        return _hinges(similarity, positive, negative, self.pos_margin, self.margin)

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"margin={self.margin}, pos_margin={self.pos_margin}"


class MarginWeighting(ChunkedWeighting):
    r"""Weight 1/d on positives beyond, and on negatives within, a boundary that may be learned; see `MarginLoss`.

    Attributes:
        beta: the boundary; a 0-dim `nn.Parameter` where it is learned.
    """

    separable = True
    beta: nn.Parameter | float

    def __init__(self, margin: float = 0.2, beta: float = 1.2, *, learn_beta: bool = False) -> None:
        super().__init__()
        check_number("margin", margin, "a distance between unit vectors such as 0.2", least=0)
        check_number("beta", beta, "a distance between unit vectors such as 1.2", above=0)
        self.margin = margin
        self.beta = nn.Parameter(torch.tensor(float(beta))) if learn_beta else float(beta)

    def row_losses(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Loss of each anchor, (n,), differentiable with respect to the similarities and to `beta`."""
        beyond = distances(similarity) - self.beta
        pull = torch.where(positive, (beyond + self.margin).relu(), 0).sum(dim=1)
        return pull + torch.where(negative, (self.margin - beyond).relu(), 0).sum(dim=1)

    def chunk(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form."""
        beta = self._beta()
        return _hinges(similarity, positive, negative, beta - self.margin, beta + self.margin)

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"margin={self.margin}, beta={float(self._beta()):g}, learn_beta={isinstance(self.beta, Tensor)}"

    def _beta(self) -> Tensor | float:
        return self.beta.detach() if isinstance(self.beta, Tensor) else self.beta


def distances(similarity: Tensor) -> Tensor:
    """Distances d = sqrt(2 - 2 S), at least `MIN_DISTANCE`, in the shape of `similarity`; differentiable."""
    return (2 - 2 * similarity).clamp(min=MIN_DISTANCE**2).sqrt()


def distance_and_slope(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Distances, at least `MIN_DISTANCE`, and -dd/dS = 1/d, 0 for nearer pairs; without autograd, in fewer passes."""
    return distance_and_slope_(similarity.clone())


def distance_and_slope_(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """`distance_and_slope` in the memory of `similarity`."""
    squared = similarity.mul_(-2).add_(2)
    slope = F.threshold(squared, MIN_DISTANCE**2, torch.inf).rsqrt_()  # 0 for near pairs
    return squared.clamp_min_(MIN_DISTANCE**2).sqrt_(), slope


def _hinges(
    similarity: Tensor, positive: Tensor, negative: Tensor, pos_margin: Tensor | float, margin: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Row losses and weights of [d - pos_margin]+ on positives and [margin - d]+ on negatives."""
    distance, slope = distance_and_slope(similarity)
    pairs = Positives.of(distance, positive)
    shortfall = (pairs.values - pos_margin).relu_()
    pull = torch.sign(shortfall).mul_(slope[pairs.row, pairs.column])
    excess = distance.neg_().add_(margin).relu_().mul_(negative)
    losses = excess.sum(dim=1).add_(pairs.sums(shortfall))
    weights = slope.mul_(excess.sign_())
    weights[pairs.row, pairs.column] = -pull
    return losses, weights
