"""Weightings of the triplet family: every positive of an anchor against every negative, without listing them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dml.checks import check_number
from lightning_dml.losses.measure import Measure, check_measure
from lightning_dml.losses.weighting.base import ChunkedWeighting
from lightning_dml.losses.weighting.distance import distance_and_slope
from lightning_dml.losses.weighting.rows import Positives


class TripletWeighting(ChunkedWeighting):
    """Weights that count the violated triplets of a pair; see `TripletLoss`.

    The thresholds that the positives of a row set to its negatives are sorted, and each negative is searched in
    them: its place is its count. How many negatives lie beyond a threshold are the suffix sums of a histogram of the
    places. Working memory is that of a few copies of the chunk.
    """

    def __init__(self, margin: float = 0.1, *, measure: Measure = "similarity") -> None:
        super().__init__()
        check_number("margin", margin, "a number in the units of the measure, such as 0.1", least=0)
        check_measure(measure)
        self.margin = margin
        self.measure: Measure = measure

    def chunk(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form."""
        closeness, slope = _closeness(similarity, self.measure)
        pairs = Positives.of(closeness, positive)
        if len(pairs.row) == 0:
            return similarity.new_zeros(len(similarity)), torch.zeros_like(similarity)
        values = pairs.values - self.margin
        thresholds, order = pairs.table(values, torch.inf).sort(dim=1)
        counts, histogram = _violations(thresholds, closeness, negative & (closeness > thresholds[:, :1]))
        beaten = histogram.flip(1).cumsum(1).flip(1)[:, 1:]  # negatives beyond each threshold
        beaten = torch.zeros_like(beaten).scatter_(1, order, beaten)[pairs.row, pairs.slot].to(similarity.dtype)

        # Measured from the lowest threshold the terms are small, so that the difference of the sums keeps its digits.
        origin = thresholds[:, :1].masked_fill(pairs.counts[:, None] == 0, 0)
        losses = (closeness - origin).mul_(counts).sum(dim=1)
        losses -= pairs.sums(beaten * (values - origin[pairs.row, 0]))
        weights = counts.mul_(slope)
        slopes = slope[pairs.row, pairs.column] if isinstance(slope, Tensor) else slope
        weights[pairs.row, pairs.column] = -beaten * slopes
        return losses, weights

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"margin={self.margin}, measure={self.measure!r}"


class SoftTripletWeighting(ChunkedWeighting):
    """Weights that sum the sigmoids of a pair's triplets; see `TripletLoss` with a `scale`.

    There is no short cut through counts: every triplet's sigmoid is computed, in the memory of a few copies of the
    chunk but in time proportional to the triplets. Against 65,536 references this is for a few positives per row.
    """

    def __init__(self, scale: float = 1.0, *, measure: Measure = "similarity") -> None:
        super().__init__()
        check_number("scale", scale, "the sharpness of a soft margin such as 10.0", above=0)
        check_measure(measure)
        self.scale = scale
        self.measure: Measure = measure

    def chunk(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form."""
        closeness, slope = _closeness(similarity, self.measure)
        pairs = Positives.of(closeness, positive)
        table = pairs.table(pairs.values, torch.inf)
        closeness = closeness.masked_fill(~negative, -torch.inf)
        losses, weights = closeness.new_zeros(len(closeness)), torch.zeros_like(closeness)
        pulled = torch.zeros_like(table)
        for slot in range(table.shape[1]):
            violation = (closeness - table[:, slot, None]).mul_(self.scale)
            # softplus(x); torch's own is linear from 20 on, an error of 2e-9.
            losses -= F.logsigmoid(-violation).sum(dim=1).div_(self.scale)
            push = violation.sigmoid_()
            weights += push
            pulled[:, slot] = push.sum(dim=1)
        weights.mul_(slope)
        slopes = slope[pairs.row, pairs.column] if isinstance(slope, Tensor) else slope
        weights[pairs.row, pairs.column] = -pulled[pairs.row, pairs.slot] * slopes
        return losses, weights

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"scale={self.scale}, measure={self.measure!r}"


def count_below(thresholds: Tensor, values: Tensor) -> Tensor:
    """Counts how many of a row's thresholds are less than each of the row's values.

    Args:
        thresholds: (n, W) float, ascending; +inf where a row has fewer than W.
        values: (n, H) float; finite or -inf.

    Returns:
        (n, H) int64.
    """
    if values.is_cuda or values.shape[1] < 1024:
        return torch.searchsorted(thresholds, values.contiguous())
    return _count_below_by_grid(thresholds, values)


def _count_below_by_grid(thresholds: Tensor, values: Tensor) -> Tensor:
    """Does what `count_below` does, four times as fast as a binary search on a CPU: most of it is one look-up.

    A fine grid over the range of a row's thresholds knows how many of them lie in lower cells. Thresholds and values
    get their cells by the same monotonic operations, so only the thresholds in a value's own cell, mostly none or
    one, are left to be compared with it.
    """
    cells = min(max(256, 16 * thresholds.shape[1]), 2**15)
    finite = thresholds.isfinite()
    lowest = thresholds[:, :1].masked_fill(~finite[:, :1], 0)
    highest = thresholds.masked_fill(~finite, -torch.inf).amax(dim=1, keepdim=True)
    scale = (cells - 0.5) / (highest - lowest).clamp(min=1e-6)  # to cells 1 to `cells`; 0 is below, `cells + 1` above

    def cell(numbers: Tensor) -> Tensor:
        # Never fused (addcmul): a fused and an unfused lane of one kernel round differently, and order would be lost.
        return (numbers - lowest).mul_(scale).add_(1).clamp_(0, cells + 1).long()

    occupied = cell(thresholds)
    inside = occupied.new_zeros(len(occupied), cells + 2).scatter_add_(1, occupied, torch.ones_like(occupied))
    counts = (inside.cumsum(dim=1) - inside).gather(1, cell(values))
    step = (1 << int(inside[:, :-1].max()).bit_length()) // 2
    thresholds = F.pad(thresholds, (0, step), value=torch.inf)
    while step:
        counts.add_(thresholds[:, step - 1 :].gather(1, counts) < values, alpha=step)
        step //= 2
    return counts


def _violations(thresholds: Tensor, closeness: Tensor, hard: Tensor) -> tuple[Tensor, Tensor]:
    """Counts of thresholds below each hard negative, (n, M), and the histogram of these counts, (n, W + 1) int64."""
    rows, bins = len(thresholds), thresholds.shape[1] + 1
    offsets = torch.arange(0, rows * bins, bins, device=thresholds.device)
    # A trained embedder leaves few hard negatives; picking them out then beats searching all. An accelerator
    # searches faster than it counts.
    if closeness.is_cuda or int(torch.count_nonzero(hard)) > hard.numel() // 8:
        places = count_below(thresholds, closeness.masked_fill(~hard, -torch.inf))
        counts, flat = places.to(closeness.dtype), places.add_(offsets[:, None]).flatten()
    else:
        picked = Positives.of(closeness, hard)
        places = count_below(thresholds, picked.table(picked.values, -torch.inf))[picked.row, picked.slot]
        counts, flat = torch.zeros_like(closeness), places + offsets[picked.row]
        counts[picked.row, picked.column] = places.to(closeness.dtype)
    return counts, torch.bincount(flat, minlength=rows * bins).view(rows, bins)


def _closeness(similarity: Tensor, measure: Measure) -> tuple[Tensor, Tensor | float]:
    """A number that grows with similarity and is the negative measure but for a constant; its derivative by S."""
    if measure == "similarity":
        return similarity, 1.0
    if measure == "squared_distance":
        return 2 * similarity, 2.0
    distance, slope = distance_and_slope(similarity)
    return distance.neg_(), slope
