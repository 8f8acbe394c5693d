"""Classes, exclusion keys and drawn galleries against loops over all pairs of items."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_dml.labels import UNLABELLED
from lightning_dml.retrieval.tasks import (
    IgnoreName,
    Task,
    by_draws,
    by_roles,
    dense_classes,
    exclusion_keys,
)

HASH = 8_317_204_965_523_771_239  # labels are often hashes of names
LABELS = st.lists(st.sampled_from([UNLABELLED, -2, 0, 1, 5, HASH, HASH + 1, -HASH]), max_size=10)


def integers(values: list[int]) -> Tensor:
    """An int64 vector, possibly empty."""
    return torch.tensor(values, dtype=torch.int64)


@given(labels=LABELS)
def test_classes_are_numbered_by_ascending_label(labels: list[int]) -> None:
    """Searches compare small numbers, and tables per class keep the order that a reader expects."""
    ascending = sorted(set(labels) - {UNLABELLED})
    expected = [UNLABELLED if label == UNLABELLED else ascending.index(label) for label in labels]
    classes = dense_classes(integers(labels))
    assert classes.dtype == torch.int64 and classes.tolist() == expected


def test_labels_are_not_written_to() -> None:
    """The caller's labels name the rows of the table per class afterwards."""
    labels = torch.tensor([HASH, -1, 3])
    dense_classes(labels)
    assert labels.tolist() == [HASH, -1, 3]


def may_find(query: int, item: int, labels: list[int], groups: list[int], ignore: IgnoreName) -> bool:
    """True where the protocol of re-identification, or that of sequences, lets a query find an item."""
    if query == item:
        return False
    same_group = groups[query] >= 0 and groups[query] == groups[item]
    return not (same_group and (ignore == "group" or labels[query] == labels[item]))


@pytest.mark.parametrize("ignore", ["label_and_group", "group"])
@given(data=st.data(), labels=LABELS)
def test_equal_keys_are_the_pairs_that_may_not_find_each_other(
    ignore: IgnoreName, data: st.DataObject, labels: list[int]
) -> None:
    """An item too many among the candidates makes the protocol easier than the published one."""
    value = st.sampled_from([-7, -1, 0, 1, 2, HASH])
    groups = data.draw(st.lists(value, min_size=len(labels), max_size=len(labels)))
    keys = exclusion_keys(integers(labels), integers(groups), ignore)
    assert keys.dtype == torch.int64 and keys.shape == (len(labels),)
    assert (keys >= 0).all()  # a negative key would let the item find itself
    for query in range(len(labels)):
        for item in range(len(labels)):
            # What a distractor may find is of no interest: it has no answer and is no query.
            if labels[query] != UNLABELLED:
                free = bool(keys[query] != keys[item])
                assert free == may_find(query, item, labels, groups, ignore)


def test_roles_name_the_rows() -> None:
    """An item may be a query, in the gallery, both or neither."""
    task = by_roles(torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False]))
    assert task.queries.tolist() == [0, 2] and task.gallery.tolist() == [0, 1]


def pairs(tasks: list[Task]) -> list[tuple[list[int], list[int]]]:
    """Queries and gallery of each task as lists."""
    return [(task.queries.tolist(), task.gallery.tolist()) for task in tasks]


@given(classes=st.lists(st.integers(-1, 4), max_size=14), draws=st.integers(1, 4), seed=st.integers(0, 5))
def test_a_draw_puts_one_item_of_each_class_in_the_gallery(classes: list[int], draws: int, seed: int) -> None:
    """VehicleID's published numbers are those of one gallery image per vehicle."""
    tasks = list(by_draws(integers(classes), draws, seed))
    assert len(tasks) == draws
    distractors = {row for row, number in enumerate(classes) if number < 0}
    for queries, gallery in pairs(tasks):
        assert sorted(queries + gallery) == list(range(len(classes)))
        assert distractors <= set(gallery)
        drawn = [classes[row] for row in gallery if row not in distractors]
        assert sorted(drawn) == sorted(set(classes) - {-1})
        # A class of a single image has it in the gallery, where nothing looks for it.
        single = {number for number in set(classes) if classes.count(number) == 1}
        assert not single & {classes[row] for row in queries}
    assert pairs(list(by_draws(integers(classes), draws, seed))) == pairs(tasks)


def test_draws_differ_and_follow_the_seed() -> None:
    """A mean over ten equal draws would be one draw; and every rank must draw what the others draw."""
    classes = torch.arange(40) // 4
    first, other = (pairs(list(by_draws(classes, 6, seed))) for seed in (0, 1))
    galleries = [tuple(gallery) for _, gallery in first]
    assert len(set(galleries)) == 6
    assert galleries != [tuple(gallery) for _, gallery in other]
    assert pairs(list(by_draws(classes, 3, 0))) == first[:3]


def test_each_item_of_a_class_is_drawn_equally_often() -> None:
    """A gallery that favours the first images of a class, often the sharpest, would not be the protocol's."""
    classes = torch.tensor([0, 1, 1, 0, 1, 0, -1, 1])
    drawn = torch.zeros(8)
    for task in by_draws(classes, 2000, 0):
        drawn[task.gallery] += 1
    assert drawn[6] == 2000
    # Binomial with 2,000 draws: five standard deviations are 0.053 and 0.048.
    assert (drawn[classes == 0] / 2000 - 1 / 3).abs().max() < 0.053
    assert (drawn[classes == 1] / 2000 - 1 / 4).abs().max() < 0.049
