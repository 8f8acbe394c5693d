"""Rows and slots of a bank as plain numbers: what may enter, which slots are a rank's own, which row wins a slot."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_dml.checks import check_choice, check_embeddings, check_flags, check_integers, check_number
from lightning_dml.errors import InputError

POLICIES = ("queue", "samples")
"""Policies of a bank: first in, first out, or one slot for each training sample."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that a bank may keep its embeddings in, by the names that configs use."""

BLOCK_BYTES = 4 * 2**20
"""Work on a whole bank goes by blocks of at most this size, so that no second copy of it is made."""

MIN_NORM = 1e-6
"""Below this length a row has no direction that rounding did not make."""


def own_count(count: int, rank: int, ranks: int) -> int:
    """Number of slots on `rank` among the first `count`, where slot s lives on rank s % ranks."""
    return len(range(rank, count, ranks))


def segments(start: int, count: int, size: int) -> list[tuple[slice, int]]:
    """Places of `count` <= `size` rows in a ring of `size` slots: (rows, first slot), in two parts at the wrap."""
    before_end = min(count, size - start)
    parts = [(slice(0, before_end), start), (slice(before_end, count), 0)]
    return [(rows, slot) for rows, slot in parts if rows.stop > rows.start]


def last_of_each(slots: Tensor) -> Tensor:
    """True for a row that is the last of those with its slot, (n,) bool; `slots` is (n,) int64.

    The shapes do not depend on the data, so an accelerator's host need not wait.
    """
    order = torch.argsort(slots, stable=True)
    ordered = slots[order]
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return torch.empty_like(last).scatter_(0, order, last)


def unit_rows(rows: Tensor, otherwise: Tensor) -> Tensor:
    """Rows (n, dim) at unit length; where a row has no direction, the row of `otherwise`."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where((norms > MIN_NORM) & torch.isfinite(norms), rows / norms, otherwise)


def blocks(rows: int, row_bytes: int) -> Iterator[slice]:
    """Slices of at most `BLOCK_BYTES`, and of one row at least, that cover `rows` rows."""
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def check_policy(policy: str, average: float) -> None:
    """Raises InputError for a policy that there is not, or an average out of range or in a queue."""
    check_choice("memory policy", policy, POLICIES)
    check_number("memory average", average, "the share of the old embedding, such as 0.5", least=0, below=1)
    if average and policy != "samples":
        raise InputError(f"memory average {average} needs policy 'samples': a queue has no older row of a sample")


def check_batch(
    dim: int | None,
    embeddings: Tensor,
    labels: Tensor,
    indices: Tensor | None,
    mask: Tensor | None,
    names: tuple[str, str, str] = ("labels", "indices", "mask"),
) -> None:
    """Raises InputError unless the columns of a batch have the right kinds and one entry per embedding (n, dim).

    `dim` None takes any number of columns, and `names` are those that the caller knows labels, indices and mask by.
    """
    check_embeddings("embeddings", embeddings, dim)
    check_integers(names[0], labels, len(embeddings))
    if indices is not None:
        check_integers(names[1], indices, len(embeddings))
    if mask is not None:
        check_flags(names[2], mask, len(embeddings))
