"""Weightings of losses on ranked lists: a pair's weight depends on the whole row."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dml.checks import check_count, check_number
from lightning_dml.losses.weighting.base import ChunkedWeighting
from lightning_dml.losses.weighting.distance import distance_and_slope
from lightning_dml.losses.weighting.rows import Positives, row_softmax


class RankedListWeighting(ChunkedWeighting):
    """Softmax weights over the pairs that violate their boundary, divided by distance; see `RankedListLoss`."""

    def __init__(
        self,
        margin: float = 0.4,
        alpha: float = 1.2,
        *,
        neg_temperature: float = 10.0,
        pos_temperature: float = 0.0,
        balance: float = 0.5,
    ) -> None:
        super().__init__()
        check_number("margin", margin, "a distance between unit vectors such as 0.4", least=0)
        check_number("alpha", alpha, "a distance between unit vectors such as 1.2", above=0)
        check_number("neg_temperature", neg_temperature, "the sharpness on negatives such as 10.0", least=0)
        check_number("pos_temperature", pos_temperature, "the sharpness on positives such as 0.0", least=0)
        check_number("balance", balance, "the share of the negatives such as 0.5", least=0, most=1)
        self.margin = margin
        self.alpha = alpha
        self.neg_temperature = neg_temperature
        self.pos_temperature = pos_temperature
        self.balance = balance

    def chunk(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form."""
        distance, slope = distance_and_slope(similarity)
        pairs = Positives.of(distance, positive)
        shortfall = pairs.table(pairs.values, -torch.inf).sub_(self.alpha - self.margin)
        pull = row_softmax(shortfall * self.pos_temperature, shortfall > 0).shares().mul_(1 - self.balance)
        pull_losses = pull.mul(shortfall.clamp_(min=0)).sum(dim=1)
        pull = pull[pairs.row, pairs.slot].mul_(slope[pairs.row, pairs.column])

        excess = distance.neg_().add_(self.alpha)
        violating = (excess > 0).logical_and_(negative)
        push = row_softmax(excess * self.neg_temperature, violating).shares().mul_(self.balance)
        losses = excess.mul_(push).sum(dim=1).add_(pull_losses)
        weights = push.mul_(slope)
        weights[pairs.row, pairs.column] = -pull
        return losses, weights

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return (
            f"margin={self.margin}, alpha={self.alpha}, neg_temperature={self.neg_temperature}, "
            f"pos_temperature={self.pos_temperature}, balance={self.balance}"
        )


class FastAPWeighting(ChunkedWeighting):
    """Weights of the histogram form of average precision; see `FastAPLoss`.

    A pair lies between two centres and shares itself out to them, so that its weight is the same wherever it lies
    between them: a table of `bins` numbers per row for positives, and one for negatives. Histograms and tables are
    in float64.
    """

    def __init__(self, bins: int = 10) -> None:
        super().__init__()
        check_count("bins", bins)
        self.bins = bins

    def chunk(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form."""
        offsets = torch.arange(0, len(similarity) * (self.bins + 1), self.bins + 1, device=similarity.device)
        pairs = Positives.of(similarity, positive)
        pos_cell, pos_part = self._place(pairs.values)
        pos_bins = self._histogram(pos_cell + offsets[pairs.row], pos_part, len(similarity))
        cell, part = self._place(similarity)
        cell.masked_fill_(~negative, self.bins)  # a cell of its own, for what is no negative
        neg_bins = self._histogram((cell + offsets[:, None]).flatten(), part.flatten(), len(similarity))

        losses, pulls, pushes = _average_precision(pos_bins, neg_bins, pairs.counts.double())
        pushes = torch.cat((pushes, pushes.new_zeros(len(pushes), 1)), dim=1)
        weights = pushes.to(similarity.dtype).gather(1, cell)
        weights[pairs.row, pairs.column] = -pulls.to(similarity.dtype)[pairs.row, pos_cell]
        return losses.to(similarity.dtype), weights

    def _place(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """The bin centre at or below each squared distance, int64 in [0, bins), and the share of the next centre."""
        position = (1 - similarity).mul_(self.bins / 2)
        cell = position.long().clamp_(0, self.bins - 1)
        return cell, position.sub_(cell)

    def _histogram(self, flat: Tensor, part: Tensor, rows: int) -> Tensor:
        """Triangular histogram, (rows, bins + 1) float64, of pairs in cells `flat` of rows of `bins + 1` cells."""
        shape = rows, self.bins + 1
        size = rows * (self.bins + 1)
        here = torch.bincount(flat, minlength=size).view(shape)[:, :-1]
        upper = torch.zeros(size, dtype=torch.float64, device=flat.device).index_add_(0, flat, part.double())
        upper = upper.view(shape)[:, :-1]
        histogram = upper.new_zeros(shape)
        histogram[:, :-1] += here - upper
        histogram[:, 1:] += upper
        return histogram

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"bins={self.bins}"


def _average_precision(pos_bins: Tensor, neg_bins: Tensor, positives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """FastAP losses, (n,), and the weights w+ and w- of pairs in each cell, (n, bins) each."""
    pos_sums, neg_sums = pos_bins.cumsum(dim=1), neg_bins.cumsum(dim=1)
    sums = pos_sums + neg_sums
    empty = sums <= 0
    sums = sums.masked_fill(empty, 1)
    precision = (pos_sums / sums).masked_fill_(empty, 1)  # of a positive that came to lie there
    number = positives.clamp(min=1)
    losses = (1 - (pos_bins * precision).sum(dim=1) / number).masked_fill_(positives == 0, 0)
    # Moving a pair by one unit of squared distance moves 1/width of it from its centre to the next, and S moves by
    # -1/2: the width is 4/bins, so 2/width is bins/2.
    factor = (pos_bins.shape[1] - 1) / 2 / number[:, None]
    lost = (pos_bins * neg_sums / sums.square())[:, :-1]
    pulls = factor * (lost - precision.diff(dim=1))
    pushes = factor * (pos_bins * pos_sums / sums.square())[:, :-1]
    return losses, pulls, pushes
