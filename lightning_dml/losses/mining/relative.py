"""Mining by the other side of the row: pairs that are harder than the hardest pair of the other kind, less a slack."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dml.checks import check_number
from lightning_dml.losses.mining.base import Miner, highest, lowest


class MultiSimilarityMiner(Miner):
    r"""Relative mining of the multi-similarity loss (arXiv 1904.06627, and its official code).

    A negative is kept if it is more similar than the anchor's hardest positive, less a slack:
    :math:`S_{ik} > \min_{P_i} S - \epsilon`; a positive if it is less similar than the hardest negative, plus the
    slack: :math:`S_{ij} < \max_{N_i} S + \epsilon`. An anchor for which either set is empty is left out.

    Args:
        epsilon: the slack, a similarity; 0.1 in the paper's code.

    Raises:
        InputError: if `epsilon` is not a finite number.
    """

    def __init__(self, epsilon: float = 0.1) -> None:
        super().__init__()
        check_number("epsilon", epsilon, "a similarity such as 0.1")
        self.epsilon = epsilon

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Mines a block of rows; see `Miner.forward`."""
        return _violating(similarity, positive, negative, self.epsilon)

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"epsilon={self.epsilon}"


class TripletViolationMiner(Miner):
    r"""Keeps the pairs of every triplet that is violated by a margin.

    A triplet of an anchor i, a positive j and a negative k is violated if :math:`S_{ik} > S_{ij} - m`. A positive is
    kept if some negative violates it, a negative if it violates some positive. An anchor without positives or
    without negatives has no triplets and keeps nothing, so the two sides of an anchor are kept or empty together.

    The hardest pair of the other side decides, so no triplet is formed, and this is `MultiSimilarityMiner` with the
    slack m. That arXiv 1905.12837 means this rule by "informative pairs" is this library's reading.

    Args:
        margin: m, a similarity; 0 keeps what stands in the wrong order, and a negative margin less than that.

    Raises:
        InputError: if `margin` is not a finite number.

    Examples:
        >>> import torch
        >>> similarity = torch.tensor([[0.9, 0.5, 0.55, 0.3]])
        >>> positive = torch.tensor([[True, True, False, False]])
        >>> TripletViolationMiner(margin=0.1)(similarity, positive, ~positive)  # only 0.55 comes near 0.5
        (tensor([[False,  True, False, False]]), tensor([[False, False,  True, False]]))
    """

    def __init__(self, margin: float = 0.1) -> None:
        super().__init__()
        check_number("margin", margin, "a similarity such as 0.1")
        self.margin = margin

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Mines a block of rows; see `Miner.forward`."""
        return _violating(similarity, positive, negative, self.margin)

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"margin={self.margin}"


def _violating(similarity: Tensor, positive: Tensor, negative: Tensor, slack: float) -> tuple[Tensor, Tensor]:
    hardest_positive, hardest_negative = lowest(similarity, positive), highest(similarity, negative)
    floor, ceiling = hardest_positive - slack, hardest_negative + slack
    # The hardest pair of each side stands for all of them: where it is not kept, none is, and the anchor drops out.
    both = (hardest_negative > floor) & (hardest_positive < ceiling)
    kept_positive = positive & (similarity < ceiling.where(both, -torch.inf))
    return kept_positive, negative & (similarity > floor.where(both, torch.inf))
