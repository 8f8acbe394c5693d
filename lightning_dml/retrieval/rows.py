"""The rows that are evaluated: gathered from all ranks, without duplicates, in an order that no rank count changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dml.distributed import gather_rows, is_distributed, world_size
from lightning_dml.errors import InputError


@dataclass(frozen=True)
class Rows:
    """Embedded items and their roles, on the CPU.

    Attributes:
        embeddings: (N, D) float32; D may be 0 when N is 0.
        labels: (N,) int64.
        indices: (N,) int64, which item each row is.
        is_query: (N,) bool.
        is_gallery: (N,) bool.
    """

    embeddings: Tensor
    labels: Tensor
    indices: Tensor
    is_query: Tensor
    is_gallery: Tensor

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.labels)

    def take(self, selection: Tensor) -> Rows:
        """The rows that `selection` names by position (int64) or mask (bool)."""
        return Rows(
            self.embeddings[selection],
            self.labels[selection],
            self.indices[selection],
            self.is_query[selection],
            self.is_gallery[selection],
        )


def gather(local: Rows, with_indices: bool) -> Rows:
    """The rows of all ranks in rank order, the same on every rank; every rank must call it.

    Args:
        local: this rank's rows, possibly none.
        with_indices: whether `local.indices` is the caller's; otherwise rows get running numbers over all ranks.

    Raises:
        InputError: on all ranks alike, when none has any rows, their dimensions differ, or only some have indices.
    """
    device = _collective_device()
    # What the ranks must agree on comes first: the rows can only be gathered, and errors only be raised by all
    # ranks together, once each knows what the others hold.
    header = torch.tensor([[len(local), local.embeddings.shape[1], int(with_indices)]], device=device)
    table = gather_rows(header, [1] * world_size()).cpu()
    dim, numbered = _agreement(table[table[:, 0] > 0])
    counts = [int(count) for count in table[:, 0]]

    embeddings = local.embeddings if len(local) else local.embeddings.new_zeros((0, dim))
    embeddings = gather_rows(embeddings.to(device), counts).cpu()
    columns = [local.labels, local.indices, local.is_query.long(), local.is_gallery.long()]
    labels, indices, is_query, is_gallery = gather_rows(torch.stack(columns, dim=1).to(device), counts).cpu().unbind(1)
    if not numbered:
        indices = torch.arange(len(labels))
    return Rows(embeddings, labels, indices, is_query.bool(), is_gallery.bool())


def in_index_order(rows: Rows) -> Rows:
    """`rows` sorted by index, each index once; of duplicates the first stays.

    A distributed sampler that pads the last batches makes such duplicates, and as perfect matches of each other
    they would raise every metric.

    Raises:
        InputError: rows with one index differ in label or role, so they are not the same item.
    """
    indices, order = rows.indices.sort(stable=True)
    rows = rows.take(order)
    repeated = torch.zeros(len(rows), dtype=torch.bool)
    repeated[1:] = indices[1:] == indices[:-1]
    if not repeated.any():
        return rows
    features = torch.stack([rows.labels, rows.is_query.long(), rows.is_gallery.long()], dim=1)
    differs = torch.zeros_like(repeated)
    differs[1:] = (features[1:] != features[:-1]).any(dim=1)
    clashes = (repeated & differs).nonzero().flatten()
    if len(clashes):
        raise InputError(
            f"indices must name one item each, but index {int(indices[clashes[0]])} came with different labels or "
            f"roles ({len(clashes)} such rows); number the items of all dataloaders in one sequence, and give an item "
            "that is both query and gallery as one row with both flags"
        )
    return rows.take(~repeated)


def to_collective_device(tensor: Tensor) -> Tensor:
    """`tensor` where the process group can carry it; call .cpu() on what was gathered."""
    return tensor.to(_collective_device())


def _agreement(seen: Tensor) -> tuple[int, bool]:
    """Dimension and whether indices were given, of a (ranks, 3) table of rows, dimension and that flag."""
    if len(seen) == 0:
        raise InputError("embeddings: RetrievalMetrics has seen none on any rank; call update() before compute()")
    dims, flags = sorted(set(seen[:, 1].tolist())), set(seen[:, 2].tolist())
    if len(dims) > 1:
        raise InputError(f"embeddings have {dims} dimensions on different ranks; embed all rows with one model")
    if len(flags) > 1:
        raise InputError("indices were given on some ranks only; give them to every update() or to none")
    return int(dims[0]), bool(flags.pop())


def _collective_device() -> torch.device:
    # NCCL carries CUDA tensors only; the device is the one that the caller (or Lightning) set for this process.
    if is_distributed() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
