"""Shared arithmetic on blocks of rows: the few positives picked out of them, and safe softmax sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        row, column = positive.nonzero(as_tuple=True)
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


def softmax_with_one(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 + sum exp) of each row, (n,), and its derivative (n, M); overwrites `logits` (n, M)."""
    value = torch.logsumexp(logits, dim=1)
    value = torch.logaddexp(value, torch.zeros_like(value))
    return value, logits.sub_(value[:, None]).exp_()
