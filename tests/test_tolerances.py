"""The bounds of tests/tolerances.py hold, and are not so wide that they hold anything."""

from __future__ import annotations

import doctest

import pytest
import torch

from tests import tolerances
from tests.tolerances import gap, rounding, whole_rows


def test_the_examples_are_true() -> None:
    """They say how the bounds are meant."""
    outcome = doctest.testmod(tolerances)
    assert outcome.failed == 0 and outcome.attempted >= 3


@pytest.mark.parametrize("terms", [2, 9, 100, 3000])
def test_orders_of_a_sum_lie_within_the_bound(terms: int) -> None:
    """One after another, or in lanes as vector units add: none may leave the bound, and a missing term must."""
    values = torch.randn(50, terms)
    magnitude = values.abs().sum(dim=1).max()
    lanes = torch.nn.functional.pad(values, (0, -terms % 16)).reshape(50, -1, 16)
    sums = [
        values.cumsum(dim=1)[:, -1],
        values.flip(1).cumsum(dim=1)[:, -1],
        lanes.cumsum(dim=1)[:, -1].cumsum(dim=1)[:, -1],
        lanes[..., :4].cumsum(dim=2)[..., -1].cumsum(dim=1)[:, -1]
        + lanes[..., 4:].cumsum(dim=2)[..., -1].cumsum(dim=1)[:, -1],
    ]
    exact = values.double().sum(dim=1)
    for one in (*sums, exact):
        for other in sums:
            assert float((one - other).abs().max()) <= rounding(terms, magnitude)
    # A term that was left out must show.
    assert float((values[:, 1:].sum(dim=1) - exact).abs().max()) > rounding(terms, magnitude)


def test_whole_rows_have_products_that_nothing_rounds() -> None:
    """What tests of searches rest on: the same bits from any order of sums, and in float64."""
    rows, others = whole_rows(40, 16, 500), whole_rows(30, 16, 500, seed=1)
    exact = rows.double() @ others.double().T
    assert torch.equal((rows @ others.T).double(), exact)
    assert torch.equal((rows.flip(1) @ others.flip(1).T).double(), exact)
    squared = rows.square().sum(1)[:, None] + others.square().sum(1) - 2 * (rows @ others.T)
    assert torch.equal(squared.double(), (rows.double()[:, None] - others.double()).square().sum(2))
    with pytest.raises(AssertionError, match="would round"):
        whole_rows(2, 16, 600)


def test_the_gap_is_that_of_neighbours_in_rank() -> None:
    """A gap across rows would say nothing about an order within one."""
    assert gap(torch.tensor([[1.0, 3.0], [2.0, 9.0]])) == 2
    assert gap(torch.tensor([[1.0, 3.0, 1.0]])) == 0
