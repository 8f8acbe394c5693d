"""A loader that a checkpoint can stop and start in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import DataLoader, Dataset

from lightning_dml.errors import InputError


@runtime_checkable
class ResumableBatchSampler(Protocol):
    """A batch sampler that can start an epoch late; `PKBatchSampler` is one."""

    epoch: int

    def state_dict(self) -> dict[str, int]:
        """Returns `epoch` and `batch`, where the next iteration starts."""

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Makes the next iteration start where `state` says."""

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the indices of one batch after the other."""

    def __len__(self) -> int:
        """Returns the batches in a whole epoch."""


class ResumableLoader(DataLoader[Any]):
    """DataLoader whose place in the epoch goes into Lightning's checkpoint and is found again.

    Lightning keeps the state of every train loader that has `state_dict` and `load_state_dict`. A fit that resumes from
    a checkpoint in the middle of an epoch then sees exactly the batches that were still to come. A batch counts from
    the moment it is handed out, so one that was interrupted half-way through its step is not seen again.

    Args:
        dataset: a map-style data set.
        batch_sampler: keeps the epoch, and starts it where it is told to.
        options: of `torch.utils.data.DataLoader`, less `batch_size`, `shuffle`, `sampler` and `drop_last`.

    Raises:
        InputError: if `batch_sampler` cannot start an epoch late.

    Examples:
        >>> from lightning_dml.datamodules import PKBatchSampler
        >>> sampler = PKBatchSampler([0, 0, 1, 1], classes_per_batch=1, samples_per_class=2)
        >>> loader = ResumableLoader(range(4), sampler)
        >>> batch = next(iter(loader))
        >>> loader.state_dict()
        {'epoch': 0, 'batch': 1}
    """

    # On the class, because DataLoader.__init__ must come first and Lightning records attributes that are set after it.
    _position: tuple[int, int] | None = None

    def __init__(self, dataset: Dataset[Any], batch_sampler: ResumableBatchSampler, **options: Any) -> None:
        """Checks the sampler; see the class."""
        if not isinstance(batch_sampler, ResumableBatchSampler):
            raise InputError(
                f"batch_sampler must have epoch, state_dict and load_state_dict, as PKBatchSampler does, "
                f"got {type(batch_sampler).__name__}"
            )
        super().__init__(dataset, batch_sampler=batch_sampler, **options)
        self._resumable = batch_sampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yields the batches of the sampler's epoch, from a loaded place on.

        A generator on purpose: Lightning makes the iterator before it sets the epoch, and workers would start on the
        old epoch's batches if the sampler were read here rather than at the first `next`.
        """
        state = self._resumable.state_dict()
        epoch, batch = state["epoch"], state["batch"]
        self._position = epoch, batch
        for samples in super().__iter__():
            batch += 1
            self._position = epoch, batch
            yield samples

    def state_dict(self) -> dict[str, int]:
        """State for a checkpoint: the epoch and the number of its batches that were handed out."""
        if self._position is None or self._position[0] != self._resumable.epoch:
            return self._resumable.state_dict()  # not begun since the epoch was set
        epoch, batch = self._position
        return {"epoch": epoch, "batch": batch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues after the batches that `state` counts; at the end of an epoch, with the next one."""
        self._resumable.load_state_dict(state)
        self._position = None
