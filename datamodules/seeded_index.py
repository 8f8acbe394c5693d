"""A sample's index with the seed of its augmentation, and the function that makes such seeds."""

from __future__ import annotations

import numpy as np

from lightning_dml.datamodules.arrays import IntArray


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


def mix(seed: int, epoch: int, places: IntArray) -> IntArray:
    """Makes one well-mixed 63-bit seed for each place: splitmix64 over seed, epoch and place in turn."""
    state = np.zeros(len(places), np.uint64)
    for part in (np.uint64(seed % 2**64), np.uint64(epoch), places.astype(np.uint64)):
        state = (state ^ part) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(1)).astype(np.int64)
