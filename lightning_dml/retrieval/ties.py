"""Tied neighbours, which a search cannot tell apart, made known so that no metric depends on the order of the rows.

Where neighbours are tied, every metric of this package is its expected value over all orders of theirs (McSherry and
Najork, Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores, ECIR 2008).

A run is a chain: each neighbour is tied with the next. Behind the last place that was searched it goes on with what
cannot be told from that place, so where a gallery is so dense that chains grow long, a value may depend on how deep the
search goes; the ranks of positives (MAP, MRR) take the runs that positives stand in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RESOLUTION = 5e-7
"""Share of |query| |item| by which two similarities must differ: some four times the rounding of float32 around 1.

Not a power of two: the gaps of similarities near 1 are multiples of 2^-24, and with one of them as the bound a length
that is rounded the other way would decide.
"""


class Ties(NamedTuple):
    """The run of tied neighbours that each place of a ranking belongs to.

    Attributes:
        start: (Nq, columns) int64, how many neighbours are nearer than the run.
        size: (Nq, columns) int64, neighbours in the run, those behind the last column included.
        positives: (Nq, columns) int64, how many of them have the query's label.
    """

    start: Tensor
    size: Tensor
    positives: Tensor


def tied_with_next(values: Tensor, scale: Tensor) -> Tensor:
    """Marks neighbours that cannot be told from the next one.

    Where rows of very different lengths have the very same inner product with a query, the longest of them can be told
    from the rest the least, and whether it stands next to the rest is up to the search.

    Args:
        values: (Nq, columns) float32, similarities or distances in rank order.
        scale: (Nq, columns) or (Nq, 1) float32, what rounding is proportional to: |query| |item| for inner products.

    Returns:
        (Nq, columns - 1) bool.
    """
    gaps = (values[:, 1:] - values[:, :-1]).abs_()
    tolerance = RESOLUTION * (torch.maximum(scale[:, 1:], scale[:, :-1]) if scale.shape[1] > 1 else scale)
    return (gaps <= tolerance) & gaps.isfinite()  # a missing neighbour's gap is infinite or NaN


def tie_runs(hits: Tensor, tied: Tensor) -> Ties:
    """The runs within a ranking.

    Args:
        hits: (Nq, columns) bool in rank order.
        tied: (Nq, columns - 1) bool, whether a place is tied with the next.
    """
    begins = torch.ones_like(hits)
    begins[:, 1:] = ~tied
    number = begins.long().cumsum(dim=1) - 1
    places = torch.arange(hits.shape[1], device=hits.device)
    start = torch.where(begins, places, 0).cummax(dim=1).values
    zeros = torch.zeros_like(number)
    size = zeros.scatter_add(1, number, torch.ones_like(number)).gather(1, number)
    positives = zeros.scatter_add(1, number, hits.long()).gather(1, number)
    return Ties(start, size, positives)


def with_last_run(ties: Ties, rows: Tensor, size: Tensor, positives: Tensor) -> Ties:
    """The same ties with the true extent of runs that go on behind the last column.

    Args:
        ties: of all queries.
        rows: (n,) int64, the queries whose last run goes on.
        size: (n,) int64, items of that run.
        positives: (n,) int64, how many of them have the query's label.
    """
    start = ties.start[rows]
    last = start == start[:, -1:]
    sizes, counts = ties.size.clone(), ties.positives.clone()
    sizes[rows] = torch.where(last, size[:, None], sizes[rows])
    counts[rows] = torch.where(last, positives[:, None], counts[rows])
    return Ties(ties.start, sizes, counts)
