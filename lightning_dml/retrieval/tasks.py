"""Queries and galleries: roles as they came or drawn, classes, and the keys of items that do not find each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_dml.labels import UNLABELLED
from lightning_dml.retrieval.exclusion import NOBODY, combined_keys

IgnoreName = Literal["label_and_group", "group"]


@dataclass(frozen=True)
class Task:
    """Queries and the gallery that is searched for them.

    Attributes:
        queries: (Nq,) int64 rows of the items.
        gallery: (Ng,) int64 rows of the items.
    """

    queries: Tensor
    gallery: Tensor


def dense_classes(labels: Tensor) -> Tensor:
    """Classes (N,) int64 numbered from 0 by ascending label; -1 for distractors."""
    distractor = labels == UNLABELLED
    classes = torch.full_like(labels, NOBODY)
    classes[~distractor] = torch.unique(labels[~distractor], return_inverse=True)[1]
    return classes


def exclusion_keys(labels: Tensor, groups: Tensor | None, ignore: IgnoreName) -> Tensor:
    """Keys (N,) int64 of the items; items with equal keys do not find each other.

    Every item has at least a key of its own, so that it does not find itself.

    Args:
        labels: (N,) int64.
        groups: (N,) int64, negative for none; None, none has any.
        ignore: "label_and_group" for a common key of items that have both in common, "group" for the group alone.
    """
    own = torch.arange(len(labels))
    if groups is None or not (groups >= 0).any():
        return own
    numbers = torch.unique(labels, return_inverse=True)[1]
    keys = combined_keys(numbers, groups) if ignore == "label_and_group" else combined_keys(groups)
    return torch.where(keys >= 0, keys, int(keys.max()) + 1 + own)


def by_roles(is_query: Tensor, is_gallery: Tensor) -> Task:
    """The task of the roles (N,) bool that the items came with."""
    return Task(is_query.nonzero().flatten(), is_gallery.nonzero().flatten())


def by_draws(classes: Tensor, draws: int, seed: int) -> Iterator[Task]:
    """Tasks whose gallery is one random item of each class with all distractors, and whose queries are the others.

    Args:
        classes: (N,) int64, -1 for distractors.
        draws: how many tasks.
        seed: of the choice, the same on every rank.
    """
    generator = np.random.default_rng(seed)
    numbers = classes.numpy()
    for _ in range(draws):
        shuffled = generator.permutation(len(numbers))
        shuffled = shuffled[numbers[shuffled] >= 0]
        _, first = np.unique(numbers[shuffled], return_index=True)
        is_gallery = classes < 0
        is_gallery[torch.from_numpy(shuffled[first])] = True
        yield by_roles(~is_gallery, is_gallery)
