"""The interface of samples mining: smaller masks from a block of similarities."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Miner(nn.Module):
    """Keeps the informative pairs.

    A miner sees a block of similarities and the masks of the pairs there are, and returns smaller masks. It is
    called without gradient. Any miner goes with any weighting, and from a config by its class path.

    Attributes:
        separable: whether keeping a pair depends on its own similarity alone; the engine may then call the miner on
            any part of a row. Otherwise it is given whole rows, in their order.
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


def lowest(similarity: Tensor, mask: Tensor) -> Tensor:
    """Smallest similarity under the mask in each row, (n, 1); infinity where the mask is empty."""
    if similarity.shape[1] == 0:
        return similarity.new_full((len(similarity), 1), torch.inf)
    return torch.where(mask, similarity, torch.inf).amin(dim=1, keepdim=True)


def highest(similarity: Tensor, mask: Tensor) -> Tensor:
    """Largest similarity under the mask in each row, (n, 1); minus infinity where the mask is empty."""
    if similarity.shape[1] == 0:
        return similarity.new_full((len(similarity), 1), -torch.inf)
    return torch.where(mask, similarity, -torch.inf).amax(dim=1, keepdim=True)


def at_columns(columns: Tensor, mask: Tensor) -> Tensor:
    """The mask (n, M) less everything outside `columns` (n, k) of each row; columns may repeat."""
    return torch.zeros_like(mask).scatter_(1, columns, True) & mask
