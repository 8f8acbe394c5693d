"""Batches of super-classes keep their promises over ranks, epochs and resumes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_dml.datamodules.loading import ResumableLoader
from lightning_dml.datamodules.samplers.hierarchical import HierarchicalPKBatchSampler
from lightning_dml.datamodules.samplers.pk import PKBatchSampler
from lightning_dml.errors import InputError
from tests.datamodules.samplers.cases import assert_follows, seeds


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Super-classes of any number of classes of any size, and G, P, K and W that they can serve."""
    sizes = draw(st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=6), min_size=1, max_size=6))
    classes = [(place, count) for place, counts in enumerate(sizes) for count in counts]
    names = draw(st.lists(st.integers(-50, 50), min_size=len(classes), max_size=len(classes), unique=True))
    supers = draw(st.lists(st.integers(-50, 50), min_size=len(sizes), max_size=len(sizes), unique=True))
    rows = [(name, supers[place]) for name, (place, count) in zip(names, classes, strict=True) for _ in range(count)]
    labels, super_labels = np.array(draw(st.permutations(rows))).T
    replicas = draw(st.sampled_from([ranks for ranks in (1, 2, 4) if ranks <= len(classes)]))
    together = draw(st.integers(1, min(len(sizes), len(classes) // replicas)))
    return {
        "labels": labels,
        "super_labels": super_labels,
        "super_classes_per_batch": together,
        "classes_per_batch": together * draw(st.integers(1, len(classes) // (together * replicas))),
        "samples_per_class": draw(st.integers(2, 5)),
        "seed": draw(st.integers(0, 2**40)),
        "num_batches": draw(st.one_of(st.none(), st.integers(1, 12))),
        "num_replicas": replicas,
    }


def epoch(rank: int = 0, number: int = 0, **options: Any) -> list[list[int]]:
    """The batches of one epoch as one rank draws them."""
    sampler = HierarchicalPKBatchSampler(**options, rank=rank)
    sampler.set_epoch(number)
    return list(sampler)


def steps(**options: Any) -> Iterator[list[int]]:
    """The batches of all ranks, joined in rank order."""
    ranks = [epoch(rank, **options) for rank in range(options["num_replicas"])]
    assert len({len(rank) for rank in ranks}) == 1
    for step in zip(*ranks, strict=True):
        assert {len(batch) for batch in step} == {options["classes_per_batch"] * options["samples_per_class"]}
        yield [index for batch in step for index in batch]


@given(problems())
def test_every_step_has_distinct_classes_of_k_images_over_all_ranks(options: dict[str, Any]) -> None:
    """A class on two ranks, or an image twice in a group, gives fewer and easier pairs than promised."""
    k, labels = options["samples_per_class"], options["labels"]
    sizes = Counter(labels.tolist())
    for step in steps(**options):
        groups = [step[first : first + k] for first in range(0, len(step), k)]
        names = [set(labels[group].tolist()) for group in groups]
        assert all(len(labels_of_group) == 1 for labels_of_group in names) and len(set.union(*names)) == len(names)
        for group, (name,) in zip(groups, names, strict=True):
            repeats = Counter(group).values()
            assert len(repeats) == min(k, sizes[name]) and max(repeats) - min(repeats) <= 1


@given(problems())
def test_shares_follow_the_stated_rules(options: dict[str, Any]) -> None:
    """The documents say how many classes a super-class gives, and when it lends; this is the same in loops."""
    k, labels = options["samples_per_class"], options["labels"]
    share = options["classes_per_batch"] // options["super_classes_per_batch"]
    home = dict(zip(labels.tolist(), options["super_labels"].tolist(), strict=True))
    groups = {name: -(-count // k) for name, count in Counter(labels.tolist()).items()}
    left = dict(groups)
    for step in steps(**options):
        names = labels[step[::k]].tolist()
        if not any(left.values()):
            left = dict(groups)
        order = list(dict.fromkeys(home[name] for name in names))  # the first time that each came
        assert [home[name] for name in names] == shares(order, share, Counter(home.values()), len(names))
        rich = {home[name] for name, count in left.items() if count}
        turned = [name in rich for name in order]
        assert turned == sorted(turned, reverse=True)  # super-classes that lend come last,
        assert all(turned) or rich <= set(order)  # and only after every other
        for name in names:
            if not left[name]:
                own = {other for other, count in left.items() if count and home[other] == home[name]}
                assert own <= set(names)
        for name in names:
            left[name] = max(0, left[name] - 1)


def shares(order: list[int], share: int, sizes: Counter[int], total: int) -> list[int]:
    """The super-class of each class of a step that turns to the super-classes in `order`."""
    free, names, need = dict(sizes), list[int](), share
    for super_class in cycle(order):
        count = min(need, free[super_class])
        names += [super_class] * count
        free[super_class] -= count
        need = need - count or share
        if len(names) >= total:
            return names
    return names


@given(problems())
@settings(max_examples=50)
def test_every_image_is_used_in_a_pass(options: dict[str, Any]) -> None:
    """A class of a small super-class, or of a very large one, must not be out of reach."""
    groups = sum(-(-count // options["samples_per_class"]) for count in Counter(options["labels"].tolist()).values())
    # Every step takes at least one group that was left.
    indices = {index for step in steps(**options | {"num_batches": groups}) for index in step}
    assert indices == set(range(len(options["labels"])))


@given(problems(), st.integers(0, 3))
@settings(max_examples=50)
def test_ranks_slice_the_batch_that_one_rank_would_draw(options: dict[str, Any], number: int) -> None:
    """Training on more GPUs must be the same training, only faster."""
    replicas = options["num_replicas"]
    alone = options | {"num_replicas": 1}
    for name in ("classes_per_batch", "super_classes_per_batch"):
        alone[name] = replicas * options[name]
    assume(alone["super_classes_per_batch"] <= len(set(options["super_labels"].tolist())))
    ranks = [epoch(rank, number, **options) for rank in range(replicas)]
    joined = [[index for batch in step for index in batch] for step in zip(*ranks, strict=True)]
    whole = epoch(number=number, **alone)
    assert joined == whole and seeds(joined) == seeds(whole)


@given(problems(), st.integers(0, 3), st.data())
@settings(max_examples=30)
def test_resumes_at_every_step(options: dict[str, Any], number: int, data: st.DataObject) -> None:
    """A checkpoint can fall on any step; from each one the rest must be the same, and the next epoch too."""
    rank = data.draw(st.integers(0, options["num_replicas"] - 1))
    whole = epoch(rank, number, **options)
    following = epoch(rank, number + 1, **options)
    for batch in range(len(whole) + 1):
        sampler = HierarchicalPKBatchSampler(**options, rank=rank)
        sampler.load_state_dict({"epoch": number, "batch": batch})
        assert len(sampler) == len(whole)
        rest = list(sampler)
        expected = whole[batch:] if batch < len(whole) else following
        assert rest == expected and seeds(rest) == seeds(expected)
    sampler.load_state_dict({"epoch": number, "batch": len(whole) - 1})
    assert list(sampler) == whole[-1:]
    sampler.sampler.set_epoch(number + 1)
    assert list(sampler) == following


# Twelve super-classes of 30 classes of six images, as Stanford Online Products in small.
LABELS = np.repeat(np.arange(360), 6)
SUPERS = LABELS // 30


@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
def test_every_rank_has_its_super_classes_in_equal_shares(replicas: int) -> None:
    """Half of the batch from each of two categories is what makes the negatives hard; 8 ranks ask for 16 of 12."""
    ranks = [
        epoch(rank, labels=LABELS, super_labels=SUPERS, samples_per_class=2, num_replicas=replicas)
        for rank in range(replicas)
    ]
    assert [len(rank) for rank in ranks] == [3 * 360 // (16 * replicas)] * replicas
    for step in zip(*ranks, strict=True):
        super_classes = [SUPERS[batch][::16].tolist() for batch in step]
        for batch, (first, second) in zip(step, super_classes, strict=True):
            assert first != second and SUPERS[batch].tolist() == [first] * 16 + [second] * 16
        assert len({name for pair in super_classes for name in pair}) == min(2 * replicas, 12)


def test_an_epoch_leaves_out_little_where_super_classes_are_equal() -> None:
    """The last, incomplete batch is dropped, and ends of super-classes; more would be lost data."""
    batches = epoch(labels=LABELS, super_labels=SUPERS, classes_per_batch=8, samples_per_class=3)
    assert len(batches) == 90
    assert len({index for batch in batches for index in batch}) > 0.95 * len(LABELS)


def test_super_classes_come_in_proportion_to_the_groups_they_have() -> None:
    """Otherwise classes of small super-classes would be seen far more often than others."""
    supers = np.repeat([4, 5, 6], [36, 18, 6])
    options: dict[str, Any] = {"labels": np.arange(60) // 2, "super_labels": supers, "samples_per_class": 2}
    options |= {"super_classes_per_batch": 1, "classes_per_batch": 1}
    epochs = [epoch(number=number, **options | {"num_batches": 2}) for number in range(1000)]
    for place in (0, 1):
        observed = Counter(int(supers[batches[place][0]]) for batches in epochs)
        assert_follows(observed, {4: 0.6, 5: 0.3, 6: 0.1})


@pytest.mark.parametrize("super_classes", [None, 1, 3])
def test_groups_are_lent_in_proportion_to_all_that_a_class_has(super_classes: int | None) -> None:
    """A few classes would otherwise lend each time, though others have more images to show."""
    labels = np.repeat([0, 1, 2], [40, 2, 6])
    options: dict[str, Any] = {"labels": labels, "classes_per_batch": 2, "samples_per_class": 2, "num_batches": 16}
    if super_classes is not None:
        options |= {"super_labels": labels % super_classes, "super_classes_per_batch": min(2, super_classes)}
    lent: Counter[int] = Counter()
    for number in range(100):
        sampler = (PKBatchSampler if super_classes is None else HierarchicalPKBatchSampler)(**options)
        sampler.set_epoch(number)
        for batch in list(sampler)[4:]:  # four groups of classes 1 and 2, and each step takes one of them at least
            lent.update(set(labels[batch].tolist()) - {0})
    assert_follows(lent, {1: 0.25, 2: 0.75})


def test_weights_draw_super_classes_by_the_sum_over_their_classes() -> None:
    """Else a weight would be relative to the other classes of a super-class, whatever the rest weighs."""
    labels = np.repeat(np.arange(4), 4)
    weights = {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}
    options: dict[str, Any] = {"labels": labels, "super_labels": labels // 3, "class_weights": weights}
    batches = epoch(super_classes_per_batch=1, classes_per_batch=1, samples_per_class=2, num_batches=3000, **options)
    observed = Counter(int(labels[batch[0]]) for batch in batches)
    assert_follows(observed, {name: weight / 10 for name, weight in weights.items()})


def test_a_small_super_class_is_completed_by_another() -> None:
    """A super-class of one class has no hard negatives, but its images are training data."""
    labels = np.repeat(np.arange(9), 4)
    supers = np.where(labels == 8, 1, 0)
    batches = epoch(labels=labels, super_labels=supers, super_classes_per_batch=1, classes_per_batch=4,
                    samples_per_class=2, num_batches=40)  # fmt: skip
    kinds = Counter(tuple(sorted(Counter(supers[batch].tolist()).items())) for batch in batches)
    assert set(kinds) == {((0, 8),), ((0, 6), (1, 2))}


def test_the_same_seed_and_epoch_draw_the_same_and_others_do_not() -> None:
    """A seed that does not repeat, or an epoch that repeats another, both spoil experiments."""
    options: dict[str, Any] = {"labels": LABELS, "super_labels": SUPERS, "num_batches": 5}
    base = epoch(**options)
    assert epoch(**options) == base and seeds(epoch(**options)) == seeds(base)
    assert epoch(number=1, **options) != base and epoch(seed=1, **options) != base


def test_a_loader_resumes_it() -> None:
    """It must be as good a part of a data module as the plain sampler."""
    sampler = HierarchicalPKBatchSampler(torch.tensor(LABELS), SUPERS.tolist(), num_batches=5)
    whole = [batch.tolist() for batch in ResumableLoader(range(len(LABELS)), sampler)]  # type: ignore[arg-type]
    loader = ResumableLoader(range(len(LABELS)), sampler)  # type: ignore[arg-type]
    loader.load_state_dict({"epoch": 0, "batch": 3})
    assert [batch.tolist() for batch in loader] == whole[3:] == epoch(
        labels=LABELS, super_labels=SUPERS, num_batches=5
    )[3:]  # fmt: skip


GOOD: dict[str, Any] = {
    "labels": np.repeat(np.arange(6), 2),
    "super_labels": np.repeat(np.arange(2), 6),
    "super_classes_per_batch": 2,
    "classes_per_batch": 4,
    "samples_per_class": 2,
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": np.zeros(4)}, "labels must be a vector of integers.*float64"),
        ({"super_labels": np.zeros(12)}, "super_labels must be a vector of integers.*float64"),
        ({"super_labels": np.zeros(5, int)}, "super_labels must have one entry for each of the 12 labels, got 5"),
        ({"super_labels": [7] * 5 + [8] * 7}, "class 2 lies in super-classes 7 and 8, and a class must lie in one"),
        ({"super_classes_per_batch": 0}, "super_classes_per_batch must be an integer of at least 1, got 0"),
        ({"super_classes_per_batch": 3}, "=3 must divide classes_per_batch=4, .* set classes_per_batch to 3 or 6"),
        ({"super_classes_per_batch": 5}, "must divide classes_per_batch=4, .* set classes_per_batch to 5"),
        ({"super_classes_per_batch": 4}, "super_classes_per_batch=4, but there are 2 super-classes: set it to 2"),
        ({"classes_per_batch": 8}, "there are 6: set classes_per_batch to 6 or less"),
        ({"num_replicas": 2}, "on 2 rank.* set classes_per_batch to 3 or less"),
        (
            {"samples_per_class": 1},
            "samples_per_class must be an integer of at least 2, got 1; a positive pair takes two",
        ),
        ({"num_batches": 0}, "num_batches must be an integer of at least 1, got 0; None is one pass"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"rank": -1}, "rank must be an integer of at least 0, got -1"),
        ({"labels": [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5]}, "class 0 has one image"),
        ({"class_weights": {9: 1.0}}, "class_weights names class 9"),
    ],
)
def test_errors_name_argument_value_and_way_out(options: dict[str, Any], message: str) -> None:
    """Labels and sizes that cannot fit are refused with what would fit."""
    with pytest.raises(InputError, match=message):
        HierarchicalPKBatchSampler(**(GOOD | options))


def test_a_dropped_class_counts_for_no_super_class() -> None:
    """A super-class that has nothing to draw from must not be promised."""
    labels, supers = [0, 0, 1, 1, 2], [5, 5, 5, 5, 6]
    options: dict[str, Any] = {"classes_per_batch": 2, "samples_per_class": 2, "drop_small_classes": True}
    sampler = HierarchicalPKBatchSampler(labels, supers, 1, **options)
    assert sampler.num_super_classes == 1 and sampler.num_classes == 2
    with pytest.raises(InputError, match="there are 1 super-classes"):
        HierarchicalPKBatchSampler(labels, supers, 2, **options)
