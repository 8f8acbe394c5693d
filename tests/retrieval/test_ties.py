"""Metrics of tied rankings against their mean over every order of the tied items, and the search for ties."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lightning_dml.retrieval import (
    Ties,
    average_precision,
    map_at_r,
    ndcg_at_k,
    precision_at_k,
    r_precision,
    recall_at_k,
    reciprocal_rank,
    tie_runs,
)
from lightning_dml.retrieval.ties import RESOLUTION, tied_with_next, with_last_run
from tests.retrieval.cases import (
    Hits,
    Runs,
    orders,
    slow_average_precision,
    slow_map_at_r,
    slow_ndcg,
    slow_precision,
    slow_recall,
    slow_reciprocal_rank,
)


class Tied(NamedTuple):
    """A ranking of which the first columns are known, as the functions get it, and the runs that it was made of."""

    runs: Runs
    columns: int
    hits: Tensor
    ties: Ties

    def expected(self, metric: Callable[[Hits], float]) -> float:
        """Mean of `metric` over all orders of the tied items."""
        values = [metric(order) for order in orders(self.runs)]
        return math.fsum(values) / len(values)


@st.composite
def tied_rankings(draw: st.DrawFn) -> Tied:
    """Runs of up to five items, of which the last that is seen may go on behind the last column."""
    runs = draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=4))
    whole = [hit for run in runs for hit in run]
    columns = draw(st.integers(1, len(whole)))
    return tied_ranking(runs, columns)


def tied_ranking(runs: Runs, columns: int) -> Tied:
    """A ranking as a search for `columns` neighbours sees it."""
    whole = torch.tensor([[hit for run in runs for hit in run]])
    number = torch.tensor([at for at, run in enumerate(runs) for _ in run])
    tied = (number[1:] == number[:-1])[None]
    hits = whole[:, :columns]
    ties = tie_runs(hits, tied[:, : columns - 1])
    last = runs[int(number[columns - 1])]
    ties = with_last_run(ties, torch.tensor([0]), torch.tensor([len(last)]), torch.tensor([sum(last)]))
    return Tied(runs, columns, hits, ties)


def positive_places(ranking: Tied) -> tuple[Tensor, Tensor]:
    """The whole ranking as `average_precision` gets it."""
    ranks, tied, above = [], [], 0
    for run in ranking.runs:
        ranks += [above + 1] * sum(run)
        tied += [len(run)] * sum(run)
        above += len(run)
    return torch.tensor([ranks], dtype=torch.int64), torch.tensor([tied], dtype=torch.int64)


def assert_equal(value: Tensor, expected: float) -> None:
    """One float64 value, to twelve digits."""
    assert value.dtype == torch.float64 and value.shape == (1,)
    np.testing.assert_allclose(value.item(), expected, rtol=0, atol=1e-12)


def test_the_orders_are_all_permutations() -> None:
    """The oracle below counts each placing of the hits once; every one stands for equally many permutations."""
    run = [True, False, True, False, False]
    permuted = [tuple(run[at] for at in order) for order in permutations(range(5))]
    placings = list(orders([run]))
    assert len(placings) == 10 and all(permuted.count(placing) == 12 for placing in placings)


@given(ranking=tied_rankings(), extra=st.integers(0, 3))
@example(ranking=tied_ranking([[True], [False, True, True, False, False]], 3), extra=0)
def test_metrics_at_k_are_means_over_all_orders(ranking: Tied, extra: int) -> None:
    """A model that has collapsed must score chance, not what the order of the files makes of it."""
    r = max(1, sum(map(sum, ranking.runs))) + extra
    for k in range(1, ranking.columns + 1):
        pairs: list[tuple[Tensor, Callable[[Hits], float]]] = [
            (recall_at_k(ranking.hits, k, ranking.ties), partial(slow_recall, k=k)),
            (precision_at_k(ranking.hits, k, ranking.ties), partial(slow_precision, k=k)),
            (ndcg_at_k(ranking.hits, torch.tensor([r]), k, ranking.ties), partial(slow_ndcg, r=r, k=k)),
        ]
        for value, metric in pairs:
            assert_equal(value, ranking.expected(metric))


@given(ranking=tied_rankings(), data=st.data())
def test_metrics_at_r_are_means_over_all_orders(ranking: Tied, data: st.DataObject) -> None:
    """The hits before a place within a run are an expectation as well, which is easily taken for independent."""
    hits = max(1, int(ranking.hits.sum()))
    # R may not be below the hits of any order; where the run that goes on has more, only such R can be asked for.
    within = min(ranking.columns, sum(map(sum, ranking.runs)))
    r = data.draw(st.integers(max(hits, within), ranking.columns))
    counts = torch.tensor([r])
    assert_equal(
        r_precision(ranking.hits, counts, ranking.ties), ranking.expected(lambda order: slow_precision(order, r))
    )
    assert_equal(map_at_r(ranking.hits, counts, ranking.ties), ranking.expected(lambda order: slow_map_at_r(order, r)))


@given(ranking=tied_rankings())
def test_metrics_of_the_whole_ranking_are_means_over_all_orders(ranking: Tied) -> None:
    """MAP and MRR work on ranks instead of hits, with closed forms of their own."""
    ranks, tied = positive_places(ranking)
    if not ranks.numel():
        assert average_precision(ranks, tied).isnan().all() and reciprocal_rank(ranks, tied).isnan().all()
        return
    assert_equal(average_precision(ranks, tied), ranking.expected(slow_average_precision))
    assert_equal(reciprocal_rank(ranks, tied), ranking.expected(slow_reciprocal_rank))


@given(ranking=tied_rankings(), data=st.data())
def test_the_order_that_came_by_chance_does_not_matter(ranking: Tied, data: st.DataObject) -> None:
    """Two searches that order the tied items differently must lead to the same number, to the last bit."""
    other = tied_ranking([data.draw(st.permutations(run)) for run in ranking.runs], ranking.columns)
    r = torch.tensor([max(1, sum(map(sum, ranking.runs)))])
    for k in range(1, ranking.columns + 1):
        assert recall_at_k(other.hits, k, other.ties).equal(recall_at_k(ranking.hits, k, ranking.ties))
        assert precision_at_k(other.hits, k, other.ties).equal(precision_at_k(ranking.hits, k, ranking.ties))
        assert ndcg_at_k(other.hits, r, k, other.ties).equal(ndcg_at_k(ranking.hits, r, k, ranking.ties))
    if int(r) <= ranking.columns:
        assert map_at_r(other.hits, r, other.ties).equal(map_at_r(ranking.hits, r, ranking.ties))
        assert r_precision(other.hits, r, other.ties).equal(r_precision(ranking.hits, r, ranking.ties))


@given(rows=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=0, max_size=5), k=st.integers(1, 7))
def test_runs_of_one_change_nothing(rows: list[list[bool]], k: int) -> None:
    """A query without ties gives the very number that it gave before ties were looked at."""
    hits = torch.tensor(rows, dtype=torch.bool).reshape(len(rows), 7)
    ties = tie_runs(hits, torch.zeros(len(rows), 6, dtype=torch.bool))
    relevant = hits.sum(dim=1).clamp_min(1)
    pairs = [
        (recall_at_k(hits, k), recall_at_k(hits, k, ties)),
        (precision_at_k(hits, k), precision_at_k(hits, k, ties)),
        (r_precision(hits, relevant), r_precision(hits, relevant, ties)),
        (map_at_r(hits, relevant), map_at_r(hits, relevant, ties)),
        (ndcg_at_k(hits, relevant, k), ndcg_at_k(hits, relevant, k, ties)),
    ]
    for plain, with_ties in pairs:
        torch.testing.assert_close(with_ties, plain, rtol=0, atol=1e-15)
        assert with_ties.dtype == plain.dtype == torch.float64 and with_ties.shape == plain.shape == (len(rows),)
    assert pairs[0][0].equal(pairs[0][1])


def test_very_large_runs_stay_finite() -> None:
    """A collapsed model makes one run of the whole gallery, whose binomial coefficients leave float64."""
    hits = torch.zeros(1, 1000, dtype=torch.bool)
    tied = torch.ones(1, 999, dtype=torch.bool)
    size, positives, k = 60_000, 12, 1000
    rows = torch.tensor([0])
    ties = with_last_run(tie_runs(hits, tied), rows, torch.tensor([size]), torch.tensor([positives]))
    missed = math.comb(size - positives, k) / math.comb(size, k)
    np.testing.assert_allclose(recall_at_k(hits, k, ties).item(), 1 - missed, rtol=1e-12)
    np.testing.assert_allclose(precision_at_k(hits, k, ties).item(), positives / size, rtol=1e-12)


@given(rows=st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=6, max_size=6), min_size=1, max_size=4))
def test_tie_runs_equal_a_loop(rows: list[list[tuple[bool, bool]]]) -> None:
    """Every metric of tied items rests on where their run starts, how long it is and what is in it."""
    hits = torch.tensor([[hit for hit, _ in row] for row in rows])
    tied = torch.tensor([[joined for _, joined in row[1:]] for row in rows])
    ties = tie_runs(hits, tied)
    for row, line in enumerate(rows):
        for place in range(6):
            first, last = place, place
            while first > 0 and line[first][1]:
                first -= 1
            while last < 5 and line[last + 1][1]:
                last += 1
            run = [hit for hit, _ in line[first : last + 1]]
            assert [int(column[row, place]) for column in ties] == [first, len(run), sum(run)]
    assert all(column.dtype == torch.int64 for column in ties)


def test_tie_runs_of_one_column_and_of_none() -> None:
    """A search for a single neighbour, and a block without queries, have no next neighbour to be tied with."""
    ties = tie_runs(torch.tensor([[True], [False]]), torch.empty(2, 0, dtype=torch.bool))
    assert [column.tolist() for column in ties] == [[[0], [0]], [[1], [1]], [[1], [0]]]
    assert tie_runs(torch.empty(0, 3, dtype=torch.bool), torch.empty(0, 2, dtype=torch.bool)).start.shape == (0, 3)


def test_only_the_last_run_of_the_named_queries_goes_on() -> None:
    """Runs that end before the last column, and queries whose run ends with it, were seen whole."""
    hits = torch.tensor([[True, False, True, False], [True, False, True, False]])
    tied = torch.tensor([[True, False, True], [True, False, True]])
    before = tie_runs(hits, tied)
    copies = [column.clone() for column in before]
    ties = with_last_run(before, torch.tensor([1]), torch.tensor([9]), torch.tensor([4]))
    assert ties.start.tolist() == [[0, 0, 2, 2]] * 2
    assert ties.size.tolist() == [[2, 2, 2, 2], [2, 2, 9, 9]]
    assert ties.positives.tolist() == [[1, 1, 1, 1], [1, 1, 4, 4]]
    assert all(now.equal(then) for now, then in zip(before, copies, strict=True))


INFINITE = float("inf")


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gaps_below_the_resolution_are_ties(sign: float) -> None:
    """Rounding differs between searches and machines; a gap that it can turn round must not decide a metric."""
    values = sign * torch.tensor([[0.5, 0.5, 0.5 - RESOLUTION / 2, 0.5 - 2 * RESOLUTION, 0.25]])
    assert tied_with_next(values, torch.ones(1, 1)).tolist() == [[True, True, False, False]]
    assert tied_with_next(values, torch.full((1, 5), 4.0)).tolist() == [[True, True, True, False]]


def test_the_resolution_grows_with_the_larger_of_two_scales() -> None:
    """The inner product with a long row is rounded coarsely, whichever of two neighbours is the long one."""
    values = torch.tensor([[1.0, 1.0 - 4 * RESOLUTION], [1.0, 1.0 - 4 * RESOLUTION], [1.0, 1.0 - 4 * RESOLUTION]])
    scale = torch.tensor([[1.0, 8.0], [8.0, 1.0], [1.0, 1.0]])
    assert tied_with_next(values, scale).tolist() == [[True], [True], [False]]
    assert tied_with_next(values, torch.tensor([[8.0], [1.0], [8.0]])).tolist() == [[True], [False], [True]]


@pytest.mark.parametrize("spacings", range(1, 17))
def test_rounded_lengths_of_unit_rows_decide_nothing(spacings: int) -> None:
    """Which of several equal neighbours comes last depends on the order of the rows, and their lengths round apart."""
    values = torch.tensor([[1.0, 1.0 - spacings * 2.0**-24]])  # floats next to 1 lie on a grid, as a gap does
    lengths = torch.tensor([1 - 2.0**-22, 1.0, 1 + 2.0**-22])
    assert len({bool(tied_with_next(values, length.reshape(1, 1))) for length in lengths}) == 1


@pytest.mark.parametrize("missing", [INFINITE, -INFINITE, float("nan")])
@pytest.mark.parametrize("columns", [1, 4])
def test_a_missing_neighbour_is_tied_with_nothing(missing: float, columns: int) -> None:
    """Places without a candidate would otherwise form a run that dilutes the hits of the real ones."""
    values = torch.tensor([[0.5, 0.5, missing, missing]])
    assert tied_with_next(values, torch.ones(1, columns)).tolist() == [[True, False, False]]


def test_a_single_place_has_no_next_one() -> None:
    """A gallery may hold one item."""
    assert tied_with_next(torch.ones(3, 1), torch.ones(3, 1)).shape == (3, 0)
