"""The base of class-balanced batch samplers: one plan for all ranks, of which each rank yields its slice."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from lightning_dml.checks import check_count
from lightning_dml.datamodules.arrays import IntArray, integer_vector
from lightning_dml.datamodules.samplers.class_draws import ShuffledClasses
from lightning_dml.datamodules.samplers.class_weights import ClassWeights, class_rates
from lightning_dml.datamodules.samplers.replicas import check_replicas, rank_now, replicas_now
from lightning_dml.datamodules.seeded_index import SeededIndex, mix
from lightning_dml.errors import InputError

Labels = Sequence[int] | NDArray[Any] | Tensor


class ClassBatchSampler(Sampler[list[int]]):
    """Batches of P classes x K samples on every rank, by a plan that a subclass makes in `_plan`.

    Every rank makes the same plan of global batches of P x W classes from (seed, epoch) alone and yields its own slice.

    Args:
        labels: (N,) integer class of every sample.
        classes_per_batch: P, classes per rank and step.
        samples_per_class: K, images of each class in a batch; at least 2.
        seed: of the plan, and of the augmentation seeds that the indices carry (see `SeededIndex`).
        num_batches: length of an epoch; None means all groups // (P x W), at least 1.
        drop_small_classes: leave out classes with one image instead of raising.
        num_replicas: W; None means the ranks of the process group at the time of iteration.
        rank: which slice to yield; None means this process's rank at the time of iteration.
        class_weights: how often to draw each class (see `PKBatchSampler`).

    Raises:
        InputError: for options out of range, or fewer usable classes than P x W.
    """

    def __init__(
        self,
        labels: Labels,
        classes_per_batch: int = 16,
        samples_per_class: int = 4,
        *,
        seed: int = 0,
        num_batches: int | None = None,
        drop_small_classes: bool = False,
        num_replicas: int | None = None,
        rank: int | None = None,
        class_weights: ClassWeights | None = None,
    ) -> None:
        """Sorts the samples by class; see the class for the options."""
        super().__init__()
        check_count("classes_per_batch", classes_per_batch)
        check_count("samples_per_class", samples_per_class, 2, hint="a positive pair takes two images of a class")
        if num_batches is not None:
            check_count("num_batches", num_batches, hint="None is one pass over the data")
        check_count("seed", seed, 0)
        check_replicas(num_replicas, rank)
        self.classes_per_batch = classes_per_batch
        self.samples_per_class = samples_per_class
        self.seed = seed
        self.num_batches = num_batches
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0
        self._start = 0
        values = integer_vector("labels", labels)
        names, classes, counts = np.unique(values, return_inverse=True, return_counts=True)
        usable = counts >= 2
        if not usable.all() and not drop_small_classes:
            raise InputError(
                f"class {names[~usable][0]} has one image ({int((~usable).sum())} such class(es) in labels), and a "
                "positive pair takes two: remove it, or set drop_small_classes=True"
            )
        members = np.argsort(classes, kind="stable")
        self._members: IntArray = members[usable[classes[members]]].astype(np.int64)
        self._counts: IntArray = counts[usable].astype(np.int64)
        self._groups: IntArray = -(-self._counts // samples_per_class)
        self._step_classes()  # fails here where it can, rather than at the first batch
        self._rates = None if class_weights is None else class_rates(class_weights, names, counts)[usable]

    @property
    def sampler(self) -> ClassBatchSampler:
        """This sampler, because Lightning calls `set_epoch` on `dataloader.batch_sampler.sampler` alone."""
        return self

    @property
    def num_classes(self) -> int:
        """Number of classes that are drawn from."""
        return len(self._counts)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch to draw; another epoch than the current one forgets a loaded start batch."""
        if epoch != self.epoch:
            self._start = 0
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Start of the next iteration: `epoch` and `batch`, the number of batches of that epoch to pass over."""
        return {"epoch": self.epoch, "batch": self._start}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Lets the next iteration, and that one only, start in the middle of an epoch.

        A state at the end of an epoch means the beginning of the next one.

        Raises:
            InputError: if `state` lacks `epoch` or `batch`, or one of them is negative.
        """
        epoch, batch = state.get("epoch", -1), state.get("batch", -1)
        if epoch < 0 or batch < 0:
            raise InputError(
                f"the sampler's state must hold an epoch and a batch of at least 0, got {dict(state)}; "
                "was the checkpoint written with another data module?"
            )
        self.epoch, self._start = (epoch, batch) if batch < len(self) else (epoch + 1, 0)

    def __len__(self) -> int:
        """Batches per epoch and rank, the same in every epoch."""
        if self.num_batches is not None:
            return self.num_batches
        return max(1, int(self._groups.sum()) // self._step_classes())

    def __iter__(self) -> Iterator[list[int]]:
        """Yields this rank's P x K indices of each step, class after class, as `SeededIndex`."""
        classes = self._step_classes()
        rank = rank_now(self.rank)
        epoch, (start, self._start) = self.epoch, (self._start, 0)
        size = self.classes_per_batch * self.samples_per_class
        rng = np.random.default_rng((self.seed, epoch))
        images = ShuffledClasses(rng, self._members, self._counts, self.samples_per_class)
        for step, batch in enumerate(itertools.islice(self._plan(rng, images, classes), len(self))):
            if step < start:
                continue
            mine = slice(rank * size, (rank + 1) * size)
            places = np.arange(step * len(batch), (step + 1) * len(batch))[mine]
            seeds = mix(self.seed, epoch, places)
            yield [SeededIndex(*pair) for pair in zip(batch[mine].tolist(), seeds.tolist(), strict=True)]

    def _plan(self, rng: np.random.Generator, images: ShuffledClasses, classes: int) -> Iterator[IntArray]:
        """The endless global batches, (`classes` x K,) indices each; must follow from the arguments alone."""
        raise NotImplementedError

    def _step_classes(self) -> int:
        """Classes in a step of all ranks, P x W, after a check that there are as many."""
        replicas = replicas_now(self.num_replicas)
        classes = self.classes_per_batch * replicas
        if classes > self.num_classes:
            most = self.num_classes // replicas
            way_out = f"set classes_per_batch to {most} or less" if most else "use fewer ranks or add classes"
            raise InputError(
                f"classes_per_batch={self.classes_per_batch} on {replicas} rank(s) draws {classes} different classes "
                f"in a step, but there are {self.num_classes}: {way_out}"
            )
        return classes
