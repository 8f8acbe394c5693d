"""The rows that are evaluated: gathered from all ranks, without duplicates, in an order that no rank count changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dml.distributed import collective_device, gather_numbers, gather_padded, gather_rows, is_distributed
from lightning_dml.errors import InputError

# Entries of the embeddings that each rank sends at a time: 16 MiB of float32, and as much for every rank to receive.
_SENT_ENTRIES = 2**22


@dataclass(frozen=True)
class Rows:
    """Embedded items and their roles, on the CPU.

    Attributes:
        embeddings: (N, D) float32 or float16; D may be 0 when N is 0.
        labels: (N,) int64.
        indices: (N,) int64, which item each row is.
        is_query: (N,) bool.
        is_gallery: (N,) bool.
        groups: (N,) int64, the camera or sequence of each item; -1 for none.
    """

    embeddings: Tensor
    labels: Tensor
    indices: Tensor
    is_query: Tensor
    is_gallery: Tensor
    groups: Tensor

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.labels)


def gather_items(local: Rows, with_indices: bool, with_groups: bool) -> Rows:
    """The items of all ranks by ascending index, each once, the same on every rank; every rank must call it.

    A distributed sampler that pads the last batches makes duplicates, and as perfect matches of each other they would
    raise every metric: of the rows with one index the first stays, in rank order. The embeddings of a single process
    that come in order are not copied.

    Args:
        local: this rank's rows, possibly none.
        with_indices: True where `local.indices` is the caller's; otherwise rows get running numbers over all ranks.
        with_groups: True where `local.groups` is the caller's.

    Raises:
        InputError: on all ranks alike, when none has any rows, when dimensions or the use of indices or groups differ,
            or when one index came with different labels, roles or groups.
    """
    device = collective_device()
    # The header comes first, as the ranks must agree on it: rows can only be gathered, and errors only be raised by
    # all ranks together, once each knows what the others have.
    header = [len(local), local.embeddings.shape[1], int(with_indices), int(with_groups)]
    table = gather_numbers(header, device)
    dim, numbered = _agreement([line for line in table if line[0]])
    counts = [line[0] for line in table]

    columns = [local.labels, local.indices, local.is_query.long(), local.is_gallery.long(), local.groups]
    features = gather_rows(torch.stack(columns, dim=1).to(device), counts).cpu()
    if not numbered:
        features[:, 1] = torch.arange(len(features))
    first = _first_of_each(features)
    embeddings = _gather_embeddings(local.embeddings, dim, counts, first)
    labels, indices, is_query, is_gallery, groups = features[first].unbind(dim=1)
    return Rows(embeddings, labels, indices, is_query.bool(), is_gallery.bool(), groups)


def _agreement(headers: list[list[int]]) -> tuple[int, bool]:
    """Dimension of the rows, and True where they have indices, from the headers of the ranks that have rows."""
    if not headers:
        raise InputError("embeddings: RetrievalMetrics has seen none on any rank; call update() before compute()")
    dims, numbered, grouped = (sorted({line[column] for line in headers}) for column in (1, 2, 3))
    if len(dims) > 1:
        raise InputError(f"embeddings have {dims} dimensions on different ranks; embed all rows with one model")
    for name, flags in (("indices", numbered), ("groups", grouped)):
        if len(flags) > 1:
            raise InputError(f"{name} were given on some ranks only; give them to every update() or to none")
    return dims[0], bool(numbered[0])


def _first_of_each(features: Tensor) -> Tensor:
    """Positions of the first row of each index, by ascending index; (n,) int64."""
    indices, order = features[:, 1].sort(stable=True)
    repeated = torch.zeros(len(order), dtype=torch.bool)
    repeated[1:] = indices[1:] == indices[:-1]
    if not repeated.any():
        return order
    ordered = features[order]
    differs = torch.zeros_like(repeated)
    differs[1:] = (ordered[1:] != ordered[:-1]).any(dim=1)
    clashes = (repeated & differs).nonzero().flatten()
    if len(clashes):
        raise InputError(
            f"indices must name one item each, but index {int(indices[clashes[0]])} came with different labels, roles "
            f"or groups ({len(clashes)} such rows); number the items of all dataloaders in one sequence, and give an "
            "item that is both query and gallery as one row with both flags"
        )
    return order[~repeated]


def _gather_embeddings(local: Tensor, dim: int, counts: list[int], chosen: Tensor) -> Tensor:
    """Embeddings of the rows `chosen` of all ranks, each put straight into its place so that there is one copy."""
    if not is_distributed():
        in_order = len(chosen) == len(local) and torch.equal(chosen, torch.arange(len(chosen)))
        return local if in_order else local[chosen]
    destination = torch.full((sum(counts),), -1)
    destination[chosen] = torch.arange(len(chosen))
    gathered = local.new_empty((len(chosen), dim))
    local = local if len(local) else local.new_empty((0, dim))
    device = collective_device()
    starts = torch.tensor([0, *counts]).cumsum(dim=0)[:-1]
    step = max(1, _SENT_ENTRIES // dim)
    for start in range(0, max(counts), step):
        sent = local[start : start + step].to(device)
        parts = gather_padded(sent, min(step, max(counts) - start)).cpu()
        for part, count, first in zip(parts, counts, starts.tolist(), strict=True):
            rows = part[: max(0, min(step, count - start))]
            to = destination[first + start : first + start + len(rows)]
            gathered[to[to >= 0]] = rows[to >= 0]
    return gathered
