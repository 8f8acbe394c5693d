"""Batches of P classes x K samples in which every class comes as often as its images, or its weight, ask for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lightning_dml.datamodules.arrays import IntArray
from lightning_dml.datamodules.samplers.class_batches import ClassBatchSampler
from lightning_dml.datamodules.samplers.class_draws import Race, ShuffledClasses, first_to_ring


class PKBatchSampler(ClassBatchSampler):
    """Batches of P classes x K samples on every rank, all classes of one step distinct over all ranks.

    Every rank plans the same global batches of P x W classes from (seed, epoch) alone and yields its own
    slice, so that 2 ranks with P=8 draw exactly what 1 rank with P=16 draws, in rank order. Use it as a
    `batch_sampler` with Lightning's `use_distributed_sampler=False`.

    An epoch: the images of each class are shuffled and cut into groups of K. The last group is completed from the
    start of the same shuffled class, so nothing repeats inside a group; only a class with fewer than K images
    repeats them, each equally often. A step draws distinct classes, with a chance in proportion to the groups
    that each has left. A class that has none left is shuffled anew and lends a group only when fewer than P x W
    classes have any; once all have given theirs, which only a larger `num_batches` reaches, all start over.

    With `class_weights` an epoch is no pass over the data: every step draws its P x W classes one after the other from
    all classes that it has not drawn yet, with a chance in proportion to their weights and whatever earlier steps drew
    (as P x W comes near the number of classes, all are drawn about as often, whatever they weigh). Each class still
    hands out its shuffled groups in turn through the epoch, and is shuffled anew when all its images were used. So an
    epoch uses all n images of each class that it draws ceil(n / K) times, and may miss classes of little weight; its
    length is what it is without weights. A weight is for the class as a whole: "uniform" shows an image of a large
    class less often than one of a small class, and None shows all equally often.

    Args:
        labels: (N,) integer class of every sample.
        classes_per_batch: P, classes per rank and step.
        samples_per_class: K, images of each class in a batch; at least 2, because a positive pair takes two.
        seed: of the plan, and of the augmentation seeds that the indices carry (see `SeededIndex`).
        num_batches: length of an epoch; None means all groups // (P x W), at least 1.
        drop_small_classes: leave out classes with one image instead of raising.
        num_replicas: W; None means the ranks of the process group at the time of iteration.
        rank: which slice to yield; None means this process's rank at the time of iteration.
        class_weights: None draws in proportion to the groups left, "uniform" every class alike, "sqrt" in proportion
            to the square root of its images. A mapping of label to weight, in which a label that is not named weighs 1,
            or a vector with a weight for each label from 0 to the largest.

    Raises:
        InputError: for labels that are not a vector of integers, a P, K, `num_batches`, seed or rank out of
            range, a class with one image, fewer usable classes than P x W, or weights that are not positive and
            finite, name a label that does not occur or lack one.

    Examples:
        >>> sampler = PKBatchSampler([0, 0, 1, 1, 2, 2], classes_per_batch=2, samples_per_class=2)
        >>> [len(batch) for batch in sampler]
        [4]
    """

    def _plan(self, rng: np.random.Generator, images: ShuffledClasses, classes: int) -> Iterator[IntArray]:
        """The endless global batches, (`classes` x K,) indices each; the same on every rank."""
        if self._rates is None:
            return self._passes(rng, images, classes)
        return self._weighted(rng, images, classes, self._rates)

    def _passes(self, rng: np.random.Generator, images: ShuffledClasses, classes: int) -> Iterator[IntArray]:
        """Batches by the groups that classes have left, so that a pass uses every group."""
        left = np.zeros_like(self._groups)
        race = Race(rng)
        while True:
            if race.over:  # a pass over the data begins
                left = self._groups.copy()
                race.start(left)
            classes_drawn = race.first(classes)
            ready = len(classes_drawn)
            if ready < classes:
                classes_drawn += first_to_ring(rng, self._groups, classes - ready, out=classes_drawn).tolist()
            drawn = np.array(classes_drawn)
            yield images.take(drawn)
            left[drawn[:ready]] -= 1
            again = drawn[left[drawn] > 0]
            race.join(again, left[again])

    def _weighted(
        self, rng: np.random.Generator, images: ShuffledClasses, classes: int, rates: NDArray[np.float64]
    ) -> Iterator[IntArray]:
        """Batches by class weights, every step like the first."""
        race = Race(rng)
        race.start(rates)
        while True:
            drawn = np.array(race.first(classes))
            yield images.take(drawn)
            if race.late:
                race = Race(rng)
                race.start(rates)
            else:
                race.join(drawn, rates[drawn])
