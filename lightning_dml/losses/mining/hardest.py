"""Mining by rank within the row: the hardest pair of each side, or the k hardest."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dml.checks import check_count
from lightning_dml.losses.mining.base import Miner, at_columns


class BatchHardMiner(Miner):
    """Batch-hard: the hardest positive and the hardest negative of each anchor.

    The hardest positive is the least similar one, the hardest negative the most similar one; of equals, the one in
    the lowest column. The sides are independent: an anchor without positives keeps its hardest negative.

    Examples:
        >>> import torch
        >>> similarity = torch.tensor([[0.9, 0.2, 0.6, 0.4]])
        >>> positive = torch.tensor([[True, True, False, False]])
        >>> BatchHardMiner()(similarity, positive, ~positive)
        (tensor([[False,  True, False, False]]), tensor([[False, False,  True, False]]))
    """

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Mines a block of rows; see `Miner.forward`."""
        if similarity.shape[1] == 0:
            return positive, negative
        # argmin and argmax promise the first of equals.
        least = torch.where(positive, similarity, torch.inf).argmin(dim=1, keepdim=True)
        most = torch.where(negative, similarity, -torch.inf).argmax(dim=1, keepdim=True)
        return at_columns(least, positive), at_columns(most, negative)


class TopKMiner(Miner):
    """The k hardest positives and the k hardest negatives of each anchor.

    Pairs as hard as the k-th are kept as well, so that the outcome does not depend on the order of the references;
    it is then more than k. An anchor with fewer than k pairs on a side keeps them all. The sides are independent.

    Args:
        positives: how many of the least similar positives; None keeps all.
        negatives: how many of the most similar negatives; None keeps all. The default of 10 is this library's.

    Raises:
        InputError: for a number below 1.

    Examples:
        >>> import torch
        >>> similarity = torch.tensor([[0.9, 0.2, 0.6, 0.4, 0.5]])
        >>> positive = torch.tensor([[True, True, False, False, False]])
        >>> TopKMiner(negatives=2)(similarity, positive, ~positive)
        (tensor([[ True,  True, False, False, False]]), tensor([[False, False,  True, False,  True]]))
    """

    def __init__(self, positives: int | None = None, negatives: int | None = 10) -> None:
        super().__init__()
        for name, value in (("positives", positives), ("negatives", negatives)):
            if value is not None:
                check_count(name, value, hint="None keeps all")
        self.positives = positives
        self.negatives = negatives

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Mines a block of rows; see `Miner.forward`."""
        if self.positives is not None:
            positive = _largest(-similarity, positive, self.positives)
        if self.negatives is not None:
            negative = _largest(similarity, negative, self.negatives)
        return positive, negative

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"positives={self.positives}, negatives={self.negatives}"


def _largest(values: Tensor, mask: Tensor, count: int) -> Tensor:
    """The mask less all that is below the count-th largest value under it; (n, M)."""
    count = min(count, values.shape[1])
    kth = torch.where(mask, values, -torch.inf).topk(count, dim=1).values[:, -1:]
    return mask & (values >= kth)
