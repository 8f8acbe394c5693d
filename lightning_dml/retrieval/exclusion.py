"""Pairs of queries and gallery items with equal keys: those that must not be found, and those that share a label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dml.checks import check_integers
from lightning_dml.errors import InputError

Exclusions = Sequence[tuple[Tensor, Tensor]]
"""Pairs of query keys (Nq,) and gallery keys (Ng,), int64; equal ones that are not negative are passed over."""

NOBODY = -1
"""The key of an item that is like no other; every negative key means that."""


def key_pairs(
    name: str, of_queries: Tensor | None, of_gallery: Tensor | None, queries: Tensor, gallery: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The keys of both sides as int64 on the device of the rows, or nothing where there are none.

    Args:
        name: of the keys, such as "indices", which the caller's arguments query_indices and gallery_indices have.
        of_queries: (Nq,) integers, or None.
        of_gallery: (Ng,) integers, or None.
        queries: the rows of the queries.
        gallery: the rows of the gallery.

    Raises:
        InputError: one side is given and the other is not, or a shape or dtype is wrong.
    """
    if of_queries is None and of_gallery is None:
        return []
    if of_queries is None or of_gallery is None:
        missing = f"query_{name}" if of_queries is None else f"gallery_{name}"
        raise InputError(f"{missing} is missing; items are left out by comparing both {name}, so give both or neither")
    check_integers(f"query_{name}", of_queries, len(queries), "queries")
    check_integers(f"gallery_{name}", of_gallery, len(gallery), "gallery")
    return [(of_queries.to(queries.device, torch.int64), of_gallery.to(queries.device, torch.int64))]


def match_counts(query_keys: Tensor, gallery_keys: Tensor) -> Tensor:
    """Number of gallery items with the key of each query; (Nq,) int64, 0 for negative keys.

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
    """Keys of the distinct combinations of the columns' values, one each; -1 where any of them is negative.

    Args:
        columns: (N,) int64 each.

    Returns:
        (N,) int64 from 0 on.
    """
    table = torch.stack(columns, dim=1)
    keys = torch.unique(table, dim=0, return_inverse=True)[1]
    return torch.where((table < 0).any(dim=1), NOBODY, keys)


def _ranges(query_keys: Tensor, ordered: Tensor) -> tuple[Tensor, Tensor]:
    """First place of each query's key in the sorted gallery keys, and the number of places that have it."""
    first = torch.searchsorted(ordered, query_keys)
    counts = torch.searchsorted(ordered, query_keys, right=True) - first
    return first, counts.masked_fill(query_keys < 0, 0)
