"""Random parts of a plan: images in shuffled groups, and classes by a race of exponential clocks."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_dml.datamodules.arrays import IntArray


class ShuffledClasses:
    """The images of every class in random order, handed out K at a time.

    The last group of a class is completed from its start, so nothing repeats inside a group unless the class has fewer
    than K images. A class that was gone through is shuffled anew.

    Args:
        rng: what to shuffle with.
        members: (N,) the samples sorted by class.
        counts: (C,) how many each class has, at least 1.
        samples: K.
    """

    def __init__(self, rng: np.random.Generator, members: IntArray, counts: IntArray, samples: int) -> None:
        """Shuffles every class; see the class."""
        self._rng = rng
        self._counts = counts
        self._offsets = np.cumsum(counts) - counts
        self._groups = -(-counts // samples)
        self._taken = np.zeros_like(counts)
        self._within = np.arange(samples)
        # Sorting by class and a random key shuffles every class without a Python loop over them.
        keys = rng.random(len(members))
        self._images = members[np.lexsort((keys, np.repeat(np.arange(len(counts)), counts)))]

    def take(self, drawn: IntArray) -> IntArray:
        """Takes the next group of each of the distinct classes `drawn` (M,), one after the other, (M x K,)."""
        for place in drawn[self._taken[drawn] == self._groups[drawn]]:
            first = self._offsets[place]
            self._rng.shuffle(self._images[first : first + self._counts[place]])
            self._taken[place] = 0
        turns = (self._taken[drawn, None] * len(self._within) + self._within) % self._counts[drawn, None]
        self._taken[drawn] += 1
        group: IntArray = self._images[self._offsets[drawn, None] + turns].ravel()
        return group


class Race:
    """Exponential clocks: one of rate g rings next with a chance in proportion to g.

    To take the first few that ring is Gumbel top-k on log g, in O(log classes) a draw instead of O(classes). As such
    clocks have no memory, those that did not ring need not be set anew for the next draw, whatever rang before.

    Args:
        rng: what to draw the times from.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        """A race without clocks."""
        self._rng = rng
        self._clocks: list[tuple[float, int]] = []
        self._now = 0.0

    @property
    def over(self) -> bool:
        """True when no clock is set."""
        return not self._clocks

    @property
    def late(self) -> bool:
        """True when so much time has passed that float64 would soon blur the differences between short times."""
        return self._now > 1e9

    def start(self, rates: NDArray[Any]) -> None:
        """Sets a clock of each of the positive `rates` (C,)."""
        rings = self._now + self._rng.standard_exponential(len(rates)) / rates
        self._clocks = list(zip(rings.tolist(), range(len(rates)), strict=True))
        heapq.heapify(self._clocks)

    def first(self, count: int) -> list[int]:
        """Takes the next `count` clocks to ring, in order, or all where fewer are set; they are set no longer."""
        places: list[int] = []
        while self._clocks and len(places) < count:
            self._now, place = heapq.heappop(self._clocks)
            places.append(place)
        return places

    def join(self, drawn: IntArray, rates: NDArray[Any]) -> None:
        """Sets clocks of the positive `rates` (M,) for `drawn` (M,), which have none."""
        rings = self._now + self._rng.standard_exponential(len(drawn)) / rates
        for clock in zip(rings.tolist(), drawn.tolist(), strict=True):
            heapq.heappush(self._clocks, clock)


def first_to_ring(rng: np.random.Generator, rates: NDArray[Any], count: int, out: list[int] | None = None) -> IntArray:
    """The first `count` places to ring in one race from its start, in order, (count,).

    Args:
        rng: what to draw the times from.
        rates: (C,) positive.
        count: from 0 to C, less those that are out.
        out: distinct places that are not to ring.
    """
    if count == 0:
        return np.empty(0, np.int64)
    rings = rng.standard_exponential(len(rates)) / rates
    if out:
        rings[out] = np.inf
    first = np.argpartition(rings, count - 1)[:count]
    return first[np.argsort(rings[first])].astype(np.int64)
