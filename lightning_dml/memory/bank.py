"""The memory bank: embeddings of past batches with their labels, sample indices and entry steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dml import distributed
from lightning_dml.checks import check_count
from lightning_dml.errors import InputError
from lightning_dml.labels import UNLABELLED
from lightning_dml.memory import bank_state
from lightning_dml.memory.bank_statistics import moment_sums, moments_of, summarise, transform_rows
from lightning_dml.memory.entry import Batch, check_indices, write_oldest, write_samples
from lightning_dml.memory.slot_store import SlotStore
from lightning_dml.memory.slots import check_batch, check_policy, own_count

COLUMNS = ("labels", "indices", "steps")


class MemoryBank:
    r"""Memory of (embedding, label, sample index, step) across batches.

    The policy "queue" is first in, first out (arXiv 1912.06798). "samples" keeps one slot for each training sample,
    the slot of its index; of several rows of a sample in one batch the last stays. There, with `average` :math:`\mu`,
    a sample's new embedding f moves its stored one v:

    .. math:: v \leftarrow \mathrm{normalise}(\mu v + (1 - \mu) f)

    This is one reading of the "momentum-updated memory" of arXiv 2103.14003, of which only the abstract was at hand;
    the authors of XBM report that a moving average of entries did not help them (research-xbm, issue 2).

    Two numbers tell how large it is. `size` is its slots, over all ranks. `len(bank)` is the rows that a loss takes as
    references, the rows of `embeddings`, `labels`, `indices` and `steps` on this rank: a row with label -1 is among
    them and makes no pair. `summary` tells how many rows have a label.

    A bank may be spread over ranks: with `share=(rank, ranks)`, slot s lives on rank s % ranks. Every rank enqueues the
    same rows, in the same order, and keeps the embeddings of its own slots; labels, indices and steps, 24 bytes a row,
    are kept whole, and the views are those of the own slots. So `len(bank)` may differ between ranks; `store.count`,
    the slots in use on all ranks, is the same on every one.

    It is no `nn.Module` and holds no registered buffers on purpose: DDP would overwrite them from rank 0 at each
    forward, and weight averaging would average them. Writing is a copy of the batch into its slots: nothing of the
    bank is cloned and, on an accelerator, the host does not wait.

    A row that is not finite is refused and counted in `refused`: its slot is left empty in a queue, which the losses
    skip, and as it was with "samples".

    Args:
        size: number of slots, over all ranks; with "samples" the number of training samples.
        dim: number of columns of an embedding.
        dtype: floating dtype of the stored embeddings; what is enqueued is converted to it.
        device: where the bank lives.
        policy: "queue" or "samples".
        average: :math:`\mu` in [0, 1), the share of the old embedding; needs policy "samples". Formed in float32 or
            better; a sum without direction gives way to the new embedding.
        share: (rank, ranks) of a bank that is spread over ranks.

    Attributes:
        refused: 0-dim int64, how many rows were refused since the last reset.
        policy: as given.
        average: as given.
        share: as given.
        store: the slots of all ranks, for code that must know more than the rows of this rank.
        weight: factor of the loss against the bank, for the code that schedules it; no part of the state.

    Raises:
        InputError: if `size` or `dim` is not positive, `dtype` is not floating, or another argument is out of range.

    Examples:
        >>> bank = MemoryBank(size=3, dim=2)
        >>> bank.enqueue(torch.eye(2), torch.tensor([4, 7]), step=0)
        >>> bank.enqueue(torch.eye(2), torch.tensor([5, 9]), step=1)
        >>> len(bank), bank.labels.tolist(), bank.steps.tolist()  # the oldest row, label 4, gave way to label 9
        (3, [9, 7, 5], [1, 0, 1])
        >>> bank = MemoryBank(size=3, dim=2, policy="samples", average=0.5)
        >>> bank.enqueue(torch.eye(2), torch.tensor([4, 7]), indices=torch.tensor([2, 0]))
        >>> bank.labels.tolist()
        [7, -1, 4]
    """

    def __init__(
        self,
        size: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        policy: str = "queue",
        average: float = 0.0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        check_count("memory size", size)
        check_count("memory dim", dim, hint="it is the number of columns of an embedding")
        if not dtype.is_floating_point:
            raise InputError(f"memory dtype must be floating, such as torch.float32, got {dtype}")
        check_policy(policy, average)
        if not 0 <= share[0] < share[1]:
            raise InputError(f"memory share must be (rank, ranks) with 0 <= rank < ranks, got {tuple(share)}")
        self.policy, self.average, self.share = policy, average, (share[0], share[1])
        self.weight = 1.0
        self.store = SlotStore(size, dim, dtype, device, self.share)
        self.refused = torch.zeros((), dtype=torch.int64, device=device)
        self._trusted = False  # on an accelerator, once the first indices were looked at

    @property
    def size(self) -> int:
        """Number of slots, over all ranks."""
        return self.store.size

    @property
    def dim(self) -> int:
        """Number of columns of an embedding."""
        return self.store.embeddings.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored embeddings."""
        return self.store.embeddings.dtype

    @property
    def device(self) -> torch.device:
        """Device of the stored rows."""
        return self.store.embeddings.device

    def __len__(self) -> int:
        """Number of rows that a loss takes as references, on this rank."""
        return own_count(self.store.count, *self.share)

    @property
    def embeddings(self) -> Tensor:
        """Stored embeddings, a (len, dim) view."""
        return self.store.embeddings[: len(self)]

    @property
    def labels(self) -> Tensor:
        """Labels, a (len,) int64 view; -1 in a slot that is empty or whose row was refused."""
        return self.store.own(self.store.labels)

    @property
    def indices(self) -> Tensor:
        """Sample indices, a (len,) int64 view; -1 where none was given."""
        return self.store.own(self.store.indices)

    @property
    def steps(self) -> Tensor:
        """Steps at which the rows came in, a (len,) int64 view; -1 where none was given."""
        return self.store.own(self.store.steps)

    @torch.no_grad()
    def enqueue(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices: Tensor | None = None,
        step: int | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Writes a batch: over the oldest rows, or with policy "samples" into the slots of its samples.

        Any number of rows may come, none and more than a queue holds included; of those the last `size` stay.

        Args:
            embeddings: (n, dim) float; stored detached, in the bank's dtype, on the bank's device.
            labels: (n,) integer labels; -1 for a row that is to take part in nothing, which takes a slot of a queue
                and leaves "samples" as they were.
            indices: (n,) integer sample indices; -1 or None where unknown, which "samples" do not allow.
            step: the training step that made the rows.
            mask: (n,) bool, rows that are False do not enter. A queue must know how many rows come, so there a mask
                on an accelerator makes the host wait.

        Raises:
            InputError: if a shape or a dtype does not fit; with "samples" if an index is missing or outside
                [0, size). On an accelerator only the first enqueue looks; later such rows are refused and counted.
        """
        check_batch(self.dim, embeddings, labels, indices, mask)
        labels = labels.to(self.store.labels)
        if indices is not None:
            indices = indices.to(self.store.indices)
        elif self.policy == "samples":
            raise InputError("indices must be given with policy 'samples', whose slots they are; got None")
        else:
            indices = torch.full_like(labels, UNLABELLED)
        batch = Batch(embeddings, labels, indices, step, mask)
        if self.policy == "queue":
            self.refused += write_oldest(self.store, batch)
        elif len(labels):
            if not self._trusted:
                check_indices(self.store, batch)
                self._trusted = self.device.type != "cpu"
            self.refused += write_samples(self.store, batch, self.average)

    def reset(self) -> None:
        """Empties the bank; its `weight` stays."""
        self.store.clear()
        self.refused.zero_()

    def to(self, device: torch.device | str) -> MemoryBank:
        """Moves the bank, in place, and returns it."""
        self.store.to(device)
        self.refused = self.refused.to(device)
        return self

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (divisor n) of each column over the labelled rows, those of all ranks.

        For moment adaptation (arXiv 2303.17127). With more than one rank a collective: every rank must call.

        Returns:
            Two (dim,) float32 tensors, summed in float64; zeros while no row has a label.
        """
        sums = moment_sums(self.embeddings, self.labels)
        if self.share[1] > 1:
            bank_state.check_ranks(self.share)
            sums = distributed.all_reduce_sum(sums)
        return moments_of(sums)

    @torch.no_grad()
    def transform(self, scale: Tensor, shift: Tensor) -> None:
        """Maps every labelled row to normalise(row * scale + shift), in place, a few MiB at a time.

        A row that would lose its direction stays as it was. The rows of this rank are mapped; no collective.

        Args:
            scale: (dim,) float, or 0-dim.
            shift: (dim,) float, or 0-dim.

        Raises:
            InputError: if a shape does not fit.
        """
        for name, value in (("scale", scale), ("shift", shift)):
            if value.shape not in ((), (self.dim,)):
                raise InputError(f"{name} must have shape ({self.dim},) or (), got {tuple(value.shape)}")
        transform_rows(self.embeddings, self.labels, scale, shift)

    def summary(self, step: int | None = None) -> dict[str, float]:
        """Counts and ages of the rows, over all ranks, for inspection: the host waits for an accelerator.

        Args:
            step: the present training step, for the ages.

        Returns:
            `filled`, the share of slots with a labelled row; `rows`, their number; `classes` and `samples`, their
            distinct labels and known sample indices; `refused`; `age_mean` and `age_max`, in steps, where `step` is
            given and the step of some row is known.
        """
        slots = slice(self.size)
        store = self.store
        figures = summarise(store.labels[slots], store.indices[slots], store.steps[slots], step)
        return {**figures, "refused": float(self.refused)}

    def state_dict(self) -> dict[str, Any]:
        """The bank as tensors, numbers and strings that `torch.load(weights_only=True)` reads.

        A state without "policy" is that of a queue, as all states were once. The bank's `weight` is not part of it.

        With one rank this is no collective, and a signal handler may call it. A bank that is spread over ranks
        gathers its embeddings in the order of their slots on the CPU of rank 0, the other ranks get none: every rank
        must call, at the same point between two enqueues, such as a checkpoint callback's hook, and none from a
        signal handler, which the ranks reach at different points.

        Raises:
            InputError: if the bank is spread over ranks and this process is not the rank of its share.
        """
        rank, ranks = self.share
        if ranks == 1:
            embeddings = self.embeddings.clone()
        else:
            bank_state.check_ranks(self.share)
            embeddings = bank_state.gather_shares(self.embeddings, self.store.count, rank, ranks)
        state: dict[str, Any] = {
            "size": self.size,
            "dim": self.dim,
            "pointer": self.store.pointer,
            # Clones: saving a view would save its whole storage, and the bank may change before it is written.
            "embeddings": embeddings,
            **{name: column.clone() for name, column in zip(COLUMNS, self.store.columns, strict=True)},
            "refused": self.refused.clone(),
        }
        return state | ({"policy": self.policy, "average": self.average} if self.policy == "samples" else {})

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the rows of a saved bank, converted to this bank's dtype and device; no collective.

        The bank keeps its own size, policy and share. A queue takes the newest rows that fit, in their order; from
        "samples" the labelled rows in the order of their steps, as if enqueued. "samples" take rows by their index,
        the newest of each; rows without an index, or with one beyond the size, are left out. A share takes the rows of
        its own slots.

        Raises:
            InputError: if the saved bank has another dimension, or is not whole.
        """
        bank_state.check_state(state, self.dim)
        place = bank_state.place(state, self.size, self.policy)
        self.reset()
        self.store.take_over(place.slots, place.rows, state)
        self.refused.copy_(state["refused"])
        self.store.pointer, self.store.count = place.pointer, place.used

    @classmethod
    def from_state_dict(
        cls, state: dict[str, Any], device: torch.device | str | None = None, share: tuple[int, int] = (0, 1)
    ) -> MemoryBank:
        """A bank of the size, dtype, policy and average of a saved one, with its rows.

        Args:
            state: what `state_dict` returned.
            device: where the bank is to live.
            share: (rank, ranks) of a bank that is to be spread over ranks.

        Raises:
            InputError: if `state` is not that of a whole bank.
        """
        bank_state.check_state(state)
        policy, average = state.get("policy", "queue"), state.get("average", 0.0)
        bank = cls(state["size"], state["dim"], state["embeddings"].dtype, device, policy, average, share)
        bank.load_state_dict(state)
        return bank

    def save(self, path: str | Path) -> None:
        """Writes the bank to a file, whole or not at all: an older file stays until the new one is complete.

        A bank that is spread over ranks is written by rank 0, and every rank must call, as for `state_dict`.

        Raises:
            UnwritableFile: an InputError and an OSError; if the file cannot be written.
        """
        state = self.state_dict()
        if self.share[0] == 0:
            bank_state.write_file(Path(path), state)

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device | str | None = None, share: tuple[int, int] = (0, 1)
    ) -> MemoryBank:
        """The bank that `save` wrote, on `device`; with `share`, the part of one rank.

        Raises:
            InputError: if there is no such file, or it is not a bank's, is damaged, or is of another version.
        """
        return cls.from_state_dict(bank_state.read_file(Path(path)), device, share)

    def __repr__(self) -> str:
        return f"MemoryBank(size={self.size}, dim={self.dim}, rows={len(self)}, dtype={self.dtype})"
