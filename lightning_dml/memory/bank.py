"""The memory bank: a ring buffer of embeddings with their labels, sample indices and entry steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_dml.errors import InputError

EMPTY = -1


class MemoryBank:
    """Cross-batch queue of (embedding, label, sample index, step), first in, first out (arXiv 1912.06798).

    It is no `nn.Module` and holds no registered buffers on purpose: DDP would overwrite them from rank 0 at each
    forward, and weight averaging would average them. Writing is a copy of the batch into its slots: nothing of the
    bank is cloned and, on an accelerator, the host does not wait.

    A row that is not finite is refused: its slot is left empty, which the losses skip, and counted in `refused`.

    Args:
        size: number of slots.
        dim: number of columns of an embedding.
        dtype: floating dtype of the stored embeddings; what is enqueued is converted to it.
        device: where the bank lives.

    Attributes:
        refused: 0-dim int64, how many rows were not finite since the last reset.

    Raises:
        InputError: if `size` or `dim` is not positive, or `dtype` is not floating.

    Examples:
        >>> bank = MemoryBank(size=3, dim=2)
        >>> bank.enqueue(torch.eye(2), torch.tensor([4, 7]), step=0)
        >>> bank.enqueue(torch.eye(2), torch.tensor([5, 9]), step=1)
        >>> len(bank), bank.labels.tolist(), bank.steps.tolist()  # the oldest row, label 4, gave way to label 9
        (3, [9, 7, 5], [1, 0, 1])
    """

    def __init__(
        self,
        size: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if size < 1:
            raise InputError(f"memory size must be positive, got {size}")
        if dim < 1:
            raise InputError(f"memory dim must be the number of embedding columns, at least 1, got {dim}")
        if not dtype.is_floating_point:
            raise InputError(f"memory dtype must be floating, such as torch.float32, got {dtype}")
        self._embeddings = torch.zeros(size, dim, dtype=dtype, device=device)
        self._labels = torch.full((size,), EMPTY, dtype=torch.int64, device=device)
        self._indices = torch.full_like(self._labels, EMPTY)
        self._steps = torch.full_like(self._labels, EMPTY)
        self.refused = torch.zeros((), dtype=torch.int64, device=device)
        self._count = 0
        self._pointer = 0

    @property
    def size(self) -> int:
        """Number of slots."""
        return len(self._labels)

    @property
    def dim(self) -> int:
        """Number of columns of an embedding."""
        return self._embeddings.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored embeddings."""
        return self._embeddings.dtype

    @property
    def device(self) -> torch.device:
        """Where the bank lives."""
        return self._embeddings.device

    def __len__(self) -> int:
        return self._count

    @property
    def embeddings(self) -> Tensor:
        """(len, dim) view of the filled slots."""
        return self._embeddings[: self._count]

    @property
    def labels(self) -> Tensor:
        """(len,) int64 view; -1 in the slot of a refused row."""
        return self._labels[: self._count]

    @property
    def indices(self) -> Tensor:
        """(len,) int64 view of the sample indices; -1 where none was given."""
        return self._indices[: self._count]

    @property
    def steps(self) -> Tensor:
        """(len,) int64 view of the steps at which the rows came in; -1 where none was given."""
        return self._steps[: self._count]

    @torch.no_grad()
    def enqueue(
        self, embeddings: Tensor, labels: Tensor, indices: Tensor | None = None, step: int | None = None
    ) -> None:
        """Writes a batch over the oldest rows.

        Any number of rows may come, none and more than the bank holds included; of those the last `size` stay.

        Args:
            embeddings: (n, dim) float; stored detached, in the bank's dtype, on the bank's device.
            labels: (n,) integer labels; -1 for a row that is to take part in nothing.
            indices: (n,) integer sample indices; -1 or None where unknown.
            step: the training step that made the rows.

        Raises:
            InputError: if a shape or a dtype does not fit.
        """
        self._check(embeddings, labels, indices)
        if indices is None:
            indices = torch.full_like(labels, EMPTY, dtype=torch.int64)
        skipped = max(0, len(labels) - self.size)
        self._pointer = (self._pointer + skipped) % self.size
        rows = embeddings[skipped:].to(self._embeddings)
        finite = torch.isfinite(rows).all(dim=1)
        self.refused += (~finite).sum()
        rows = torch.where(finite[:, None], rows, torch.zeros_like(rows))
        labels = torch.where(finite, labels[skipped:].to(self._labels), EMPTY)
        indices = torch.where(finite, indices[skipped:].to(self._indices), EMPTY)

        before_end = min(len(rows), self.size - self._pointer)
        for part, start in ((slice(0, before_end), self._pointer), (slice(before_end, None), 0)):
            slots = slice(start, start + len(rows[part]))
            self._embeddings[slots] = rows[part]
            self._labels[slots] = labels[part]
            self._indices[slots] = indices[part]
            self._steps[slots] = EMPTY if step is None else step
        self._pointer = (self._pointer + len(rows)) % self.size
        self._count = min(self.size, self._count + len(rows))

    def reset(self) -> None:
        """Empties the bank."""
        self._embeddings.zero_()
        for column in (self._labels, self._indices, self._steps):
            column.fill_(EMPTY)
        self.refused.zero_()
        self._count = self._pointer = 0

    def to(self, device: torch.device | str) -> MemoryBank:
        """Moves the bank, in place, and returns it."""
        for name in ("_embeddings", "_labels", "_indices", "_steps", "refused"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def state_dict(self) -> dict[str, Any]:
        """The filled slots and the pointer, as tensors and ints that `torch.load(weights_only=True)` reads."""
        return {
            "size": self.size,
            "dim": self.dim,
            "pointer": self._pointer,
            # Clones: saving a view would save its whole storage, and the bank may change before it is written.
            "embeddings": self.embeddings.clone(),
            "labels": self.labels.clone(),
            "indices": self.indices.clone(),
            "steps": self.steps.clone(),
            "refused": self.refused.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a saved bank; rows are converted to this bank's dtype and device.

        A bank of another size keeps its own size: the newest rows that fit are taken, in their order.

        Raises:
            InputError: if the saved bank has another dimension.
        """
        if state["dim"] != self.dim:
            raise InputError(
                f"the saved memory bank holds embeddings of {state['dim']} columns and this one of {self.dim}: "
                "load it with the embedder that made it, or start with an empty bank"
            )
        self.reset()
        rows = len(state["labels"])
        order = torch.arange(rows)
        same_size = state["size"] == self.size
        if not same_size and rows == state["size"]:
            order = order.roll(-int(state["pointer"]))  # oldest first
        if not same_size:
            order = order[-self.size :]
        self._count = len(order)
        self._pointer = int(state["pointer"]) if same_size else self._count % self.size
        for own, saved in (
            (self._embeddings, state["embeddings"]),
            (self._labels, state["labels"]),
            (self._indices, state["indices"]),
            (self._steps, state["steps"]),
        ):
            own[: self._count] = saved[order.to(saved.device)].to(own)
        self.refused.copy_(state["refused"])

    def __repr__(self) -> str:
        return f"MemoryBank(size={self.size}, dim={self.dim}, filled={len(self)}, dtype={self.dtype})"

    def _check(self, embeddings: Tensor, labels: Tensor, indices: Tensor | None) -> None:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim or not embeddings.is_floating_point():
            raise InputError(
                f"embeddings must be a float tensor of shape (n, {self.dim}), "
                f"got {embeddings.dtype} {tuple(embeddings.shape)}"
            )
        for name, column in (("labels", labels), ("indices", indices)):
            if column is None:
                continue
            if column.is_floating_point() or column.dtype == torch.bool:
                raise InputError(f"{name} must be integers, got {column.dtype}; convert with .long()")
            if column.shape != embeddings.shape[:1]:
                raise InputError(
                    f"{name} must have one entry per embedding, shape ({len(embeddings)},), got {tuple(column.shape)}"
                )
