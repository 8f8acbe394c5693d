"""Batches of classes that are alike: drawn from a few super-classes at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_dml.checks import check_count
from lightning_dml.datamodules.arrays import IntArray, integer_vector
from lightning_dml.datamodules.samplers.class_batches import ClassBatchSampler, Labels
from lightning_dml.datamodules.samplers.class_draws import ShuffledClasses, first_to_ring
from lightning_dml.errors import InputError


class HierarchicalPKBatchSampler(ClassBatchSampler):
    """Batches of P classes x K samples whose classes come from G super-classes, P / G from each: hard negatives.

    Classes of one super-class (two chairs) are harder to tell apart than any two, and a batch that is drawn from a few
    super-classes has many such pairs. The idea is the "hard" batch of FastAP, two categories with half of the batch
    each (Cakir et al., "Deep Metric Learning to Rank", CVPR 2019, supplementary A). Peers: `HierarchicalSampler` of
    pytorch-metric-learning, which takes all pairs of super-classes equally often, and `CategoryBalanceSampler` of OML.

    A step of all W ranks draws G x W shares of P / G classes each, and all its classes are distinct. The super-class of
    a share is drawn with a chance in proportion to the groups of K images that its classes have left, and it gives the
    classes of the share with a chance in proportion to the groups that each has left (see `PKBatchSampler` for the
    groups). The rules where something runs out:

    - A super-class that has no groups left lends some only after every one that has, and likewise a class within its
      super-class. Once all have given theirs, all start over.
    - All shares of a step have different super-classes. With fewer super-classes than G x W, further shares take them
      again in the same order, with other classes: a batch of one rank still has G different ones.
    - A super-class with fewer classes than its share, or with fewer that the step has not drawn yet, gives all it has,
      and the next super-class completes the share. So no class is out of reach, and such a batch has more than G
      super-classes.

    Ranks share one plan, as in `PKBatchSampler`: 2 ranks with G=1 and P=8 draw what 1 rank with G=2 and P=16 draws. An
    epoch is as long as there, and a pass uses every group. But a super-class comes once in a step and its share is
    fixed: one that holds more than 1 / (G x W) of all groups is not gone through in an epoch of the default length,
    during which smaller ones lend; fewer super-classes in a batch, or a larger `num_batches`, help.

    Args:
        labels: (N,) integer class of every sample.
        super_labels: (N,) integer super-class of every sample, the same for all samples of a class.
        super_classes_per_batch: G, which must divide P.
        classes_per_batch: P, classes per rank and step.
        samples_per_class: K, images of each class in a batch; at least 2, because a positive pair takes two.
        seed: of the plan, and of the augmentation seeds that the indices carry (see `SeededIndex`).
        num_batches: length of an epoch; None means all groups // (P x W), at least 1.
        drop_small_classes: leave out classes with one image instead of raising.
        num_replicas: W; None means the ranks of the process group at the time of iteration.
        rank: which slice to yield; None means this process's rank at the time of iteration.
        class_weights: draws in proportion to these instead of the groups left, super-classes by the sum over their
            classes; as in `PKBatchSampler`, an epoch then is no pass over the data.

    Raises:
        InputError: as `PKBatchSampler`; for super-labels that are not a vector of N integers, a class in two
            super-classes, a G that does not divide P, or fewer super-classes than G.

    Examples:
        >>> labels = [0, 0, 1, 1, 2, 2, 3, 3]
        >>> sampler = HierarchicalPKBatchSampler(labels, [0] * 4 + [1] * 4, 1, classes_per_batch=2, samples_per_class=2)
        >>> sorted(sorted(batch) for batch in sampler)
        [[0, 1, 2, 3], [4, 5, 6, 7]]
    """

    def __init__(
        self,
        labels: Labels,
        super_labels: Labels,
        super_classes_per_batch: int = 2,
        **options: Any,
    ) -> None:
        """Sorts the samples by class and the classes by super-class; see the class for the options."""
        super().__init__(labels, **options)
        _check_share(super_classes_per_batch, self.classes_per_batch)
        self.super_classes_per_batch = super_classes_per_batch
        supers = self._super_of_class(integer_vector("labels", labels), integer_vector("super_labels", super_labels))
        names, self._super = np.unique(supers, return_inverse=True)
        if super_classes_per_batch > len(names):
            raise InputError(
                f"super_classes_per_batch={super_classes_per_batch}, but there are {len(names)} super-classes: set it "
                f"to {len(names)} or less"
            )
        # The classes of each super-class lie together, so that finding them is a slice.
        self._by_super: IntArray = np.argsort(self._super, kind="stable").astype(np.int64)
        self._ends: IntArray = np.cumsum(np.bincount(self._super)).astype(np.int64)
        self._super_groups = np.bincount(self._super, self._groups)

    @property
    def num_super_classes(self) -> int:
        """Number of super-classes that are drawn from."""
        return len(self._ends)

    def _super_of_class(self, labels: NDArray[np.integer], super_labels: NDArray[np.integer]) -> NDArray[np.integer]:
        """The super-label of each class that is drawn from, (C,), after checking that it is one."""
        if len(super_labels) != len(labels):
            raise InputError(
                f"super_labels must have one entry for each of the {len(labels)} labels, got {len(super_labels)}"
            )
        supers = super_labels[self._members]
        firsts = np.cumsum(self._counts) - self._counts
        of_class: NDArray[np.integer] = supers[firsts]
        other = supers != np.repeat(of_class, self._counts)
        if other.any():
            place = int(np.flatnonzero(other)[0])
            label = labels[self._members[place]]
            first = super_labels[labels == label][0]
            raise InputError(
                f"class {label} lies in super-classes {first} and {supers[place]}, and a class must lie in one: "
                "correct super_labels, or give each pair of class and super-class its own label"
            )
        return of_class

    def _plan(self, rng: np.random.Generator, images: ShuffledClasses, classes: int) -> Iterator[IntArray]:
        """The endless global batches, (`classes` x K,) indices each; the same on every rank."""
        left = self._rates if self._rates is not None else self._groups.copy()
        while True:
            if not left.any():  # a pass over the data begins
                left = self._groups.copy()
            drawn = self._step(rng, left, classes)
            yield images.take(drawn)
            if self._rates is None:
                left[drawn] = np.maximum(left[drawn] - 1, 0)

    def _step(self, rng: np.random.Generator, left: NDArray[np.number], classes: int) -> IntArray:
        """Draws `classes` distinct classes, share after share, (`classes`,)."""
        share = need = self.classes_per_batch // self.super_classes_per_batch
        free = np.ones(self.num_classes, bool)
        parts: list[IntArray] = []
        total = 0
        for super_class in itertools.cycle(self._order(rng, left, classes).tolist()):
            own = self._by_super[self._ends[super_class - 1] if super_class else 0 : self._ends[super_class]]
            own = own[free[own]]
            part = _some(rng, own, left[own], self._groups[own], min(need, len(own)))
            free[part] = False
            parts.append(part)
            total += len(part)
            need = need - len(part) or share
            if total == classes:
                break
        return np.concatenate(parts)

    def _order(self, rng: np.random.Generator, left: NDArray[np.number], classes: int) -> IntArray:
        """Super-classes in the order in which a step of so many `classes` turns to them."""
        those = np.arange(self.num_super_classes)
        # A super-class gives at least one class at its first turn, so a step turns to no more than it has classes.
        return _some(rng, those, np.bincount(self._super, left), self._super_groups, min(len(those), classes))


def _some(
    rng: np.random.Generator,
    those: IntArray,
    left: NDArray[np.number],
    groups: NDArray[np.number],
    count: int,
) -> IntArray:
    """Draws `count` of `those` in random order by the groups that they have `left`; those without come last."""
    ready, lending = np.flatnonzero(left > 0), np.flatnonzero(left <= 0)
    early, late = min(count, len(ready)), max(0, count - len(ready))
    first = ready[first_to_ring(rng, left[ready], early)]
    chosen: IntArray = those[np.concatenate([first, lending[first_to_ring(rng, groups[lending], late)]])]
    return chosen


def _check_share(super_classes_per_batch: int, classes_per_batch: int) -> None:
    check_count("super_classes_per_batch", super_classes_per_batch)
    if classes_per_batch % super_classes_per_batch:
        less = classes_per_batch // super_classes_per_batch * super_classes_per_batch
        way_out = f"{less} or {less + super_classes_per_batch}" if less else f"{super_classes_per_batch}"
        raise InputError(
            f"super_classes_per_batch={super_classes_per_batch} must divide classes_per_batch={classes_per_batch}, so "
            f"that each super-class has the same share: set classes_per_batch to {way_out}"
        )
