"""Mining by a pair's own similarity: all pairs, thresholds, and the non-trivial set of the ranked list."""

from __future__ import annotations

from torch import Tensor

from lightning_dml.checks import check_number
from lightning_dml.losses.mining.base import Miner


class AllPairs(Miner):
    """Keeps every pair: no mining. A loss with `miner=None` does the same; this is its name for a config."""

    separable = True

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Mines a block of rows; see `Miner.forward`."""
        return positive, negative


class ThresholdMiner(Miner):
    r"""Contrastive thresholds: hard enough by itself, whatever the other pairs are.

    A negative is kept if :math:`S_{ik} > \lambda_n`, as the released code of XBM (arXiv 1912.06798) does with 0.5; a
    positive if :math:`S_{ij} < \lambda_p`. Each side may be left whole, as XBM leaves the positives.

    Args:
        positive_below: :math:`\lambda_p`; None keeps all positives.
        negative_above: :math:`\lambda_n`; None keeps all negatives.

    Raises:
        InputError: for a threshold outside [-1, 1].

    Examples:
        >>> import torch
        >>> similarity = torch.tensor([[0.9, 0.2, 0.6, 0.4]])
        >>> positive = torch.tensor([[True, True, False, False]])
        >>> ThresholdMiner(positive_below=0.8)(similarity, positive, ~positive)
        (tensor([[False,  True, False, False]]), tensor([[False, False,  True, False]]))
    """

    separable = True

    def __init__(self, positive_below: float | None = None, negative_above: float | None = 0.5) -> None:
        super().__init__()
        for name, value in (("positive_below", positive_below), ("negative_above", negative_above)):
            if value is not None:
                check_number(name, value, "a cosine similarity such as 0.5", least=-1, most=1, hint="None keeps all")
        self.positive_below = positive_below
        self.negative_above = negative_above

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Mines a block of rows; see `Miner.forward`."""
        if self.positive_below is not None:
            positive = positive & (similarity < self.positive_below)
        if self.negative_above is not None:
            negative = negative & (similarity > self.negative_above)
        return positive, negative

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"positive_below={self.positive_below}, negative_above={self.negative_above}"


class RankedListMiner(Miner):
    r"""Non-trivial set of the ranked list loss.

    With distances :math:`d = \sqrt{2 - 2S}`, a positive is kept if :math:`d_{ij} > \alpha - m` and a negative if
    :math:`d_{ik} < \alpha`: positives are to come within :math:`\alpha - m` and negatives to stay beyond
    :math:`\alpha`. A similarity above 1 by rounding is a distance of 0.

    Args:
        margin: gap m between the two; an m above :math:`\alpha` keeps every positive.
        alpha: distance :math:`\alpha` that negatives are to keep; 1 + m / 2 by default, as in pytorch-metric-learning.

    Raises:
        InputError: if `alpha` is not positive or `margin` is negative.
    """

    separable = True

    def __init__(self, *, margin: float = 0.4, alpha: float = 1.2) -> None:
        super().__init__()
        check_number("margin", margin, "a distance between unit vectors such as 0.4", least=0)
        check_number("alpha", alpha, "a distance between unit vectors such as 1.2", above=0)
        self.margin = margin
        self.alpha = alpha

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Mines a block of rows; see `Miner.forward`."""
        if self.alpha >= self.margin:
            positive = positive & (similarity < _similarity_at(self.alpha - self.margin))
        return positive, negative & (similarity > _similarity_at(self.alpha))

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"margin={self.margin}, alpha={self.alpha}"


def _similarity_at(distance: float) -> float:
    return 1 - distance**2 / 2
