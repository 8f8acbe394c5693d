"""Every image is evaluated once, whatever the number of ranks."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_dml.datamodules.samplers.evaluation import UnpaddedDistributedSampler
from lightning_dml.errors import InputError


@given(st.integers(0, 40), st.integers(1, 6))
def test_unpadded_sampler_has_every_index_once(length: int, replicas: int) -> None:
    """A repeated image counts twice in a metric and a missing one not at all."""
    ranks = [UnpaddedDistributedSampler(length, num_replicas=replicas, rank=rank) for rank in range(replicas)]
    assert sorted(index for rank in ranks for index in rank) == list(range(length))
    assert [len(rank) for rank in ranks] == [len(list(rank)) for rank in ranks]
    assert all(list(rank) == list(islice(range(length), number, None, replicas)) for number, rank in enumerate(ranks))


@given(st.integers(0, 12), st.integers(1, 20))
def test_a_rank_has_at_least_one_index_where_asked(length: int, replicas: int) -> None:
    """Only where images are fewer than ranks may one come twice: a repeat too many is work for nothing."""
    plain = [list(UnpaddedDistributedSampler(length, num_replicas=replicas, rank=rank)) for rank in range(replicas)]
    samplers = [
        UnpaddedDistributedSampler(length, num_replicas=replicas, rank=rank, at_least_one=True)
        for rank in range(replicas)
    ]
    filled = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(indices) for indices in filled]
    if length >= replicas or length == 0:
        assert filled == plain
    else:
        assert all(len(indices) == 1 for indices in filled) and filled[:length] == plain[:length]
        times = Counter(index for indices in filled for index in indices)
        assert sorted(times) == list(range(length)) and max(times.values()) - min(times.values()) <= 1


def test_unpadded_sampler_refuses_a_negative_length() -> None:
    """A negative length would look like an empty data set."""
    with pytest.raises(InputError, match="length must be an integer of at least 0, got -1"):
        UnpaddedDistributedSampler(-1)


def test_unpadded_sampler_refuses_a_rank_out_of_range() -> None:
    """Rank 2 of 2 would evaluate what rank 0 does, shifted, in silence."""
    with pytest.raises(InputError, match=r"rank must be an integer from 0 to 1, got 2; .* less than num_replicas"):
        UnpaddedDistributedSampler(5, num_replicas=2, rank=2)
