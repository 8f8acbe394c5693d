"""Shared arithmetic on blocks of rows: the few positives picked out of them, and safe softmax sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
        """(n, most positives of a row) with `values` (E,) of each pair in its slot, and `fill` in empty slots."""
        width = int(self.counts.max()) if len(self.counts) else 0
        table = values.new_full((len(self.counts), width), fill)
        table[self.row, self.slot] = values
        return table

    def sums(self, values: Tensor) -> Tensor:
        """(n,) sums of `values` (E,) over the positives of each row."""
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


def softmax_with_one(logits: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 + sum exp) of each row over the kept entries, (n,), and its derivative, (n, M); overwrites `logits`.

    Args:
        logits: (n, M) float.
        kept: (n, M) bool.
    """
    left_out = ~kept
    logits.masked_fill_(left_out, -torch.inf)
    largest = logits.amax(dim=1, keepdim=True).clamp_min(0) if logits.shape[1] else logits.new_zeros(len(logits), 1)
    powers = logits.sub_(largest).clamp_min_(LEAST_EXPONENT).exp_().masked_fill_(left_out, 0)
    total = powers.sum(dim=1, keepdim=True) + torch.exp(-largest)
    return (largest + total.log())[:, 0], powers.div_(total)
