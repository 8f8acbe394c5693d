"""Each metric function against a loop over ranks; their errors; and the doctests of the package."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_dml.errors import InputError
from lightning_dml.retrieval import map_at_r, precision_at_k, r_precision, recall_at_k


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
    }
    values = {
        "recall": recall_at_k(tensor, k),
        "precision": precision_at_k(tensor, k),
        "r_precision": r_precision(tensor, counts),
        "map": map_at_r(tensor, counts),
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


HITS = torch.tensor([[True, False, True], [False, True, False]])


@pytest.mark.parametrize("function", [recall_at_k, precision_at_k])
@pytest.mark.parametrize("k", [0, 4, 1.0, True])
def test_k_out_of_range(function: Callable[..., Any], k: Any) -> None:
    """Slicing past the end would silently give the metric of a smaller k."""
    with pytest.raises(InputError, match=f"k must be an integer from 1 to the 3 columns of hits, got {k}"):
        function(HITS, k)


@pytest.mark.parametrize("hits", [HITS.long(), HITS[0]])
def test_hits_are_a_bool_matrix(hits: torch.Tensor) -> None:
    """Labels or similarities passed by mistake would be taken for hits."""
    calls: list[Callable[[], torch.Tensor]] = [
        lambda: recall_at_k(hits, 1),
        lambda: precision_at_k(hits, 1),
        lambda: r_precision(hits, torch.tensor([1, 1])),
        lambda: map_at_r(hits, torch.tensor([1, 1])),
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


@pytest.mark.parametrize("module", ["functional", "knn", "metrics"])
def test_the_docstring_examples_are_true(module: str) -> None:
    """Examples are what people copy."""
    # By name, because `lightning_dml.retrieval.knn` as an attribute is the function.
    outcome = doctest.testmod(importlib.import_module(f"lightning_dml.retrieval.{module}"), extraglobs={"torch": torch})
    assert outcome.failed == 0 and outcome.attempted > 0
