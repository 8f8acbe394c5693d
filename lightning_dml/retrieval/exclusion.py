"""Which gallery items a query must not find, or shares a label with: pairs of equal keys."""

from __future__ import annotations

import torch
from torch import Tensor

NOBODY = -1
"""The key of an item that is like no other; every negative key means that."""


def match_counts(query_keys: Tensor, gallery_keys: Tensor) -> Tensor:
    """How many gallery items have the key of each query; (Nq,) int64, 0 for negative keys.

    Args:
        query_keys: (Nq,) int64.
        gallery_keys: (Ng,) int64 on the same device.
    """
    _, counts = _ranges(query_keys, gallery_keys.sort().values)
    return counts


def matching_pairs(query_keys: Tensor, gallery_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair of a query and a gallery item whose keys are equal and not negative.

    Args:
        query_keys: (Nq,) int64.
        gallery_keys: (Ng,) int64 on the same device.

    Returns:
        rows: (P,) int64 positions in `query_keys`, ascending.
        columns: (P,) int64 positions in `gallery_keys`, ascending for each query.
    """
    ordered, order = gallery_keys.sort(stable=True)
    first, counts = _ranges(query_keys, ordered)
    rows = torch.arange(len(query_keys), device=query_keys.device).repeat_interleave(counts)
    start = counts.cumsum(dim=0) - counts
    within = torch.arange(len(rows), device=rows.device) - start[rows]
    return rows, order[first[rows] + within]


def combined_keys(*columns: Tensor) -> Tensor:
    """One key for each distinct combination of the columns' values, -1 where any of them is negative.

    Args:
        columns: (N,) int64 each.

    Returns:
        (N,) int64 from 0 on.
    """
    table = torch.stack(columns, dim=1)
    keys = torch.unique(table, dim=0, return_inverse=True)[1]
    return torch.where((table < 0).any(dim=1), NOBODY, keys)


def _ranges(query_keys: Tensor, ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Where in the sorted gallery keys each query's begin, and how many they are."""
    first = torch.searchsorted(ordered, query_keys)
    counts = torch.searchsorted(ordered, query_keys, right=True) - first
    return first, counts.masked_fill(query_keys < 0, 0)
