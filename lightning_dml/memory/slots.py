"""Rows and slots of a bank: which rows may come, which slots are a rank's own, which row wins a slot."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_dml.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that a bank may keep its embeddings in, by the names that configs use."""

BLOCK_BYTES = 4 * 2**20
"""Work on a whole bank goes by blocks of at most this size, so that no second copy of it is made."""

MIN_NORM = 1e-6
"""Below this length a row has no direction that rounding did not make."""


def own_count(count: int, rank: int, ranks: int) -> int:
    """How many of the first `count` slots live on `rank`, where slot s lives on rank s % ranks."""
    return len(range(rank, count, ranks))


def segments(start: int, count: int, size: int) -> list[tuple[slice, int]]:
    """Where `count` <= `size` rows go in a ring of `size` slots: (rows, first slot), in two parts at the wrap."""
    before_end = min(count, size - start)
    parts = [(slice(0, before_end), start), (slice(before_end, count), 0)]
    return [(rows, slot) for rows, slot in parts if rows.stop > rows.start]


def last_of_each(slots: Tensor) -> Tensor:
    """(n,) bool: whether a row is the last of those with its slot; `slots` is (n,) int64.

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


def check_batch(
    dim: int,
    embeddings: Tensor,
    labels: Tensor,
    indices: Tensor | None,
    mask: Tensor | None,
    names: tuple[str, str, str] = ("labels", "indices", "mask"),
) -> None:
    """Raises `InputError` unless the columns of a batch have the right kinds and one entry per embedding (n, dim).

    `names` are those that the caller knows labels, indices and mask by.
    """
    if embeddings.ndim != 2 or embeddings.shape[1] != dim or not embeddings.is_floating_point():
        raise InputError(
            f"embeddings must be a float tensor of shape (n, {dim}), got {embeddings.dtype} {tuple(embeddings.shape)}"
        )
    for name, column in zip(names, (labels, indices, mask), strict=True):
        if column is None:
            continue
        if not isinstance(column, Tensor):
            raise InputError(f"{name} must be a tensor of shape ({len(embeddings)},), got {type(column).__name__}")
        if name == names[2] and column.dtype != torch.bool:
            raise InputError(f"{name} must be bool, got {column.dtype}; convert with .bool()")
        if name != names[2] and (column.is_floating_point() or column.is_complex() or column.dtype == torch.bool):
            raise InputError(f"{name} must be integers, got {column.dtype}; convert with .long()")
        if column.shape != embeddings.shape[:1]:
            raise InputError(
                f"{name} must have one entry per embedding, shape ({len(embeddings)},), got {tuple(column.shape)}"
            )
