"""Which images make a batch: P classes x K samples, planned for all ranks at once, and unpadded evaluation."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from lightning_dml import distributed
from lightning_dml.errors import InputError

IntArray = NDArray[np.int64]


class SeededIndex(int):
    """A sample's index that carries the seed of its random augmentation.

    The seed follows from the run's seed, the epoch and the sample's place in the global batch, so the same
    image gets the same augmentation whatever the number of workers, and after a resume.

    Args:
        index: position in the data set.
        seed: for the random number generator; 0 <= seed < 2**63.

    Examples:
        >>> index = SeededIndex(3, seed=11)
        >>> index + 1, index.seed
        (4, 11)
    """

    seed: int

    def __new__(cls, index: int, seed: int) -> SeededIndex:
        """An int that equals `index` and knows `seed`."""
        self = super().__new__(cls, index)
        self.seed = seed
        return self

    def __reduce__(self) -> tuple[type[SeededIndex], tuple[int, int]]:
        """Pickles as its two numbers: a loader sends one for each image to its workers."""
        return SeededIndex, (int(self), self.seed)


class PKBatchSampler(Sampler[list[int]]):
    """Batches of P classes x K samples on every rank, all classes of one step distinct over all ranks.

    Every rank plans the same global batches of P x W classes from (seed, epoch) alone and yields its own
    slice, so that 2 ranks with P=8 draw exactly what 1 rank with P=16 draws, in rank order. Use it as a
    `batch_sampler` with Lightning's `use_distributed_sampler=False`.

    An epoch: the images of each class are shuffled and cut into groups of K. The last group is completed from the
    start of the same shuffled class, so nothing repeats inside a group; only a class with fewer than K images
    repeats them, each equally often. A step draws distinct classes, with a chance in proportion to the groups
    that each has left. A class that has none left is shuffled anew and lends a group only when fewer than P x W
    classes have any; once all have given theirs, which only a larger `num_batches` reaches, all start over.

    Args:
        labels: (N,) integer class of every sample.
        classes_per_batch: P, classes per rank and step.
        samples_per_class: K, images of each class in a batch; at least 2, because a positive pair takes two.
        seed: of the plan, and of the augmentation seeds that the indices carry (see `SeededIndex`).
        num_batches: length of an epoch; None means all groups // (P x W), at least 1.
        drop_small_classes: leave out classes with one image instead of raising.
        num_replicas: W; None means the ranks of the process group at the time of iteration.
        rank: which slice to yield; None means this process's rank at the time of iteration.

    Raises:
        InputError: for labels that are not a vector of integers, a P, K, `num_batches`, seed or rank out of
            range, a class with one image, or fewer usable classes than P x W.

    Examples:
        >>> sampler = PKBatchSampler([0, 0, 1, 1, 2, 2], classes_per_batch=2, samples_per_class=2)
        >>> [len(batch) for batch in sampler]
        [4]
    """

    def __init__(
        self,
        labels: Sequence[int] | NDArray[Any] | Tensor,
        classes_per_batch: int = 16,
        samples_per_class: int = 4,
        seed: int = 0,
        num_batches: int | None = None,
        drop_small_classes: bool = False,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        """Sorts the samples by class; see the class for the options."""
        super().__init__()
        if classes_per_batch < 1:
            raise InputError(f"classes_per_batch must be at least 1, got {classes_per_batch}")
        if samples_per_class < 2:
            raise InputError(
                f"samples_per_class must be at least 2, because a positive pair takes two images of a class, "
                f"got {samples_per_class}"
            )
        if num_batches is not None and num_batches < 1:
            raise InputError(f"num_batches must be at least 1, or None for one pass over the data, got {num_batches}")
        if seed < 0:
            raise InputError(f"seed must not be negative, got {seed}")
        _check_replicas(num_replicas, rank)
        self.classes_per_batch = classes_per_batch
        self.samples_per_class = samples_per_class
        self.seed = seed
        self.num_batches = num_batches
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0
        self._start = 0
        self._members, self._counts = _classes(labels, drop_small_classes)
        self._offsets = np.cumsum(self._counts) - self._counts
        self._groups = -(-self._counts // samples_per_class)
        self._step_classes()  # fails here where it can, rather than at the first batch

    @property
    def sampler(self) -> PKBatchSampler:
        """Itself: Lightning calls `set_epoch` on `dataloader.batch_sampler.sampler`, never on the batch sampler."""
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
        """Where the next iteration starts: `epoch` and `batch`, the batches of that epoch to pass over."""
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
        rank = distributed.rank() if self.rank is None else self.rank
        epoch, (start, self._start) = self.epoch, (self._start, 0)
        size = self.classes_per_batch * self.samples_per_class
        for step, batch in enumerate(itertools.islice(self._plan(epoch, classes), len(self))):
            if step < start:
                continue
            mine = slice(rank * size, (rank + 1) * size)
            places = np.arange(step * len(batch), (step + 1) * len(batch))[mine]
            seeds = _mix(self.seed, epoch, places)
            yield [SeededIndex(*pair) for pair in zip(batch[mine].tolist(), seeds.tolist(), strict=True)]

    def _step_classes(self) -> int:
        """P x W, after checking that there are as many classes."""
        replicas = distributed.world_size() if self.num_replicas is None else self.num_replicas
        classes = self.classes_per_batch * replicas
        if classes > self.num_classes:
            most = self.num_classes // replicas
            way_out = f"set classes_per_batch to {most} or less" if most else "use fewer ranks or add classes"
            raise InputError(
                f"classes_per_batch={self.classes_per_batch} on {replicas} rank(s) draws {classes} different classes "
                f"in a step, but there are {self.num_classes}: {way_out}"
            )
        return classes

    def _plan(self, epoch: int, classes: int) -> Iterator[IntArray]:
        """The endless global batches, (`classes` x K,) indices each; the same on every rank.

        A race of exponential clocks: a class with g groups left rings at rate g, so the next one to ring is drawn in
        proportion to g. That is Gumbel top-k on log g, in O(log classes) a draw instead of O(classes).
        """
        rng = np.random.default_rng((self.seed, epoch))
        # Sorting by class and a random key shuffles every class without a Python loop over them.
        keys = rng.random(len(self._members))
        images = self._members[np.lexsort((keys, np.repeat(np.arange(self.num_classes), self._counts)))]
        left, taken = np.zeros_like(self._groups), np.zeros_like(self._groups)
        within = np.arange(self.samples_per_class)
        clocks: list[tuple[float, int]] = []
        now = 0.0
        while True:
            if not clocks:  # a pass over the data begins
                left = self._groups.copy()
                rings = now + rng.standard_exponential(len(left)) / left
                clocks = list(zip(rings.tolist(), range(len(left)), strict=True))
                heapq.heapify(clocks)
            chosen: list[int] = []
            while clocks and len(chosen) < classes:
                now, each = heapq.heappop(clocks)
                chosen.append(each)
            ready = len(chosen)
            if ready < classes:
                chosen += self._exhausted(rng, chosen, classes - ready)
            drawn = np.array(chosen)
            for each in drawn[taken[drawn] == self._groups[drawn]]:
                first = self._offsets[each]
                rng.shuffle(images[first : first + self._counts[each]])
                taken[each] = 0
            turns = (taken[drawn, None] * self.samples_per_class + within) % self._counts[drawn, None]
            yield images[self._offsets[drawn, None] + turns].ravel()
            taken[drawn] += 1
            left[drawn[:ready]] -= 1
            again = drawn[left[drawn] > 0]
            rings = now + rng.standard_exponential(len(again)) / left[again]
            for clock in zip(rings.tolist(), again.tolist(), strict=True):
                heapq.heappush(clocks, clock)

    def _exhausted(self, rng: np.random.Generator, chosen: list[int], count: int) -> list[int]:
        """`count` classes that are not among `chosen`, by the same race with all their groups."""
        rings = rng.standard_exponential(self.num_classes) / self._groups
        rings[chosen] = np.inf
        first = np.argpartition(rings, count - 1)[:count]
        ordered: list[int] = first[np.argsort(rings[first])].tolist()
        return ordered


class UnpaddedDistributedSampler(Sampler[int]):
    """Every W-th index from this rank's on: each sample exactly once over all ranks, none twice.

    The stock `DistributedSampler` repeats samples to make the ranks even, and a repeated image is a perfect match for
    itself, which lifts the recall.

    Args:
        length: number of samples.
        num_replicas: W; None means the ranks of the process group at the time of iteration.
        rank: None means this process's rank at the time of iteration.
        at_least_one: where there are fewer samples than ranks, give one of them again to each rank that would have
            none; for evaluation, which drops repeats by index.

    Raises:
        InputError: for a negative length or a rank out of range.

    Examples:
        >>> [list(UnpaddedDistributedSampler(5, num_replicas=2, rank=rank)) for rank in range(2)]
        [[0, 2, 4], [1, 3]]
    """

    def __init__(
        self, length: int, num_replicas: int | None = None, rank: int | None = None, at_least_one: bool = False
    ) -> None:
        """Checks the options; see the class."""
        super().__init__()
        if length < 0:
            raise InputError(f"length must not be negative, got {length}")
        _check_replicas(num_replicas, rank)
        self.length = length
        self.num_replicas = num_replicas
        self.rank = rank
        self.at_least_one = at_least_one

    def __iter__(self) -> Iterator[int]:
        """Yields this rank's indices in ascending order."""
        return iter(self._indices())

    def __len__(self) -> int:
        """Samples on this rank."""
        return len(self._indices())

    def _indices(self) -> range:
        replicas = distributed.world_size() if self.num_replicas is None else self.num_replicas
        rank = distributed.rank() if self.rank is None else self.rank
        if self.at_least_one and 0 < self.length <= rank:
            return range(rank % self.length, rank % self.length + 1)
        return range(rank, self.length, replicas)


def _check_replicas(num_replicas: int | None, rank: int | None) -> None:
    if num_replicas is not None and num_replicas < 1:
        raise InputError(f"num_replicas must be at least 1, or None for the process group's, got {num_replicas}")
    if rank is not None and (rank < 0 or (num_replicas is not None and rank >= num_replicas)):
        raise InputError(f"rank must be at least 0 and less than num_replicas={num_replicas}, got {rank}")


def _classes(labels: Sequence[int] | NDArray[Any] | Tensor, drop_small: bool) -> tuple[IntArray, IntArray]:
    """The samples sorted by class, (N,), and how many each class has, (C,)."""
    values = np.asarray(labels)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"labels must be a vector of integers, got shape {values.shape} of {values.dtype}")
    names, classes, counts = np.unique(values, return_inverse=True, return_counts=True)
    small = counts < 2
    if small.any() and not drop_small:
        raise InputError(
            f"class {names[small][0]} has one image ({int(small.sum())} such class(es) in labels), and a positive pair "
            "takes two: remove it, or set drop_small_classes=True"
        )
    members = np.argsort(classes, kind="stable")
    return members[~small[classes[members]]].astype(np.int64), counts[~small].astype(np.int64)


def _mix(seed: int, epoch: int, places: IntArray) -> IntArray:
    """One well-mixed 63-bit seed for each place: splitmix64 over seed, epoch and place in turn."""
    state = np.zeros(len(places), np.uint64)
    for part in (np.uint64(seed % 2**64), np.uint64(epoch), places.astype(np.uint64)):
        state = (state ^ part) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(1)).astype(np.int64)
