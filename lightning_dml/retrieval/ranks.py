"""Metrics of a whole ranking, from the ranks of a query's positives: average precision and reciprocal rank.

`ranks[q, j]` is 1 + the number of gallery items that are nearer to query q than its j-th nearest positive, and
`tied[q, j]` how many items are as near as that positive, itself included. Positives that are tied have the same rank.
Behind a query's last positive there are zeros. With ties, values are expected ones over all orders of the tied items.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dml.errors import InputError
from lightning_dml.retrieval.ties import Ties, tie_runs


def average_precision(ranks: Tensor, tied: Tensor | None = None) -> Tensor:
    """Mean of the precisions at the ranks of all positives: (1/R) sum_j j / rank_j, over the whole ranking.

    Its mean over queries is MAP; unlike MAP@R it does not stop at rank R. Source: Manning, Raghavan and Schütze,
    Introduction to Information Retrieval, section 8.4; ties as in McSherry and Najork, ECIR 2008.

    Args:
        ranks: (Nq, P) int64, ascending in each row, then zeros.
        tied: (Nq, P) int64, how many items share each rank; None, one each.

    Returns:
        (Nq,) float64; NaN for a query without positives.

    Raises:
        InputError: shapes or dtypes are wrong, ranks do not ascend, or more positives are tied than items.

    Examples:
        >>> average_precision(torch.tensor([[1, 4], [2, 0]])).tolist()
        [0.75, 0.5]
    """
    tied, runs = _check_ranks(ranks, tied)
    present = ranks > 0
    above, size = (ranks - 1).clamp_min(0).double(), tied.clamp_min(1).double()
    before, positives = runs.start, runs.positives
    # The run's places are above + 1 ... above + G. At place t a positive stands with probability g / G, after
    # before + (t - 1) (g - 1) / (G - 1) others on average; the sum over t is closed by harmonic numbers.
    harmonic = torch.where(size == 1, 1 / (above + 1), torch.digamma(above + size + 1) - torch.digamma(above + 1))
    others = (positives - 1) / (size - 1).clamp_min(1)
    share = ((before + 1) * harmonic + others * (size - (above + 1) * harmonic)) / size
    return (share * present).sum(dim=1) / present.sum(dim=1)


def reciprocal_rank(ranks: Tensor, tied: Tensor | None = None) -> Tensor:
    """One over the rank of the nearest positive: 1 / rank_1.

    Its mean over queries is MRR. Source: Voorhees, The TREC-8 Question Answering Track Report, 1999; ties as in
    McSherry and Najork, ECIR 2008.

    Args:
        ranks: (Nq, P) int64, ascending in each row, then zeros.
        tied: (Nq, P) int64, how many items share each rank; None, one each.

    Returns:
        (Nq,) float64; NaN for a query without positives.

    Raises:
        InputError: shapes or dtypes are wrong, ranks do not ascend, or more positives are tied than items.

    Examples:
        >>> reciprocal_rank(torch.tensor([[1, 4], [2, 0]])).tolist()
        [1.0, 0.5]
    """
    tied, runs = _check_ranks(ranks, tied)
    if ranks.shape[1] == 0:
        return torch.full((len(ranks),), float("nan"), dtype=torch.float64, device=ranks.device)
    # Few combinations occur, and a run of thousands is summed once for all queries that have it.
    first = torch.stack([ranks[:, 0], tied[:, 0], runs.positives[:, 0]], dim=1)
    cases, which = torch.unique(first, dim=0, return_inverse=True)
    values = [_expected_reciprocal(int(rank), int(items), int(hits)) for rank, items, hits in cases.tolist()]
    return torch.tensor(values, dtype=torch.float64, device=ranks.device)[which]


def _expected_reciprocal(rank: int, items: int, hits: int) -> float:
    """Mean of 1 / rank of the first of `hits` positives in a run of `items` that begins at `rank`."""
    if rank == 0:
        return float("nan")
    if items == hits:
        return 1 / rank
    # The first positive is the t-th of the run with probability C(G - t, g - 1) / C(G, g).
    place = torch.arange(items - hits + 1, dtype=torch.float64)
    passed = torch.cat([torch.ones(1, dtype=torch.float64), (items - hits - place[:-1]) / (items - place[:-1])])
    chances = passed.cumprod(dim=0) * hits / (items - place)
    return float((chances / (rank + place)).sum())


def _check_ranks(ranks: Tensor, tied: Tensor | None) -> tuple[Tensor, Ties]:
    """Numbers of items that share each rank, ones where not given, and the runs of positives with equal ranks."""
    if ranks.ndim != 2 or ranks.dtype != torch.int64:
        raise InputError(
            f"ranks must be an int64 matrix (queries, positives), got {ranks.dtype} of shape {tuple(ranks.shape)}"
        )
    if tied is not None and (tied.shape != ranks.shape or tied.dtype != torch.int64):
        raise InputError(
            f"tied must be int64 of the shape of ranks, {tuple(ranks.shape)}, got {tied.dtype} of {tuple(tied.shape)}"
        )
    present, behind = ranks > 0, ranks[:, 1:] > 0
    wrong = behind & ((ranks[:, 1:] < ranks[:, :-1]) | ~present[:, :-1])
    if bool((ranks < 0).any()) or bool(wrong.any()):
        raise InputError("ranks must ascend from 1 on in each row, with zeros only behind the last positive; sort them")
    runs = tie_runs(present, behind & (ranks[:, 1:] == ranks[:, :-1]))
    if tied is None:
        tied = torch.ones_like(ranks)
    if bool((present & (runs.positives > tied)).any()):
        raise InputError("ranks: positives share a rank; tied must say how many items do, those positives included")
    return tied, runs
