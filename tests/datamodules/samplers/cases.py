"""Problems for the samplers, one epoch of their batches, and a test of frequencies."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from lightning_dml.datamodules.samplers.pk import PKBatchSampler


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Labels in any order with any gaps, and a P, K and W that they can serve."""
    counts = draw(st.lists(st.integers(2, 23), min_size=1, max_size=12))
    names = draw(st.lists(st.integers(-50, 50), min_size=len(counts), max_size=len(counts), unique=True))
    labels = draw(st.permutations([name for name, count in zip(names, counts, strict=True) for _ in range(count)]))
    replicas = draw(st.sampled_from([ranks for ranks in (1, 2, 4) if ranks <= len(counts)]))
    return {
        "labels": np.array(labels),
        "classes_per_batch": draw(st.integers(1, len(counts) // replicas)),
        "samples_per_class": draw(st.integers(2, 6)),
        "seed": draw(st.integers(0, 2**40)),
        "num_batches": draw(st.one_of(st.none(), st.integers(1, 20))),
        "num_replicas": replicas,
    }


def epoch(rank: int = 0, number: int = 0, **options: Any) -> list[list[int]]:
    """The batches of one epoch as one rank draws them."""
    sampler = PKBatchSampler(**options, rank=rank)
    sampler.set_epoch(number)
    return list(sampler)


def seeds(batches: list[list[int]]) -> list[list[int]]:
    """The seeds that travel with the indices; equal indices do not show whether these are equal."""
    return [[index.seed for index in batch] for batch in batches]  # type: ignore[attr-defined]


def assert_follows(observed: Counter[Any], expected: dict[Any, float]) -> None:
    """Chi-square test, six standard deviations wide; shares of `expected` sum to one."""
    assert sum(expected.values()) == pytest.approx(1)
    assert set(observed) <= set(expected)
    total = sum(observed.values())
    excess = sum((observed[name] - total * share) ** 2 / (total * share) for name, share in expected.items())
    free = len(expected) - 1
    assert excess < free + 6 * (2 * free) ** 0.5
