"""Each metric function against a loop over ranks; their errors; and the doctests of the package."""

from __future__ import annotations

import doctest
import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from lightning_dml.errors import InputError
from lightning_dml.retrieval import map_at_r, ndcg_at_k, precision_at_k, r_precision, recall_at_k, tie_runs


def slow_precision(hits: list[bool], k: int) -> float:
    """Precision at k by counting."""
    return sum(1 for hit in hits[:k] if hit) / k


def slow_map_at_r(hits: list[bool], relevant: int) -> float:
    """MAP@R as Musgrave et al. (2020) define it."""
    total = 0.0
    for rank in range(1, relevant + 1):
        if hits[rank - 1]:
            total += slow_precision(hits, rank)
    return total / relevant


def slow_ndcg(hits: list[bool], relevant: int, k: int) -> float:
    """Discounted gain of the first k over that of a ranking with all positives in front."""
    gain = sum(1 / math.log2(rank + 1) for rank, hit in enumerate(hits[:k], 1) if hit)
    return gain / sum(1 / math.log2(rank + 1) for rank in range(1, min(k, relevant) + 1))


@given(data=st.data(), n_queries=st.integers(0, 6), columns=st.integers(1, 12))
def test_equals_a_loop_over_ranks(data: st.DataObject, n_queries: int, columns: int) -> None:
    """The definitions decide whether numbers can be compared with papers."""
    hits = [data.draw(st.lists(st.booleans(), min_size=columns, max_size=columns)) for _ in range(n_queries)]
    relevant = [data.draw(st.integers(max(1, sum(row)), columns)) for row in hits]
    k = data.draw(st.integers(1, columns))
    tensor = torch.tensor(hits, dtype=torch.bool).reshape(n_queries, columns)
    counts = torch.tensor(relevant, dtype=torch.int64)

    expected = {
        "recall": [float(any(row[:k])) for row in hits],
        "precision": [slow_precision(row, k) for row in hits],
        "r_precision": [slow_precision(row, r) for row, r in zip(hits, relevant, strict=True)],
        "map": [slow_map_at_r(row, r) for row, r in zip(hits, relevant, strict=True)],
        "ndcg": [slow_ndcg(row, r, k) for row, r in zip(hits, relevant, strict=True)],
    }
    values = {
        "recall": recall_at_k(tensor, k),
        "precision": precision_at_k(tensor, k),
        "r_precision": r_precision(tensor, counts),
        "map": map_at_r(tensor, counts),
        "ndcg": ndcg_at_k(tensor, counts, k),
    }
    for name, value in values.items():
        assert value.dtype == torch.float64 and value.shape == (n_queries,)
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-12, atol=0)


def test_map_at_r_is_not_average_precision() -> None:
    """The two are often confused, and average precision is higher."""
    # The hit at rank 3 lies beyond R = 2: average precision would give (1 + 2/3) / 2.
    hits = torch.tensor([[True, False, True]])
    assert map_at_r(hits, torch.tensor([2])).item() == 0.5


@pytest.mark.parametrize("function", [r_precision, map_at_r])
def test_a_query_without_positives_has_no_value(function: Callable[..., torch.Tensor]) -> None:
    """Counted as 0, queries that nothing could answer would lower the mean."""
    values = function(torch.tensor([[False, False], [True, False]]), torch.tensor([0, 1], dtype=torch.int32))
    assert values.isnan().tolist() == [True, False]
    assert values[1] == 1.0


@given(data=st.data(), items=st.integers(2, 12), queries=st.integers(1, 4))
@pytest.mark.parametrize("levels", [2, 100])
def test_ndcg_is_that_of_scikit_learn(levels: int, data: st.DataObject, items: int, queries: int) -> None:
    """Discounts and the ideal ranking have variants; few levels of similarity make ties, which both average."""
    wanted = [data.draw(st.lists(st.booleans(), min_size=items, max_size=items).filter(any)) for _ in range(queries)]
    level = st.integers(1, levels)
    scores = torch.tensor([data.draw(st.lists(level, min_size=items, max_size=items)) for _ in range(queries)])
    relevance = torch.tensor(wanted)
    ordered, order = scores.sort(dim=1, descending=True)
    hits = relevance.gather(1, order)
    ties = tie_runs(hits, ordered[:, 1:] == ordered[:, :-1])
    for k in range(1, items + 1):
        mean = ndcg_score(relevance.numpy().astype(int), scores.numpy(), k=k)
        value = ndcg_at_k(hits, relevance.sum(dim=1), k, ties)
        assert value.mean().item() == pytest.approx(mean, abs=1e-12)


def test_ndcg_of_more_places_than_positives() -> None:
    """A perfect ranking scores 1 also where K is larger than R, and where R is larger than the columns."""
    hits = torch.tensor([[True, False, False], [True, True, True], [False, False, False]])
    relevant = torch.tensor([1, 50, 0])
    for k in (1, 2, 3):
        value = ndcg_at_k(hits, relevant, k)
        assert value[:2].tolist() == pytest.approx([1, 1], abs=1e-15) and value[2].isnan()
        with_ties = ndcg_at_k(hits, relevant, k, tie_runs(hits, torch.ones(3, 2, dtype=torch.bool)))
        assert with_ties[2].isnan() and with_ties[1].item() == pytest.approx(1, abs=1e-15)


HITS = torch.tensor([[True, False, True], [False, True, False]])


@pytest.mark.parametrize("function", [recall_at_k, precision_at_k])
@pytest.mark.parametrize("k", [0, 4, 1.0, True])
def test_k_out_of_range(function: Callable[..., Any], k: Any) -> None:
    """Slicing past the end would silently give the metric of a smaller k."""
    with pytest.raises(
        InputError,
        match=f"k must be an integer from 1 to 3, got {k}; hits has that many columns: search for more neighbours",
    ):
        function(HITS, k)


@pytest.mark.parametrize("k", [0, 4, 1.0, True])
def test_k_of_ndcg_out_of_range(k: Any) -> None:
    """Its discounts would be cut short without a word."""
    with pytest.raises(
        InputError,
        match=f"k must be an integer from 1 to 3, got {k}; hits has that many columns: search for more neighbours",
    ):
        ndcg_at_k(HITS, torch.tensor([2, 1]), k)


@pytest.mark.parametrize("hits", [HITS.long(), HITS[0]])
def test_hits_are_a_bool_matrix(hits: torch.Tensor) -> None:
    """Labels or similarities passed by mistake would be taken for hits."""
    calls: list[Callable[[], torch.Tensor]] = [
        lambda: recall_at_k(hits, 1),
        lambda: precision_at_k(hits, 1),
        lambda: r_precision(hits, torch.tensor([1, 1])),
        lambda: map_at_r(hits, torch.tensor([1, 1])),
        lambda: ndcg_at_k(hits, torch.tensor([1, 1]), 1),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"hits must be a bool matrix \(queries, ranks\), got torch\."):
            call()


@pytest.mark.parametrize("function", [r_precision, map_at_r])
@pytest.mark.parametrize(
    ("relevant", "message"),
    [
        (torch.tensor([2]), r"relevant must have shape \(2,\)"),
        (torch.tensor([2.0, 1.0]), "relevant must be integers, got torch.float32"),
        (torch.tensor([2, -1]), "relevant must be counts of gallery positives, got -1"),
        (torch.tensor([2, 4]), "hits has 3 columns but relevant goes up to 4"),
        (torch.tensor([1, 1]), "more hits than relevant allows in 1 rows, the first is row 0"),
    ],
)
def test_relevant_must_fit_the_hits(function: Callable[..., Any], relevant: torch.Tensor, message: str) -> None:
    """Counts that contradict the hits would give values above 1."""
    with pytest.raises(InputError, match=message):
        function(HITS, relevant)
    if "columns" not in message:  # its ideal ranking is cut at K
        with pytest.raises(InputError, match=message):
            ndcg_at_k(HITS, relevant, 2)


def test_no_queries_have_no_values() -> None:
    """The last rank of a large job may have no query, whose relevant counts then have no largest."""
    hits, relevant = torch.empty(0, 3, dtype=torch.bool), torch.empty(0, dtype=torch.int64)
    ties = tie_runs(hits, torch.empty(0, 2, dtype=torch.bool))
    for values in (
        recall_at_k(hits, 2, ties),
        precision_at_k(hits, 2, ties),
        r_precision(hits, relevant, ties),
        map_at_r(hits, relevant, ties),
        ndcg_at_k(hits, relevant, 2, ties),
    ):
        assert values.shape == (0,) and values.dtype == torch.float64


@pytest.mark.parametrize("module", ["functional", "knn", "metrics", "ranks"])
def test_the_docstring_examples_are_true(module: str) -> None:
    """Examples are what people copy."""
    # By name, because `lightning_dml.retrieval.knn` as an attribute is the function.
    outcome = doctest.testmod(importlib.import_module(f"lightning_dml.retrieval.{module}"), extraglobs={"torch": torch})
    assert outcome.failed == 0 and outcome.attempted > 0
