"""The slots of a bank: their tensors, all of them or one rank's share, and the two ways to write them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dml.labels import UNLABELLED
from lightning_dml.memory.slots import blocks, own_count, segments


class SlotStore:
    """Slots of (embedding, label, sample index, step), of which slot s has its embedding on rank s % ranks.

    Labels, indices and steps are kept whole on every rank. Every write takes the labels away first and gives the new
    ones last, so that an interrupt finds rows without a label, never a label beside another row's embedding.

    Args:
        size: number of slots, over all ranks.
        dim: number of columns of an embedding.
        dtype: floating dtype of the stored embeddings.
        device: where the tensors live.
        share: (rank, ranks).

    Attributes:
        count: slots in use, over all ranks, the first ones: those that a queue has written, or every slot of "samples"
            once a row has come.
        pointer: the slot that a queue writes next.
    """

    def __init__(
        self, size: int, dim: int, dtype: torch.dtype, device: torch.device | str | None, share: tuple[int, int]
    ) -> None:
        self.size, self.share = size, share
        self.count = self.pointer = 0
        # One slot more than there are: rows that are not to be written go there, and it is never read.
        self.embeddings = torch.zeros(own_count(size, *share) + 1, dim, dtype=dtype, device=device)
        self.labels = torch.full((size + 1,), UNLABELLED, dtype=torch.int64, device=device)
        self.indices = torch.full_like(self.labels, UNLABELLED)
        self.steps = torch.full_like(self.labels, UNLABELLED)

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, indices and steps, (count,) int64 views of the slots in use, the same on every rank."""
        return self.labels[: self.count], self.indices[: self.count], self.steps[: self.count]

    @property
    def labelled(self) -> Tensor:
        """Number of rows with a label, over all ranks; 0-dim int64."""
        return (self.labels[: self.size] != UNLABELLED).sum()

    def own(self, column: Tensor) -> Tensor:
        """View of a whole column at this rank's slots in use."""
        rank, ranks = self.share
        return column[: self.count][rank::ranks]

    def own_slots(self, slots: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that go to this rank, (n,) bool, and their place in its embeddings, the spare one for the others."""
        rank, ranks = self.share
        own = keep & (slots % ranks == rank)
        return own, torch.where(own, slots // ranks, len(self.embeddings) - 1)

    def write_ring(self, start: int, rows: Tensor, labels: Tensor, indices: Tensor, step: int | None) -> None:
        """Writes at most `size` rows to the slots from `start` on, around the end; slices only."""
        parts = segments(start, len(rows), self.size)
        for part, slot in parts:
            self.labels[slot : slot + len(labels[part])] = UNLABELLED
        rank, ranks = self.share
        for part, slot in parts:
            first = (rank - slot) % ranks
            own, at = rows[part][first::ranks], (slot + first) // ranks
            self.embeddings[at : at + len(own)] = own
            slots = slice(slot, slot + len(labels[part]))
            self.indices[slots] = indices[part]
            self.steps[slots] = UNLABELLED if step is None else step
        for part, slot in parts:
            self.labels[slot : slot + len(labels[part])] = labels[part]
        self.pointer = (start + len(rows)) % self.size
        self.count = min(self.size, self.count + len(rows))

    def write_at(self, slots: Tensor, keep: Tensor, rows: Tensor, labels: Tensor, step: int | None) -> None:
        """Writes row i to slot `slots[i]`, which is its sample index, where `keep[i]`; kept slots are distinct.

        No shape depends on the data, and the spare slot gets equal values, in whatever order they come.
        """
        own, own_slots = self.own_slots(slots, keep)
        slots = torch.where(keep, slots, self.size)
        self.labels.index_fill_(0, slots, UNLABELLED)
        self.embeddings.index_copy_(0, own_slots, torch.where(own[:, None], rows, 0))
        self.indices.index_copy_(0, slots, torch.where(keep, slots, UNLABELLED))
        self.steps.index_fill_(0, slots, UNLABELLED if step is None else step)
        self.labels.index_copy_(0, slots, torch.where(keep, labels, UNLABELLED))
        self.count = self.size

    def take_over(self, slots: Tensor, rows: Tensor, saved: dict[str, Tensor]) -> None:
        """Writes rows `rows` (n,) of saved columns to `slots` (n,), converted; a share takes its own."""
        rank, ranks = self.share
        own = slots % ranks == rank
        own_rows, own_slots = rows[own], (slots[own] // ranks).to(self.embeddings.device)
        source = saved["embeddings"]
        for block in blocks(len(own_rows), source.shape[1] * max(source.element_size(), self.embeddings.itemsize)):
            saved_rows = source[own_rows[block].to(source.device)]
            self.embeddings[own_slots[block]] = saved_rows.to(self.embeddings)
        slots = slots.to(self.labels.device)
        for column, name in ((self.indices, "indices"), (self.steps, "steps"), (self.labels, "labels")):
            column[slots] = saved[name][rows.to(saved[name].device)].to(column)

    def clear(self) -> None:
        """Empties every slot."""
        for column in (self.labels, self.indices, self.steps):
            column.fill_(UNLABELLED)
        self.embeddings.zero_()
        self.count = self.pointer = 0

    def to(self, device: torch.device | str) -> None:
        """Moves the tensors."""
        for name in ("embeddings", "labels", "indices", "steps"):
            setattr(self, name, getattr(self, name).to(device))
