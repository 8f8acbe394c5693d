"""Averages over queries and classes against plain loops, and the coverage of the bootstrap."""

from __future__ import annotations

import doctest
import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_dml.errors import InputError
from lightning_dml.retrieval import averaging
from lightning_dml.retrieval.averaging import (
    AverageName,
    PerClass,
    bootstrap_interval,
    class_means,
    macro_average,
    micro_average,
)

NAMES = ("recall@1", "map@r")


def slow_class_means(values: list[list[float]], labels: list[int]) -> dict[int, list[float]]:
    """Means by label, by walking the rows for each class."""
    means = {}
    for label in set(labels):
        rows = [row for row, other in zip(values, labels, strict=True) if other == label]
        means[label] = [float(sum(map(Fraction, column)) / len(rows)) for column in zip(*rows, strict=True)]
    return means


def slow_quantile(numbers: list[float], share: float) -> float:
    """Quantile by linear interpolation between the sorted numbers."""
    ordered = sorted(numbers)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def uneven(queries: int = 300, classes: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Values (queries, 2) and labels of classes whose sizes differ widely; labels are not 0 to C - 1."""
    generator = np.random.default_rng(seed)
    labels = (classes * generator.random(queries) ** 3).astype(np.int64) * 7 - 5
    return torch.from_numpy(generator.random((queries, 2))), torch.from_numpy(labels)


@given(data=st.data(), n_queries=st.integers(1, 25))
def test_averages_equal_loops(data: st.DataObject, n_queries: int) -> None:
    """Which mean was taken decides the number that a paper prints, by several points on uneven classes."""
    share = st.floats(0, 1)
    values = data.draw(st.lists(st.lists(share, min_size=2, max_size=2), min_size=n_queries, max_size=n_queries))
    labels = data.draw(st.lists(st.sampled_from([0, 3, 4, 2**40, 2**40 + 1]), min_size=n_queries, max_size=n_queries))
    tensor = torch.tensor(values, dtype=torch.float64)

    per_class = class_means(tensor, torch.tensor(labels), NAMES)
    expected = slow_class_means(values, labels)
    assert per_class.labels.tolist() == sorted(expected) and per_class.labels.dtype == torch.int64
    assert per_class.queries.tolist() == [labels.count(label) for label in sorted(expected)]
    assert per_class.queries.dtype == torch.int64 and per_class.values.dtype == torch.float64
    wanted = [expected[label] for label in sorted(expected)]
    np.testing.assert_allclose(per_class.values.numpy(), wanted, rtol=1e-14, atol=1e-300)

    micro, macro = micro_average(tensor), macro_average(per_class)
    assert micro.dtype == macro.dtype == torch.float64
    for column in range(2):
        over_queries = sum(Fraction(row[column]) for row in values) / n_queries
        over_classes = sum(Fraction(means[column]) for means in expected.values()) / len(expected)
        assert micro[column].item() == pytest.approx(float(over_queries), rel=1e-15, abs=1e-300)
        assert macro[column].item() == pytest.approx(float(over_classes), rel=1e-14, abs=1e-300)


def test_micro_and_macro_differ_on_uneven_classes() -> None:
    """They are two metrics: one says how queries fare, the other how classes do."""
    values = torch.tensor([[1.0], [1.0], [1.0], [0.0]], dtype=torch.float64)
    assert micro_average(values).item() == 0.75
    assert macro_average(class_means(values, torch.tensor([5, 5, 5, 2]), ["recall@1"])).item() == 0.5


def test_the_order_of_the_rows_changes_no_bit_of_the_micro_average() -> None:
    """Ranks hand in their queries in any order, and a checkpoint is chosen by comparing these numbers."""
    values, _ = uneven(2_000)
    values = values * torch.logspace(-12, 3, len(values), dtype=torch.float64)[:, None]
    reference = micro_average(values)
    running = set()
    for seed in range(10):
        order = list(range(len(values)))
        random.Random(seed).shuffle(order)
        assert torch.equal(micro_average(values[order]), reference)
        running.add(values[order].cumsum(dim=0)[-1, 0].item())
    assert len(running) > 1, "these values must be such that a plain sum does depend on the order"


def test_the_number_of_threads_changes_no_bit() -> None:
    """Ranks on machines with different core counts must log the same value."""
    values, labels = uneven(100_000, classes=3)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            per_class = class_means(values, labels, NAMES)
            low, high = bootstrap_interval(per_class, "micro", 0.9, draws=20, seed=0)
            results.append(torch.cat([per_class.values.flatten(), micro_average(values), low, high]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    # Added in the order of the rows, which is the order of the items for any number of ranks.
    first = values[labels == labels.min(), 0].tolist()
    running = 0.0
    for value in first:
        running += value
    assert results[0][0].item() == running / len(first)


def test_the_bootstrap_equals_lists_of_resampled_classes() -> None:
    """The weighted form is a shortcut for what the definition says: pool the queries of the classes drawn."""
    values, labels = uneven(120, classes=9)
    per_class = class_means(values, labels, NAMES)
    rows = {label: values[labels == label].tolist() for label in per_class.labels.tolist()}
    classes = sorted(rows)
    for average, confidence, draws in (("micro", 0.9, 101), ("macro", 0.5, 40), ("macro", 0.95, 1)):
        generator = np.random.default_rng(3)
        resamples: list[list[float]] = []
        for _ in range(draws):
            taken = [classes[place] for place in generator.integers(0, len(classes), size=len(classes))]
            if average == "micro":
                pooled = [row for label in taken for row in rows[label]]
            else:
                pooled = [[math.fsum(c) / len(c) for c in zip(*rows[label], strict=True)] for label in taken]
            resamples.append([math.fsum(column) / len(pooled) for column in zip(*pooled, strict=True)])
        wanted = [
            [slow_quantile([resample[column] for resample in resamples], share) for column in range(2)]
            for share in ((1 - confidence) / 2, (1 + confidence) / 2)
        ]
        name: AverageName = "micro" if average == "micro" else "macro"
        low, high = bootstrap_interval(per_class, name, confidence, draws, seed=3)
        assert low.dtype == high.dtype == torch.float64
        np.testing.assert_allclose(torch.stack([low, high]).numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_the_block_size_changes_no_bit(average: AverageName, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks bound the memory at a million classes, and must not be a setting that moves results."""
    # An odd number of classes: the generator makes two 32-bit numbers at a time, so blocks end within such a pair.
    per_class = class_means(*uneven(3_000, classes=61), NAMES)
    assert len(per_class) % 2 == 1
    results = []
    for entries in (1, 5 * len(per_class), 2**20):
        monkeypatch.setattr(averaging, "_BLOCK_ENTRIES", entries)
        results.append(torch.stack(bootstrap_interval(per_class, average, 0.9, draws=33, seed=1)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_no_array_of_draws_times_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a million classes a thousand draws at once would take 8 GB."""
    per_class = class_means(torch.rand(1_000, 1, dtype=torch.float64), torch.arange(1_000), ["recall@1"])
    monkeypatch.setattr(averaging, "_BLOCK_ENTRIES", 4_000)
    sizes = []
    bincount = np.bincount

    def watched(places: Any, minlength: int) -> Any:
        sizes.append(minlength)
        return bincount(places, minlength=minlength)

    monkeypatch.setattr(np, "bincount", watched)
    bootstrap_interval(per_class, "micro", 0.9, draws=10, seed=0)
    assert sizes == [4_000, 4_000, 2_000]


def test_the_seed_decides_the_draws() -> None:
    """Every rank makes the interval for itself, so it must hang on nothing but the arguments."""
    per_class = class_means(*uneven(), NAMES)
    first = torch.stack(bootstrap_interval(per_class, "macro", 0.9, draws=50, seed=0))
    np.random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(first, torch.stack(bootstrap_interval(per_class, "macro", 0.9, draws=50, seed=0)))
    assert not torch.equal(first, torch.stack(bootstrap_interval(per_class, "macro", 0.9, draws=50, seed=1)))


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_the_interval_covers_as_often_as_it_says_and_one_over_queries_does_not(average: AverageName) -> None:
    """An interval that resampled queries would call differences certain that another choice of classes reverses."""
    generator = np.random.default_rng(0)
    repetitions, classes = 300, 40
    covered = dict.fromkeys(["classes", "queries"], 0)
    for repetition in range(repetitions):
        # A query is answered with its class's own probability, which is uniform on [0, 1].
        labels = np.repeat(np.arange(classes), generator.integers(10, 40, size=classes))
        hits = (generator.random(len(labels)) < generator.random(classes)[labels]).astype(np.float64)
        values = torch.from_numpy(hits)[:, None]
        for unit, numbers in (("classes", torch.from_numpy(labels)), ("queries", torch.arange(len(labels)))):
            per_class = class_means(values, numbers, ["recall@1"])
            low, high = bootstrap_interval(per_class, average, 0.9, draws=200, seed=repetition)
            covered[unit] += int(low.item() <= 0.5 <= high.item())
    assert 0.80 <= covered["classes"] / repetitions <= 0.97
    assert covered["queries"] / repetitions < 0.60


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_one_class_leaves_nothing_to_resample(average: AverageName) -> None:
    """The interval is then the point, to the bit, and not an error in the middle of an evaluation."""
    values = torch.tensor([[0.1, 1.0], [0.7, 0.0], [0.1, 0.3]], dtype=torch.float64)
    per_class = class_means(values, torch.tensor([4, 4, 4]), NAMES)
    low, high = bootstrap_interval(per_class, average, 0.95, draws=100, seed=0)
    assert torch.equal(low, per_class.values[0]) and torch.equal(high, per_class.values[0])


def test_no_answered_query_gives_nan() -> None:
    """A sanity check's first batches may hold no match; training must go on."""
    none = torch.empty(0, 2, dtype=torch.float64)
    per_class = class_means(none, torch.empty(0, dtype=torch.int64), NAMES)
    assert len(per_class) == 0 and per_class.as_dict() == {}
    for result in (micro_average(none), macro_average(per_class), *bootstrap_interval(per_class, "micro", 0.9, 10, 0)):
        assert result.shape == (2,) and bool(result.isnan().all())


def three_classes() -> PerClass:
    """Classes 0, 1 and 2 with recall 1/2, 0 and 1/2."""
    values = torch.tensor([[0.0, 0.2], [0.5, 0.3], [0.5, 0.4], [0.0, 0.2]], dtype=torch.float64)
    return class_means(values, torch.tensor([1, 0, 2, 1]), NAMES)


def test_the_table_shows_the_worst_classes_first() -> None:
    """One reads it to find what the model confuses; the best classes of eleven thousand are no help."""
    assert three_classes().table(class_names=["mug", "kettle", "chair"], limit=2).splitlines() == [
        " class  queries  recall@1   map@r",
        "kettle        2    0.0000  0.2000",
        "   mug        1    0.5000  0.3000",
        "... and 1 more classes",
    ]
    assert [line.split()[0] for line in three_classes().table().splitlines()] == ["class", "1", "0", "2"]


def test_print_stays_short_with_many_classes() -> None:
    """Eleven thousand lines in a notebook hide what came before them."""
    per_class = class_means(torch.rand(500, 1, dtype=torch.float64), torch.arange(500), ["recall@1"])
    lines = str(per_class).splitlines()
    assert len(lines) == 22 and lines[-1] == "... and 480 more classes"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_names": ["mug", "kettle"]}, "class_names must name every label, got 2 names and label 2"),
        ({"limit": -1}, "limit must be an integer of at least 0, got -1; None shows all classes"),
        ({"limit": True}, "limit must be an integer of at least 0, got True; None shows all classes"),
    ],
)
def test_table_refusals(arguments: dict[str, Any], message: str) -> None:
    """A negative limit would quietly hide the best classes, and a missing name end in an IndexError."""
    with pytest.raises(InputError, match=message):
        three_classes().table(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"average": "weighted"}, "average must be one of micro, macro, got 'weighted'"),
        ({"confidence": 0.0}, "confidence must be a share, such as 0.95, .* greater than 0 and less than 1, got 0.0"),
        ({"confidence": 1.0}, "confidence must be .* got 1.0"),
        ({"confidence": 95}, "confidence must be .* got 95"),
        ({"confidence": math.nan}, "confidence must be .* got nan"),
        ({"confidence": "0.9"}, "confidence must be .* got '0.9'"),
        ({"draws": 0}, "draws of the bootstrap must be an integer of at least 1, got 0"),
        ({"draws": 100.0}, "draws .* got 100.0"),
        ({"draws": True}, "draws .* got True"),
        ({"seed": -1}, "seed of the bootstrap must be an integer of at least 0, got -1"),
        ({"seed": None}, "seed .* got None"),
    ],
)
def test_bootstrap_refusals(arguments: dict[str, Any], message: str) -> None:
    """Without a seed, ranks would log different intervals; 95 for 0.95 would give an error from deep within numpy."""
    settings: dict[str, Any] = {"average": "micro", "confidence": 0.9, "draws": 10, "seed": 0} | arguments
    with pytest.raises(InputError, match=message):
        bootstrap_interval(three_classes(), **settings)


@pytest.mark.parametrize(
    ("values", "labels", "names", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), NAMES, r"values must be .* got torch.float32 of shape \(3,\)"),
        (torch.zeros(3, 0), torch.zeros(3).long(), (), r"values must be .* shape \(3, 0\)"),
        (torch.zeros(3, 2).long(), torch.zeros(3).long(), NAMES, "values must be .* got torch.int64"),
        (torch.zeros(3, 2), torch.zeros(2).long(), NAMES, r"labels must have shape \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(3), NAMES, "labels must be integers, got torch.float32"),
        (torch.zeros(3, 2), torch.zeros(3).long(), ["map@r"], "names must name the 2 columns of values, got 1"),
    ],
)
def test_class_means_refusals(values: Tensor, labels: Tensor, names: Any, message: str) -> None:
    """Columns under wrong names would be believed."""
    with pytest.raises(InputError, match=message):
        class_means(values, labels, names)


def test_the_docstring_examples_are_true() -> None:
    """Examples are what people copy."""
    outcome = doctest.testmod(averaging, extraglobs={"torch": torch})
    assert outcome.failed == 0 and outcome.attempted > 0
