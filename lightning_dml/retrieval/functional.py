"""Retrieval metrics as functions of ranked hits; each gives one value per query, so that means and shards compose.

`hits[q, i]` says whether the (i+1)-th neighbour of query q has its label; `relevant[q]` is R, how many gallery
items have it (the query itself not counted, in either).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dml.errors import InputError
from lightning_dml.retrieval.checks import check_integers


def recall_at_k(hits: Tensor, k: int) -> Tensor:
    """Whether any of the first `k` neighbours is a hit: 1 or 0.

    This is the field's Recall@K (Song et al., Deep Metric Learning via Lifted Structured Feature Embedding,
    arXiv 1511.06452), not the share of positives that were found.

    Args:
        hits: (Nq, columns) bool in rank order.
        k: from 1 to the number of columns.

    Returns:
        (Nq,) float64.

    Raises:
        InputError: `hits` is not a bool matrix or `k` is out of range.

    Examples:
        >>> hits = torch.tensor([[False, True, True], [False, False, True]])
        >>> recall_at_k(hits, 2).tolist()
        [1.0, 0.0]
    """
    _check_hits(hits)
    _check_k(hits, k)
    return hits[:, :k].any(dim=1).double()


def precision_at_k(hits: Tensor, k: int) -> Tensor:
    """Share of hits among the first `k` neighbours: (1/k) sum_{i<=k} rel(i).

    Source: Manning, Raghavan and Schütze, Introduction to Information Retrieval, section 8.4.

    Args:
        hits: (Nq, columns) bool in rank order.
        k: from 1 to the number of columns.

    Returns:
        (Nq,) float64.

    Raises:
        InputError: `hits` is not a bool matrix or `k` is out of range.

    Examples:
        >>> hits = torch.tensor([[False, True, True], [False, False, True]])
        >>> precision_at_k(hits, 2).tolist()
        [0.5, 0.0]
    """
    _check_hits(hits)
    _check_k(hits, k)
    return hits[:, :k].sum(dim=1).double() / k


def r_precision(hits: Tensor, relevant: Tensor) -> Tensor:
    """Share of hits among the first R neighbours: (1/R) sum_{i<=R} rel(i).

    Source: Musgrave et al., A Metric Learning Reality Check, arXiv 2003.08505.

    Args:
        hits: (Nq, columns) bool in rank order, with at least max(R) columns.
        relevant: (Nq,) integers, the R of each query.

    Returns:
        (Nq,) float64; NaN where R is 0, for which the metric is not defined.

    Raises:
        InputError: shapes or dtypes are wrong, there are fewer than max(R) columns, or a query has more than R hits.

    Examples:
        >>> hits = torch.tensor([[True, False, True], [False, True, False]])
        >>> r_precision(hits, torch.tensor([2, 1])).tolist()
        [0.5, 0.0]
    """
    relevant = _check_relevant(hits, relevant)
    return _first_r(hits, relevant).sum(dim=1).double() / relevant


def map_at_r(hits: Tensor, relevant: Tensor) -> Tensor:
    """Average precision over the first R neighbours: (1/R) sum_{i<=R} P(i) rel(i).

    P(i) is the precision at rank i. Source: Musgrave et al., A Metric Learning Reality Check, arXiv 2003.08505.

    Args:
        hits: (Nq, columns) bool in rank order, with at least max(R) columns.
        relevant: (Nq,) integers, the R of each query.

    Returns:
        (Nq,) float64; NaN where R is 0, for which the metric is not defined.

    Raises:
        InputError: shapes or dtypes are wrong, there are fewer than max(R) columns, or a query has more than R hits.

    Examples:
        >>> hits = torch.tensor([[True, False, True], [False, True, False]])
        >>> map_at_r(hits, torch.tensor([2, 2])).tolist()
        [0.5, 0.25]
    """
    relevant = _check_relevant(hits, relevant)
    counted = _first_r(hits, relevant).double()
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precisions = counted.cumsum(dim=1) / ranks
    return (precisions * counted).sum(dim=1) / relevant


def _first_r(hits: Tensor, relevant: Tensor) -> Tensor:
    """`hits` with everything after rank R put to False."""
    return hits & (torch.arange(hits.shape[1], device=hits.device) < relevant[:, None])


def _check_relevant(hits: Tensor, relevant: Tensor) -> Tensor:
    _check_hits(hits)
    check_integers("relevant", relevant, len(hits))
    relevant = relevant.long()
    if len(hits) == 0:
        return relevant
    if int(relevant.min()) < 0:
        raise InputError(f"relevant must be counts of gallery positives, got {int(relevant.min())}")
    if int(relevant.max()) > hits.shape[1]:
        raise InputError(
            f"hits has {hits.shape[1]} columns but relevant goes up to {int(relevant.max())}; search for at least as "
            "many neighbours as the largest R"
        )
    surplus = (hits.sum(dim=1) > relevant).nonzero().flatten()
    if len(surplus):
        raise InputError(
            f"hits has more hits than relevant allows in {len(surplus)} rows, the first is row {int(surplus[0])}; "
            "leave self out of the neighbours and count every gallery positive in relevant"
        )
    return relevant


def _check_hits(hits: Tensor) -> None:
    if hits.ndim != 2 or hits.dtype != torch.bool:
        raise InputError(f"hits must be a bool matrix (queries, ranks), got {hits.dtype} of shape {tuple(hits.shape)}")


def _check_k(hits: Tensor, k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= hits.shape[1]:
        raise InputError(
            f"k must be an integer from 1 to the {hits.shape[1]} columns of hits, got {k!r}; search for more neighbours"
        )
