"""Class-balanced batches keep their promises over ranks, epochs and resumes."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dml import distributed
from lightning_dml.datamodules import PKBatchSampler, UnpaddedDistributedSampler
from lightning_dml.datamodules.seeded_index import SeededIndex
from lightning_dml.errors import InputError
from tests.datamodules.samplers.cases import epoch, problems, seeds


@given(problems())
def test_every_batch_has_p_distinct_classes_of_k_images_on_every_rank(options: dict[str, Any]) -> None:
    """A class twice in a batch, or an image twice in a group, gives fewer and easier pairs than P x K promises."""
    p, k, labels = options["classes_per_batch"], options["samples_per_class"], options["labels"]
    ranks = [epoch(rank, **options) for rank in range(options["num_replicas"])]
    sizes = Counter(labels.tolist())
    groups = sum(-(-size // k) for size in sizes.values())
    length = options["num_batches"] or max(1, groups // (p * len(ranks)))
    assert [len(rank) for rank in ranks] == [length] * len(ranks)
    for step in zip(*ranks, strict=True):
        seen: set[int] = set()
        for batch in step:
            assert len(batch) == p * k
            for group in (batch[first : first + k] for first in range(0, p * k, k)):
                (name,) = set(labels[group].tolist())
                assert name not in seen
                seen.add(name)
                repeats = Counter(group).values()
                if sizes[name] >= k:
                    assert max(repeats) == 1
                else:  # each image of the class equally often, but for one
                    assert len(repeats) == sizes[name] and max(repeats) - min(repeats) <= 1


@given(problems())
def test_a_class_without_groups_is_drawn_only_when_too_few_have_any(options: dict[str, Any]) -> None:
    """Else some classes would come again before others have come at all."""
    k, labels = options["samples_per_class"], options["labels"]
    options |= {"classes_per_batch": options["classes_per_batch"] * options["num_replicas"], "num_replicas": 1}
    groups = {name: -(-count // k) for name, count in Counter(labels.tolist()).items()}
    left = dict(groups)
    for batch in epoch(**options):
        classes = set(labels[batch].tolist())
        if not any(left.values()):
            left = dict(groups)
        ready = {name for name, count in left.items() if count}
        assert classes <= ready or ready <= classes
        for name in classes & ready:
            left[name] -= 1


@given(problems(), st.integers(0, 3))
def test_ranks_slice_the_batch_that_one_rank_would_draw(options: dict[str, Any], number: int) -> None:
    """Training on more GPUs must be the same training, only faster."""
    replicas = options["num_replicas"]
    ranks = [epoch(rank, number, **options) for rank in range(replicas)]
    whole = epoch(
        number=number, **options | {"classes_per_batch": replicas * options["classes_per_batch"], "num_replicas": 1}
    )
    joined = [[index for batch in step for index in batch] for step in zip(*ranks, strict=True)]
    assert joined == whole
    assert seeds(joined) == seeds(whole)


@given(problems(), st.integers(0, 3), st.data())
@settings(max_examples=40)
def test_resumes_at_every_step(options: dict[str, Any], number: int, data: st.DataObject) -> None:
    """A checkpoint can fall on any step; from each one the rest must be the same, seeds included."""
    rank = data.draw(st.integers(0, options["num_replicas"] - 1))
    whole = epoch(rank, number, **options)
    following = epoch(rank, number + 1, **options)
    for batch in range(len(whole) + 1):
        sampler = PKBatchSampler(**options, rank=rank)
        sampler.load_state_dict({"epoch": number, "batch": batch})
        expected = whole[batch:] if batch < len(whole) else following
        assert len(sampler) == len(whole)
        rest = list(sampler)
        assert rest == expected
        assert seeds(rest) == seeds(expected)
        # Used once: the next iteration is whole again.
        assert list(sampler) == (whole if batch < len(whole) else following)


@given(problems())
def test_an_epoch_of_single_classes_covers_every_image(options: dict[str, Any]) -> None:
    """An image that no epoch draws would be missing from training for good."""
    options |= {"classes_per_batch": 1, "num_replicas": 1, "num_batches": None}
    assert {index for batch in epoch(**options) for index in batch} == set(range(len(options["labels"])))


@given(problems())
def test_an_image_comes_again_only_to_complete_a_group(options: dict[str, Any]) -> None:
    """An image on two ranks, or in two steps of a pass, is trained on twice where another is not at all."""
    k, labels = options["samples_per_class"], options["labels"]
    options |= {"num_batches": None}
    batches = [batch for rank in range(options["num_replicas"]) for batch in epoch(rank, **options)]
    times = Counter(index for batch in batches for index in batch)
    for name, size in Counter(labels.tolist()).items():
        images = [times[index] for index in np.flatnonzero(labels == name).tolist()]
        groups = sum(images) // k
        if groups <= -(-size // k):  # else it has lent some
            assert sum(count > 0 for count in images) == min(size, groups * k)


@given(problems())
def test_a_pass_covers_every_image_over_all_ranks(options: dict[str, Any]) -> None:
    """An image that training never reaches might as well not be there."""
    sizes = Counter(options["labels"].tolist()).values()
    # Every step takes at least one group that was left.
    options |= {"num_batches": sum(-(-size // options["samples_per_class"]) for size in sizes)}
    batches = [batch for rank in range(options["num_replicas"]) for batch in epoch(rank, **options)]
    assert {index for batch in batches for index in batch} == set(range(len(options["labels"])))


def test_an_epoch_leaves_out_little_where_classes_are_many() -> None:
    """The last, incomplete batch is dropped; more than that would be lost data."""
    batches = epoch(labels=np.repeat(np.arange(500), 8), classes_per_batch=16, samples_per_class=4)
    assert len(batches) == 62  # of 62.5
    assert len({index for batch in batches for index in batch}) > 0.98 * 4000


def test_an_incomplete_group_is_padded_with_images_of_other_groups() -> None:
    """Padding from the group itself would make pairs of an image with itself."""
    # 7 images in groups of 3: all seven, and two of them once more.
    batches = epoch(labels=np.zeros(7, int), classes_per_batch=1, samples_per_class=3)
    times = Counter(index for batch in batches for index in batch)
    assert sorted(times) == list(range(7)) and sorted(times.values()) == [1, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("classes_per_batch", [1, 6])
def test_several_passes_cover_every_image_evenly(classes_per_batch: int) -> None:
    """Longer epochs must not favour some images, nor always group the same ones."""
    labels = np.repeat(np.arange(6), 8)
    batches = epoch(
        labels=labels, classes_per_batch=classes_per_batch, samples_per_class=4, num_batches=36 // classes_per_batch
    )
    groups = [tuple(batch[start : start + 4]) for batch in batches for start in range(0, len(batch), 4)]
    times = Counter(index for group in groups for index in group)
    assert set(times.values()) == {3} and len(times) == 48
    assert len({frozenset(group) for group in groups}) > 30  # a class that starts over is shuffled anew


def test_classes_are_drawn_in_proportion_to_the_groups_they_have() -> None:
    """Otherwise images of small classes would be seen far more often than others."""
    labels = np.repeat([0, 1, 2], [12, 6, 2])  # 6, 3 and 1 groups
    epochs = [epoch(number=number, labels=labels, classes_per_batch=1, samples_per_class=2) for number in range(2000)]
    # Then every order of the ten groups is as likely as any other, the last place as the first.
    for place in (0, 1, -1):
        share = Counter(int(labels[batches[place][0]]) for batches in epochs)
        assert [share[name] / 2000 for name in range(3)] == pytest.approx([0.6, 0.3, 0.1], abs=0.04)


def test_the_same_seed_and_epoch_draw_the_same_and_others_do_not() -> None:
    """A seed that does not repeat, or an epoch that repeats another, both spoil experiments."""
    options: dict[str, Any] = {"labels": np.repeat(np.arange(20), 9), "classes_per_batch": 4, "samples_per_class": 3}
    base = epoch(**options)
    assert epoch(**options) == base and seeds(epoch(**options)) == seeds(base)
    for other in (epoch(number=1, **options), epoch(seed=1, **options)):
        assert other != base
        assert not set(chain(*seeds(other))) & set(chain(*seeds(base)))
    assert len(set(chain(*seeds(base)))) == sum(map(len, base))  # every place its own


def test_the_plan_is_that_of_earlier_releases() -> None:
    """A checkpoint from the middle of an epoch is a number of batches: another plan would repeat and skip images."""
    batches = epoch(
        number=2,
        labels=np.repeat(np.arange(4), [2, 3, 5, 7]),
        classes_per_batch=2,
        samples_per_class=3,
        seed=5,
        num_batches=6,
    )
    # Written down from version 0.1.0: with a shuffled and a lent class, and with a second pass.
    assert batches == [
        [7, 9, 6, 16, 12, 15],
        [0, 1, 0, 11, 10, 13],
        [8, 5, 7, 4, 2, 3],
        [14, 16, 12, 6, 8, 5],
        [7, 9, 6, 3, 4, 2],
        [13, 16, 14, 6, 5, 9],
    ]
    assert seeds(batches)[0][:2] == [2675681473995628841, 4342626203698482]


def test_set_epoch_forgets_a_loaded_start_only_for_another_epoch() -> None:
    """Lightning calls set_epoch after a resume; forgetting then would repeat the batches already seen."""
    sampler = PKBatchSampler(np.repeat(np.arange(4), 8), 2, 2)
    sampler.load_state_dict({"epoch": 3, "batch": 2})
    sampler.set_epoch(3)
    assert sampler.state_dict() == {"epoch": 3, "batch": 2}
    sampler.set_epoch(4)
    assert sampler.state_dict() == {"epoch": 4, "batch": 0}
    assert len(list(sampler)) == len(sampler) == 8


def test_the_epoch_is_read_at_the_first_batch_and_lightning_finds_set_epoch() -> None:
    """Lightning looks for set_epoch on the inner sampler; not found there, every epoch would be the same."""
    sampler = PKBatchSampler(np.repeat(np.arange(4), 8), 2, 2)
    iterator = iter(sampler)
    sampler.sampler.set_epoch(5)
    assert next(iterator) == epoch(number=5, labels=np.repeat(np.arange(4), 8), classes_per_batch=2,
                                   samples_per_class=2)[0]  # fmt: skip


def test_ranks_are_read_from_the_process_group_at_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samplers are often made before the processes are; a rank fixed then would be 0 everywhere."""
    labels = np.repeat(np.arange(8), 6)
    sampler, evaluation = PKBatchSampler(labels, 2, 2), UnpaddedDistributedSampler(7)
    assert (len(sampler), len(evaluation)) == (12, 7)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "rank", lambda: 2)
    assert (len(sampler), len(evaluation)) == (4, 2)
    assert list(sampler) == epoch(2, labels=labels, classes_per_batch=2, samples_per_class=2, num_replicas=3)
    assert list(evaluation) == [2, 5]


def test_labels_may_be_a_list_or_a_tensor() -> None:
    """Users hold labels in all three forms, and each must draw the same batches."""
    labels = [5, 5, 1, 1, 9, 9, 9]
    expected = epoch(labels=np.array(labels), classes_per_batch=2, samples_per_class=2)
    for form in (labels, torch.tensor(labels), np.array(labels, np.uint8)):
        assert epoch(labels=form, classes_per_batch=2, samples_per_class=2) == expected


def test_dropped_classes_are_never_drawn() -> None:
    """A class of one image has no positive pair; the user asked to leave it out."""
    labels = np.array([3, 0, 1, 1, 2, 2, 0, 0])
    batches = epoch(labels=labels, classes_per_batch=2, samples_per_class=2, drop_small_classes=True, num_batches=50)
    assert {int(labels[index]) for batch in batches for index in batch} == {0, 1, 2}


PAIRS = np.repeat(np.arange(6), 2)
GOOD: dict[str, Any] = {"labels": PAIRS, "classes_per_batch": 2, "samples_per_class": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": np.zeros((2, 2), int)}, r"labels must be a vector of integers, got shape \(2, 2\)"),
        ({"labels": np.zeros(4)}, "labels must be a vector of integers.*float64"),
        ({"labels": np.zeros(4, bool)}, "labels must be a vector of integers.*bool"),
        ({"classes_per_batch": 0}, "classes_per_batch must be an integer of at least 1, got 0"),
        (
            {"samples_per_class": 1},
            "samples_per_class must be an integer of at least 2, got 1; a positive pair takes two",
        ),
        ({"num_batches": 0}, "num_batches must be an integer of at least 1, got 0; None is one pass"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"num_replicas": 0}, "num_replicas must be an integer of at least 1, got 0; None takes the process group's"),
        ({"num_replicas": 2, "rank": 2}, "rank must be an integer from 0 to 1, got 2; .* less than num_replicas"),
        ({"rank": -1}, "rank must be an integer of at least 0, got -1"),
        ({"classes_per_batch": 7}, "classes_per_batch=7 on 1 rank.* there are 6: set classes_per_batch to 6 or less"),
        ({"classes_per_batch": 4, "num_replicas": 2}, "draws 8 different classes .* set classes_per_batch to 3 or"),
        ({"classes_per_batch": 1, "num_replicas": 7}, "use fewer ranks"),
        ({"labels": [4, 4, 7, 8]}, r"class 7 has one image \(2 such .*drop_small_classes=True"),
        ({"labels": [4, 4, 7], "drop_small_classes": True}, "there are 1: set classes_per_batch to 1 or less"),
    ],
)
def test_errors_name_argument_value_and_way_out(options: dict[str, Any], message: str) -> None:
    """Labels and sizes that cannot fit are refused with the number that would fit."""
    with pytest.raises(InputError, match=message):
        PKBatchSampler(**(GOOD | options))


def test_more_ranks_than_at_construction_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few classes for the ranks must not show as a hang in the middle of training."""
    sampler = PKBatchSampler(PAIRS, 4, 2)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(InputError, match="on 2 rank"):
        len(sampler)
    with pytest.raises(InputError, match="on 2 rank"):
        next(iter(sampler))


@pytest.mark.parametrize("state", [{}, {"epoch": 1}, {"epoch": 1, "batch": -2}])
def test_a_state_that_is_none_is_refused(state: dict[str, int]) -> None:
    """The checkpoint of another loader must not pass for the start of an epoch."""
    with pytest.raises(InputError, match="must hold an epoch and a batch"):
        PKBatchSampler(PAIRS, 2, 2).load_state_dict(state)


def test_a_seeded_index_is_an_int_and_survives_pickling() -> None:
    """It is pickled on its way to a worker; without its seed there, workers would change the augmentation."""
    index = SeededIndex(7, seed=2**62 + 1)
    again = pickle.loads(pickle.dumps(index))
    assert again == 7 and type(again) is SeededIndex and again.seed == index.seed
    assert np.arange(10)[again] == 7
