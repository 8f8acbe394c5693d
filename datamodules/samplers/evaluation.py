"""Evaluation over ranks: every image once, none twice."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from lightning_dml.checks import check_count
from lightning_dml.datamodules.samplers.replicas import check_replicas, rank_now, replicas_now


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
        self, length: int, *, num_replicas: int | None = None, rank: int | None = None, at_least_one: bool = False
    ) -> None:
        """Checks the options; see the class."""
        super().__init__()
        check_count("length", length, 0)
        check_replicas(num_replicas, rank)
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
        replicas = replicas_now(self.num_replicas)
        rank = rank_now(self.rank)
        if self.at_least_one and 0 < self.length <= rank:
            return range(rank % self.length, rank % self.length + 1)
        return range(rank, self.length, replicas)
