"""Square matrices of which few entries are not zero: rows, columns and means of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_dml.distributed import map_rows

# Entries that a block works on: eight bytes for each of about ten arrays of them.
BLOCK_PAIRS = 2**20


@dataclass(frozen=True)
class SparseRows:
    """A square matrix of which few entries are not zero, row by row, on the CPU.

    Attributes:
        starts: (M + 1,) int64, where the entries of each row begin.
        columns: (entries,) int32, ascending within a row.
        weights: (entries,) float32.
    """

    starts: Tensor
    columns: Tensor
    weights: Tensor

    @classmethod
    def of(cls, counts: Tensor, columns: Tensor, weights: Tensor) -> SparseRows:
        """Makes the matrix from the entries, one row after the other, and their counts by row."""
        return cls(torch.cat([counts.new_zeros(1), counts.cumsum(dim=0)]), columns, weights)

    @property
    def longest(self) -> int:
        """Number of entries of the longest row."""
        return int(self.starts.diff().max())

    def counts(self, rows: Tensor) -> Tensor:
        """Numbers of entries of `rows`."""
        return self.starts[rows + 1] - self.starts[rows]

    def entries(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Columns, int64, and weights of the entries of `rows`, one row after the other."""
        counts = self.counts(rows)
        places = repeated(self.starts[rows] - counts.cumsum(dim=0) + counts, counts)
        places += torch.arange(len(places))
        return self.columns.index_select(0, places).long(), self.weights.index_select(0, places)

    def transposed(self) -> SparseRows:
        """The same matrix by columns."""
        count = len(self.starts) - 1
        owners = repeated(torch.arange(count, dtype=torch.int32), self.starts.diff())
        order = self.columns.argsort(stable=True)
        return SparseRows.of(self.columns.bincount(minlength=count), owners[order], self.weights[order])

    def averaged(self, neighbours: Tensor) -> SparseRows:
        """The matrix whose row i is the mean of the rows `neighbours[i]`, (M, k) int64; a collective."""
        count, width = neighbours.shape

        def means(rows: Tensor) -> tuple[Tensor, ...]:
            chosen = neighbours[rows].flatten()
            columns, weights = self.entries(chosen)
            starts = repeated(torch.arange(len(chosen)) // width * count, self.counts(chosen))
            keys, inverse = torch.unique(starts + columns, return_inverse=True)
            sums = torch.zeros(len(keys)).index_add_(0, inverse, weights / width)
            return (keys // count).bincount(minlength=len(rows)), (keys % count).int(), sums

        return SparseRows.of(*map_rows(count, means, max(1, BLOCK_PAIRS // (width * self.longest))))


def repeated(values: Tensor, counts: Tensor) -> Tensor:
    """Values (n,), each as often as `counts` says; torch's own repeat takes about eight times as long."""
    return torch.from_numpy(np.repeat(values.numpy(), counts.numpy()))


def parts(lengths: Tensor, most: int) -> Iterator[Tensor]:
    """Positions of `lengths` in parts whose sum is about `most`; a length above that is a part of its own."""
    numbers = (lengths.cumsum(dim=0) - 1).div(most, rounding_mode="floor")
    sizes: list[int] = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
    yield from torch.split(torch.arange(len(lengths)), sizes)
