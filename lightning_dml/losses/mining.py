"""Samples mining: which of the pairs are informative (first half of arXiv 1905.12837)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_dml.errors import InputError


class Miner(nn.Module):
    """Keeps the informative pairs.

    A miner sees a block of similarities and the masks of the pairs there are, and returns smaller masks. It is
    called without gradient.

    Attributes:
        separable: whether keeping a pair depends on its own similarity alone. The engine then passes any part of a row.
    """

    separable: bool = False

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Mines a block of rows.

        Args:
            similarity: (n, M) float32 or float64.
            positive: (n, M) bool, the positive pairs of each anchor.
            negative: (n, M) bool, the negative pairs of each anchor.

        Returns:
            The kept positives and negatives, (n, M) bool each.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(similarity, positive, negative)")


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
        if not math.isfinite(epsilon):
            raise InputError(f"epsilon must be a finite similarity such as 0.1, got {epsilon}")
        self.epsilon = epsilon

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Mines a block of rows; see `Miner.forward`."""
        hardest_positive = similarity.masked_fill(~positive, torch.inf).amin(dim=1, keepdim=True)
        hardest_negative = similarity.masked_fill(~negative, -torch.inf).amax(dim=1, keepdim=True)
        kept_negative = negative & (similarity > hardest_positive - self.epsilon)
        kept_positive = positive & (similarity < hardest_negative + self.epsilon)
        both = kept_positive.any(dim=1, keepdim=True) & kept_negative.any(dim=1, keepdim=True)
        return kept_positive & both, kept_negative & both

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        return f"epsilon={self.epsilon}"
