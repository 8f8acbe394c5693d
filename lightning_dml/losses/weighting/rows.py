"""Shared arithmetic on blocks of rows: the few positives picked out of them, and safe softmax sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_EXPONENT = -80.0
"""Below e^-80 no term counts, and where float32 leaves its normal range exp is fifty times as slow on a CPU."""


@dataclass(frozen=True)
class Positives:
    """The positives of a block, picked out: they are few, and a table of them is small.

    Attributes:
        row: (E,) int64, ascending.
        column: (E,) int64.
        slot: (E,) int64, place of the pair among the positives of its row.
        values: (E,) similarities.
        counts: (n,) int64 positives per row.
    """

    row: Tensor
    column: Tensor
    slot: Tensor
    values: Tensor
    counts: Tensor

    @classmethod
    def of(cls, similarity: Tensor, positive: Tensor) -> Positives:
        """Picks the pairs of the mask `positive` (n, M) out of `similarity` (n, M)."""
        row, column = positions(positive)
        counts = torch.bincount(row, minlength=len(similarity))
        slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        return cls(row, column, slot, similarity[row, column], counts)

    def table(self, values: Tensor, fill: float) -> Tensor:
        """Table (n, most positives of a row) with `values` (E,) of each pair in its slot, and `fill` in empty slots."""
        width = int(self.counts.max()) if len(self.counts) else 0
        table = values.new_full((len(self.counts), width), fill)
        table[self.row, self.slot] = values
        return table

    def sums(self, values: Tensor) -> Tensor:
        """Sums (n,) of `values` (E,) over the positives of each row."""
        return values.new_zeros(len(self.counts)).index_add_(0, self.row, values)


def positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns, (E,) int64 each in row order, of the True entries of a mask (n, M) with few of them."""
    if mask.is_cuda or not mask.is_contiguous() or mask.storage_offset() % 8 or mask.numel() < 1024:
        row, column = mask.nonzero(as_tuple=True)
        return row, column
    # Eight entries at a time: most words are 0. Three times as fast as looking at each entry.
    flat = mask.view(-1)
    whole = len(flat) // 8 * 8
    word = flat[:whole].view(torch.int64).nonzero()[:, 0]
    hit, place = flat[:whole].view(-1, 8)[word].nonzero(as_tuple=True)
    places = torch.cat((word[hit] * 8 + place, flat[whole:].nonzero()[:, 0] + whole))
    row = places // mask.shape[1]
    return row, places - row * mask.shape[1]


class RowSoftmax(NamedTuple):
    """Softmax of each row, before the division.

    Attributes:
        log_sum: (n,) log-sum-exp, or log(1 + sum exp); without the one, -inf for a row of nothing but -inf.
        powers: (n, M) exponentials, the largest of a row, the one included, 1.
        sums: (n,) their sums, at least 1; 1 for a row of nothing but -inf.
    """

    log_sum: Tensor
    powers: Tensor
    sums: Tensor

    def shared(self, total: Tensor) -> Tensor:
        """Shares (n, M) of the row totals (n,) by the softmax; overwrites `powers`."""
        return self.powers.mul_((total / self.sums)[:, None])

    def shares(self) -> Tensor:
        """Shares (n, M) of 1; overwrites `powers`."""
        return self.powers.div_(self.sums[:, None])


def row_softmax(logits: Tensor, mask: Tensor, with_one: bool = False) -> RowSoftmax:
    """Softmax of each row of `logits` (n, M), which it overwrites, over the entries of `mask` (n, M).

    With `with_one`, each row has one more entry, of logit 0, whose share belongs to nobody.
    """
    left_out = ~mask
    logits.masked_fill_(left_out, -torch.inf)
    largest = logits.amax(dim=1) if logits.shape[1] else logits.new_zeros(len(logits))
    largest = largest.clamp_min_(0) if with_one else largest.masked_fill_(largest == -torch.inf, 0)
    powers = logits.sub_(largest[:, None]).clamp_min_(LEAST_EXPONENT).exp_().masked_fill_(left_out, 0)
    sums = powers.sum(dim=1)
    if with_one:
        sums += torch.exp(-largest)
    return RowSoftmax(sums.log().add_(largest), powers, sums.clamp_(min=1))


def side_softmax(pairs: Positives, logits: Tensor, with_one: bool = False) -> RowSoftmax:
    """Softmax of the `logits` (E,) of the positives within each row, by slot."""
    table = pairs.table(logits, -torch.inf)
    return row_softmax(table, table != -torch.inf, with_one)


def softplus(values: Tensor) -> Tensor:
    """The function log(1 + e^x) for any x, -inf too; torch's own is linear from 20 on, an error of 2e-9."""
    return -F.logsigmoid(-values)
