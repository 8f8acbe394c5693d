"""Retrieval metrics as functions of ranked hits; each gives one value per query, so that means and shards compose.

`hits[q, i]` is True where the (i+1)-th neighbour of query q has its label; `relevant[q]` is R, how many gallery
items have it (the query itself not counted, in either). With `ties`, the runs of neighbours that a search could not
tell apart, each value is the mean over all orders of theirs, instead of the value of the one order that came by chance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dml.checks import check_count, check_integers
from lightning_dml.errors import InputError
from lightning_dml.retrieval.ties import Ties


def recall_at_k(hits: Tensor, k: int, ties: Ties | None = None) -> Tensor:
    """1 where any of the first `k` neighbours is a hit, else 0; with ties, the probability of it.

    A run of G tied items with g hits, of which m come among the first k, holds none of the g there with probability
    C(G - g, m) / C(G, m). This is the field's Recall@K (Song et al., Deep Metric Learning via Lifted Structured Feature
    Embedding, arXiv 1511.06452), not the share of positives that were found.

    Args:
        hits: (Nq, columns) bool in rank order.
        k: from 1 to the number of columns.
        ties: the runs of tied neighbours; None, there are none.

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
    if ties is None:
        return hits[:, :k].any(dim=1).double()
    start, size, positives = (column[:, k - 1] for column in ties)
    surely = _hits_before(hits, ties)[:, k - 1] > 0
    # Of the run at place k, the places from its start up to k are drawn one after the other.
    draws = torch.arange(k, device=hits.device)
    left = (size[:, None] - draws).clamp_min(1).double()
    misses = ((left - positives[:, None]).clamp_min(0) / left).masked_fill(draws >= (k - start)[:, None], 1.0)
    return torch.where(surely, 1.0, 1.0 - misses.prod(dim=1))


def precision_at_k(hits: Tensor, k: int, ties: Ties | None = None) -> Tensor:
    """Share of hits among the first `k` neighbours: (1/k) sum_{i<=k} rel(i).

    Source: Manning, Raghavan and Schütze, Introduction to Information Retrieval, section 8.4.

    Args:
        hits: (Nq, columns) bool in rank order.
        k: from 1 to the number of columns.
        ties: the runs of tied neighbours; None, there are none.

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
    return _expected_hits(hits, ties)[:, :k].sum(dim=1).double() / k


def r_precision(hits: Tensor, relevant: Tensor, ties: Ties | None = None) -> Tensor:
    """Share of hits among the first R neighbours: (1/R) sum_{i<=R} rel(i).

    Source: Musgrave et al., A Metric Learning Reality Check, arXiv 2003.08505.

    Args:
        hits: (Nq, columns) bool in rank order, with at least max(R) columns.
        relevant: (Nq,) integers, the R of each query.
        ties: the runs of tied neighbours; None, there are none.

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
    return (_expected_hits(hits, ties) * _first_r(hits, relevant)).sum(dim=1).double() / relevant


def map_at_r(hits: Tensor, relevant: Tensor, ties: Ties | None = None) -> Tensor:
    """Average precision over the first R neighbours: (1/R) sum_{i<=R} P(i) rel(i).

    P(i) is the precision at rank i. Source: Musgrave et al., A Metric Learning Reality Check, arXiv 2003.08505.

    Args:
        hits: (Nq, columns) bool in rank order, with at least max(R) columns.
        relevant: (Nq,) integers, the R of each query.
        ties: the runs of tied neighbours; None, there are none.

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
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    within = _first_r(hits, relevant)
    if ties is None:
        within_r = (hits & within).double()
        precisions = within_r.cumsum(dim=1) / ranks
        return (precisions * within_r).sum(dim=1) / relevant
    # A hit at place t of its run follows, on average, (t - 1) (g - 1) / (G - 1) hits of the same run.
    share = _expected_hits(hits, ties)
    others = (ties.positives - 1).double() / (ties.size - 1).clamp_min(1)
    before = _hits_before(hits, ties) + (ranks - 1 - ties.start) * others
    return (share * (before + 1) / ranks * within).sum(dim=1) / relevant


def ndcg_at_k(hits: Tensor, relevant: Tensor, k: int, ties: Ties | None = None) -> Tensor:
    """Normalised discounted cumulative gain: sum_{i<=k} rel(i) / log2(i + 1), divided by its largest possible value.

    The largest is reached when the first min(k, R) neighbours are hits. Source: Järvelin and Kekäläinen, Cumulated
    Gain-Based Evaluation of IR Techniques, ACM TOIS 20(4), 2002, with the discount log2(i + 1) that is usual today.

    Args:
        hits: (Nq, columns) bool in rank order.
        relevant: (Nq,) integers, the R of each query.
        k: from 1 to the number of columns.
        ties: the runs of tied neighbours; None, there are none.

    Returns:
        (Nq,) float64; NaN where R is 0, for which the metric is not defined.

    Raises:
        InputError: shapes or dtypes are wrong, `k` is out of range, or a query has more than R hits.

    Examples:
        >>> hits = torch.tensor([[True, False, True], [False, True, False]])
        >>> [round(value, 4) for value in ndcg_at_k(hits, torch.tensor([2, 1]), 3).tolist()]
        [0.9197, 0.6309]
    """
    relevant = _check_relevant(hits, relevant, whole=False)
    _check_k(hits, k)
    discounts = 1 / torch.arange(2, k + 2, device=hits.device, dtype=torch.float64).log2()
    best = torch.cat([discounts.new_zeros(1), discounts.cumsum(dim=0)])[relevant.clamp_max(k)]
    gained = (_expected_hits(hits, ties)[:, :k] * discounts).sum(dim=1)
    return torch.where(relevant > 0, gained / best, float("nan"))


def _expected_hits(hits: Tensor, ties: Ties | None) -> Tensor:
    """Probability of a hit at each place, float64; `hits` itself without ties."""
    return hits if ties is None else ties.positives.double() / ties.size


def _hits_before(hits: Tensor, ties: Ties) -> Tensor:
    """Hits that are nearer than the run of each place, (Nq, columns) float64; no order changes them."""
    before = hits.long().cumsum(dim=1) - hits.long()
    return before.gather(1, ties.start).double()


def _first_r(hits: Tensor, relevant: Tensor) -> Tensor:
    """True at the places among the first R, bool."""
    return torch.arange(hits.shape[1], device=hits.device) < relevant[:, None]


def _check_relevant(hits: Tensor, relevant: Tensor, whole: bool = True) -> Tensor:
    """Returns `relevant` as int64; `whole` asks for a column for each of the R."""
    _check_hits(hits)
    check_integers("relevant", relevant, len(hits), "hits")
    relevant = relevant.long()
    if len(hits) == 0:
        return relevant
    if int(relevant.min()) < 0:
        raise InputError(f"relevant must be counts of gallery positives, got {int(relevant.min())}")
    if whole and int(relevant.max()) > hits.shape[1]:
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
    check_count("k", k, 1, hits.shape[1], "hits has that many columns: search for more neighbours for a larger k")
