"""Pairs of equal keys against loops over all pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_dml.retrieval.exclusion import NOBODY, combined_keys, match_counts, matching_pairs

LARGE = 2**62
KEYS = st.lists(st.one_of(st.integers(-3, 4), st.sampled_from([LARGE, LARGE + 1, -LARGE])), max_size=9)


def integers(values: list[int]) -> Tensor:
    """An int64 vector, possibly empty."""
    return torch.tensor(values, dtype=torch.int64)


def slow_pairs(query_keys: list[int], gallery_keys: list[int]) -> list[tuple[int, int]]:
    """Every pair with equal keys that are not negative, by rows and then columns."""
    return [
        (row, column)
        for row, wanted in enumerate(query_keys)
        for column, key in enumerate(gallery_keys)
        if wanted == key and key >= 0
    ]


@given(query_keys=KEYS, gallery_keys=KEYS)
def test_pairs_and_counts_equal_loops(query_keys: list[int], gallery_keys: list[int]) -> None:
    """A pair that is missed lets a query find itself; one too many hides a correct answer."""
    expected = slow_pairs(query_keys, gallery_keys)
    rows, columns = matching_pairs(integers(query_keys), integers(gallery_keys))
    assert rows.dtype == columns.dtype == torch.int64
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == expected
    counts = match_counts(integers(query_keys), integers(gallery_keys))
    assert counts.dtype == torch.int64
    assert counts.tolist() == [sum(1 for row, _ in expected if row == query) for query in range(len(query_keys))]


@given(keys=KEYS)
def test_a_side_matched_with_itself_finds_at_least_itself(keys: list[int]) -> None:
    """Self-retrieval leaves a query out of its own neighbours in this way."""
    rows, columns = matching_pairs(integers(keys), integers(keys))
    pairs = set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert {place for place in range(len(keys)) if (place, place) in pairs} == {
        place for place, key in enumerate(keys) if key >= 0
    }
    assert pairs == {(column, row) for row, column in pairs}


def test_many_equal_keys_keep_their_order() -> None:
    """Sorts are unstable on long inputs only, so that short ones would not show it."""
    keys = torch.arange(4000) % 2
    rows, columns = matching_pairs(torch.tensor([1, 0]), keys)
    assert rows.tolist() == [0] * 2000 + [1] * 2000
    assert columns.tolist() == [*range(1, 4000, 2), *range(0, 4000, 2)]


@pytest.mark.parametrize("width", [1, 2, 3])
@given(data=st.data(), length=st.integers(0, 9))
def test_combined_keys_are_equal_where_all_columns_are(width: int, data: st.DataObject, length: int) -> None:
    """Label and camera together name the pictures that a query passes over; either alone names too many."""
    value = st.one_of(st.integers(-2, 2), st.sampled_from([LARGE, -LARGE]))
    columns = [data.draw(st.lists(value, min_size=length, max_size=length)) for _ in range(width)]
    keys = combined_keys(*map(integers, columns))
    assert keys.shape == (length,) and keys.dtype == torch.int64
    rows = list(zip(*columns, strict=True))
    for key, row in zip(keys.tolist(), rows, strict=True):
        assert (key == NOBODY) if min(row) < 0 else (key >= 0)
    named = [(key, row) for key, row in zip(keys.tolist(), rows, strict=True) if key >= 0]
    assert all((one == other) == (row == another) for one, row in named for other, another in named)
