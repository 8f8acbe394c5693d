"""Class weights: how often each class comes, and what an epoch still promises."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise, permutations, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dml.datamodules.samplers.pk import PKBatchSampler
from lightning_dml.errors import InputError
from tests.datamodules.samplers.cases import assert_follows, epoch, problems, seeds


@st.composite
def weighted_problems(draw: st.DrawFn) -> dict[str, Any]:
    """A problem of the sampler with weights of any kind."""
    options = draw(problems())
    names = sorted(set(options["labels"].tolist()))
    weight = st.floats(1e-3, 1e3)
    some = st.dictionaries(st.sampled_from(names), weight)
    return options | {"class_weights": draw(st.one_of(st.sampled_from(["uniform", "sqrt"]), some))}


def drawn_classes(labels: np.ndarray[Any, Any], batches: list[list[int]], samples: int) -> list[list[int]]:
    """The class of every group of every batch."""
    return [labels[batch[::samples]].tolist() for batch in batches]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("uniform", [1, 1, 1]),
        ("sqrt", [2, 4, 8]),
        ({2: 0.5, 9: 2.5}, [0.5, 1, 2.5]),
        ({}, [1, 1, 1]),
        ([9.0, 9.0, 1.0, 9.0, 9.0, 3.0, 9.0, 9.0, 9.0, 6.0], [1, 3, 6]),
        (torch.arange(10) + 1, [3, 6, 10]),
    ],
)
def test_classes_come_in_proportion_to_their_weights(weights: Any, expected: list[float]) -> None:
    """A weight that is not honoured would not show anywhere but in a worse model."""
    labels = np.repeat([2, 5, 9], [4, 16, 64])
    batches = epoch(labels=labels, classes_per_batch=1, samples_per_class=2, num_batches=3000, class_weights=weights)
    shares = {name: share / sum(expected) for name, share in zip([2, 5, 9], expected, strict=True)}
    assert_follows(Counter(name for (name,) in drawn_classes(labels, batches, 2)), shares)


WEIGHTS = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}


def test_the_classes_of_a_step_are_drawn_one_after_the_other_without_replacement() -> None:
    """Other ways to draw distinct classes give other shares than the documented ones."""
    labels = np.repeat(np.arange(4), 4)
    batches = epoch(labels=labels, classes_per_batch=2, samples_per_class=2, num_batches=4000, class_weights=WEIGHTS)
    expected = {(a, b): WEIGHTS[a] * WEIGHTS[b] / (1 - WEIGHTS[a]) for a, b in permutations(WEIGHTS, 2)}
    assert_follows(Counter((a, b) for a, b in drawn_classes(labels, batches, 2)), expected)


def test_a_step_is_drawn_whatever_the_step_before_drew() -> None:
    """A class that waits for the others to come first would be in a fixed rhythm, not weighted."""
    labels = np.repeat(np.arange(4), 4)
    batches = epoch(labels=labels, classes_per_batch=1, samples_per_class=2, num_batches=4001, class_weights=WEIGHTS)
    names = [name for (name,) in drawn_classes(labels, batches, 2)]
    # Pairs that do not overlap are independent, as the chi-square test wants them.
    pairs = Counter(pair for place, pair in enumerate(pairwise(names)) if place % 2 == 0)
    assert_follows(pairs, {(a, b): WEIGHTS[a] * WEIGHTS[b] for a, b in product(WEIGHTS, WEIGHTS)})


def test_a_class_of_almost_no_weight_does_not_fix_the_order_of_the_others() -> None:
    """In a step that needs it, the time that it takes would swallow the differences between the others."""
    labels = np.repeat(np.arange(3), 4)
    batches = epoch(labels=labels, classes_per_batch=3, samples_per_class=2, num_batches=1000, class_weights={2: 1e-30})
    orders = Counter(tuple(names) for names in drawn_classes(labels, batches, 2))
    assert_follows(orders, {(0, 1, 2): 0.5, (1, 0, 2): 0.5})


@given(weighted_problems())
@settings(max_examples=50)
def test_a_weighted_epoch_keeps_what_every_batch_promises(options: dict[str, Any]) -> None:
    """Weights change which classes come, not the K images of each, nor that ranks share one step."""
    p, k, labels = options["classes_per_batch"], options["samples_per_class"], options["labels"]
    ranks = [epoch(rank, **options) for rank in range(options["num_replicas"])]
    length = len(PKBatchSampler(**options | {"class_weights": None}))
    assert [len(rank) for rank in ranks] == [length] * len(ranks)
    sizes = Counter(labels.tolist())
    groups: dict[int, list[list[int]]] = defaultdict(list)
    for step in zip(*ranks, strict=True):
        names = [name for batch in step for name in drawn_classes(labels, [batch], k)[0]]
        assert len(names) == len(set(names)) == p * len(ranks)
        for batch in step:
            assert len(batch) == p * k
            for group in (batch[first : first + k] for first in range(0, p * k, k)):
                (name,) = set(labels[group].tolist())
                groups[name].append(group)
                assert len(set(group)) == min(k, sizes[name])
    for name, own in groups.items():  # a class is used up before any image of it comes again
        turn = -(-sizes[name] // k)
        for start in range(0, len(own), turn):
            part = own[start : start + turn]
            assert len({index for group in part for index in group}) == min(sizes[name], len(part) * k)


@given(weighted_problems())
@settings(max_examples=15)
def test_a_weighted_epoch_resumes_at_every_step_and_is_the_same_on_more_ranks(options: dict[str, Any]) -> None:
    """A checkpoint or another number of GPUs must not change what is trained on."""
    replicas, p = options["num_replicas"], options["classes_per_batch"]
    ranks = [epoch(rank, 1, **options) for rank in range(replicas)]
    whole = epoch(number=1, **options | {"classes_per_batch": replicas * p, "num_replicas": 1})
    joined = [[index for batch in step for index in batch] for step in zip(*ranks, strict=True)]
    assert joined == whole and seeds(joined) == seeds(whole)
    for batch in range(len(whole)):
        sampler = PKBatchSampler(**options, rank=0)
        sampler.load_state_dict({"epoch": 1, "batch": batch})
        assert list(sampler) == ranks[0][batch:]
        sampler.set_epoch(2)
        if batch == len(whole) - 1:
            assert list(sampler) == epoch(0, 2, **options)


def test_a_weighted_plan_depends_on_seed_and_epoch() -> None:
    """An epoch that repeats another would halve the data."""
    options: dict[str, Any] = {"labels": np.repeat(np.arange(20), 9), "classes_per_batch": 4, "class_weights": "sqrt"}
    base = epoch(**options)
    assert epoch(**options) == base
    assert epoch(number=1, **options) != base and epoch(seed=1, **options) != base


def test_a_dropped_class_may_have_a_weight() -> None:
    """The weights of all classes are one file; which have too few images is another matter."""
    labels = np.array([0, 0, 1, 2, 2])
    options: dict[str, Any] = {"classes_per_batch": 1, "samples_per_class": 2, "drop_small_classes": True}
    batches = epoch(labels=labels, num_batches=40, class_weights={1: 5.0, 2: 2.0}, **options)
    assert {int(labels[index]) for batch in batches for index in batch} == {0, 2}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("log", "class_weights must be one of uniform, sqrt, got 'log'; or give a weight for each label"),
        ({3: 1.0, 7: 2.0, 8: 1.0}, r"names class 7 \(2 such class\(es\)\), which is not among the labels"),
        ({"3": 1.0}, "names class '3'"),
        ({3: 0.0}, "class_weights must be positive and finite, got 0.0 for class 3: to leave a class out"),
        ({5: -1.0}, "got -1.0 for class 5"),
        ({5: float("nan")}, "got nan for class 5"),
        ([1.0, 1.0, 1.0, 1.0, 1.0, float("inf")], "got inf for class 5"),
        ({3: 1e-90, 5: 1e90}, "within a factor of 1e.100 of each other, got 1e-90 and 1e.90"),
        ({3: "much"}, "class_weights must be numbers"),
        ([1.0, 1.0], "must have 6 entries, one for each label from 0 to 5, got 2; a mapping may"),
        ([1.0] * 7, "must have 6 entries"),
        ([[1.0] * 6], r"must be a vector .* got shape \(1, 6\)"),
        (2.0, r"must be a vector .* got shape \(\)"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(weights: Any, message: str) -> None:
    """A weight for no class, or of no meaning, is a mistake that training would hide."""
    with pytest.raises(InputError, match=message):
        PKBatchSampler([0, 0, 3, 3, 5, 5], 2, 2, class_weights=weights)


def test_a_vector_of_weights_cannot_reach_negative_labels() -> None:
    """Python would take the last weight for label -1, in silence."""
    with pytest.raises(InputError, match="cannot reach class -1: give a mapping"):
        PKBatchSampler([-1, -1, 1, 1], 2, 2, class_weights=[1.0, 1.0])


def test_too_few_classes_are_told_before_the_weights_are_read() -> None:
    """Without any class the weights have no largest one, and the error would be numpy's."""
    with pytest.raises(InputError, match="there are 0"):
        PKBatchSampler(np.empty(0, np.int64), 2, 2, class_weights="uniform")
