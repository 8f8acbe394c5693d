"""Average precision and reciprocal rank against scikit-learn, direct sums over large runs, and their errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, label_ranking_average_precision_score
from torch import Tensor

from lightning_dml.errors import InputError
from lightning_dml.retrieval import average_precision, map_at_r, reciprocal_rank

FUNCTIONS = [average_precision, reciprocal_rank]


def ranks_of(rows: list[list[bool]]) -> Tensor:
    """The places of the hits of each row, filled up with zeros."""
    places = [[place for place, hit in enumerate(row, 1) if hit] for row in rows]
    width = max((len(line) for line in places), default=0)
    filled = [line + [0] * (width - len(line)) for line in places]
    return torch.tensor(filled, dtype=torch.int64).reshape(len(rows), width)


@given(rows=st.lists(st.lists(st.booleans(), min_size=9, max_size=9).filter(any), min_size=1, max_size=5))
def test_without_ties_average_precision_is_that_of_scikit_learn(rows: list[list[bool]]) -> None:
    """MAP over the whole ranking is what other libraries and papers report under that name."""
    scores = -np.arange(9.0)
    value = average_precision(ranks_of(rows))
    np.testing.assert_allclose(value.numpy(), [average_precision_score(row, scores) for row in rows], rtol=1e-12)
    mean = label_ranking_average_precision_score(np.array(rows), np.tile(scores, (len(rows), 1)))
    np.testing.assert_allclose(value.mean().item(), mean, rtol=1e-12)


@given(rows=st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=0, max_size=5))
def test_without_ties_reciprocal_rank_is_that_of_the_first_hit(rows: list[list[bool]]) -> None:
    """A query that nothing answers has no value, instead of a 0 that would lower the mean."""
    value = reciprocal_rank(ranks_of(rows))
    assert value.dtype == torch.float64
    expected = [1 / (1 + row.index(True)) if any(row) else np.nan for row in rows]
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-15)


@given(rows=st.lists(st.lists(st.booleans(), min_size=9, max_size=9).filter(any), min_size=1, max_size=5))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_item_to_a_rank_is_the_default(function: Callable[..., Tensor], rows: list[list[bool]]) -> None:
    """Who has no ties need not say so, and gets the same number."""
    ranks = ranks_of(rows)
    assert function(ranks, torch.ones_like(ranks)).equal(function(ranks))
    assert function(ranks, (ranks > 0).long()).equal(function(ranks))  # behind the last positive nothing counts


def test_average_precision_looks_behind_rank_r() -> None:
    """It is not MAP@R, with which it is often confused."""
    assert average_precision(torch.tensor([[1, 3]])).item() == pytest.approx((1 + 2 / 3) / 2, abs=1e-15)
    assert map_at_r(torch.tensor([[True, False, True]]), torch.tensor([2])).item() == 0.5


@pytest.mark.parametrize("hits", [1, 2, 12, 59_999, 60_000])
@pytest.mark.parametrize("above", [0, 7, 250_000])
def test_large_runs_equal_a_direct_sum(hits: int, above: int) -> None:
    """A collapsed model makes one run of the whole gallery; the closed forms must not lose their digits there."""
    size, before = 60_000, 3 if above else 0
    ranks = torch.tensor([[*range(1, before + 1), *[above + 1] * hits]])
    tied = torch.tensor([[1] * before + [size] * hits])

    place = np.arange(size, dtype=np.float64)
    others = (hits - 1) / (size - 1)
    inside = (hits / size * (before + 1 + place * others) / (above + 1 + place)).sum()
    expected = (before + inside) / (before + hits)  # those before stand at 1, 2, 3, with a precision of 1
    np.testing.assert_allclose(average_precision(ranks, tied).item(), expected, rtol=1e-10)

    if before:
        assert reciprocal_rank(ranks, tied).item() == 1
    alone = ranks[:, before:], tied[:, before:]
    missed = np.concatenate([[1.0], np.cumprod((size - hits - place).clip(0) / (size - place))[:-1]])
    expected = (missed * hits / (size - place) / (above + 1 + place))[: size - hits + 1].sum()
    np.testing.assert_allclose(reciprocal_rank(*alone).item(), expected, rtol=1e-12)


def test_queries_with_and_without_ties_are_answered_together() -> None:
    """Blocks mix them, and few combinations of rank and ties are computed once for all."""
    ranks = torch.tensor([[1, 1, 4], [2, 0, 0], [0, 0, 0], [1, 1, 4], [3, 3, 3]])
    tied = torch.tensor([[3, 3, 1], [1, 0, 0], [0, 0, 0], [3, 3, 1], [3, 3, 3]])
    for function in FUNCTIONS:
        one_by_one = [function(ranks[row : row + 1], tied[row : row + 1]) for row in range(5)]
        torch.testing.assert_close(function(ranks, tied), torch.cat(one_by_one), rtol=0, atol=1e-15, equal_nan=True)
    # Of three items two are hits, so the first hit is at place 1 with probability 2/3, else at place 2.
    assert reciprocal_rank(ranks, tied)[0].item() == pytest.approx(2 / 3 + 1 / 3 / 2, abs=1e-15)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (4, 0)])
def test_no_queries_and_no_positives(function: Callable[..., Tensor], shape: tuple[int, int]) -> None:
    """The last rank of a large job may have no query, and a block may have none with a positive."""
    value = function(torch.zeros(shape, dtype=torch.int64))
    assert value.shape == (shape[0],) and value.dtype == torch.float64 and value.isnan().all()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("ranks", "tied", "message"),
    [
        (torch.tensor([1, 2]), None, r"ranks must be an int64 matrix \(queries, positives\), got torch.int64"),
        (torch.tensor([[1.0, 2.0]]), None, "got torch.float32 of shape"),
        (torch.tensor([[1, 2]], dtype=torch.int32), None, "got torch.int32"),
        (torch.tensor([[1, 2]]), torch.tensor([[1]]), r"tied must be int64 of the shape of ranks, \(1, 2\)"),
        (torch.tensor([[1, 2]]), torch.tensor([[1.0, 1.0]]), "tied must be int64 .* got torch.float32"),
        (torch.tensor([[2, 1]]), None, "ranks must ascend from 1 on"),
        (torch.tensor([[0, 1]]), None, "ranks must ascend from 1 on"),
        (torch.tensor([[1, 0, 2]]), None, "ranks must ascend from 1 on"),
        (torch.tensor([[-1, 2]]), None, "ranks must ascend from 1 on"),
        (torch.tensor([[2, -1]]), None, "ranks must ascend from 1 on"),
        (torch.tensor([[1, 1]]), None, "positives share a rank; tied must say how many items do"),
        (torch.tensor([[1, 1]]), torch.tensor([[1, 1]]), "positives share a rank"),
        (torch.tensor([[1, 3]]), torch.tensor([[1, 0]]), "positives share a rank"),
    ],
)
def test_ranks_that_cannot_be(function: Callable[..., Any], ranks: Tensor, tied: Tensor | None, message: str) -> None:
    """Unsorted or doubled ranks would give values above 1."""
    with pytest.raises(InputError, match=message):
        function(ranks, tied)
