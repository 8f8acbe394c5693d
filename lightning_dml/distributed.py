"""Collectives over rows: gathers in rank order, with uneven row counts, with and without gradient.

Every function is the identity when no process group is up, so callers need no branches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def is_distributed() -> bool:
    """Whether a process group of more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over the ranks, as a new tensor without gradient."""
    total = tensor.detach().clone()
    if is_distributed():
        dist.all_reduce(total)
    return total


def row_counts(count: int, device: torch.device) -> list[int]:
    """How many rows each rank holds, in rank order."""
    if not is_distributed():
        return [count]
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([count], dtype=torch.int64, device=device))
    return [int(each) for each in torch.cat(counts).tolist()]


def gather_rows(tensor: Tensor, counts: list[int] | None = None) -> Tensor:
    """Rows of all ranks, stacked in rank order, without gradient.

    Args:
        tensor: (n, ...) of any dtype that the backend carries; n may differ between ranks and may be 0.
            The trailing shape and the dtype must be the same on every rank.
        counts: the row counts in rank order where the caller has them from `row_counts`; spares a collective.

    Returns:
        (sum of n, ...) on the device of `tensor`, the same on every rank.
    """
    tensor = tensor.detach()
    if not is_distributed():
        return tensor
    if counts is None:
        counts = row_counts(len(tensor), tensor.device)
    most = max(counts)
    padded = tensor.new_zeros((most, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _GatherRowsWithGrad(torch.autograd.Function):
    """Rows of all ranks; the backward sums every rank's gradient for the rows that are ours."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, counts: list[int]) -> Tensor:
        ctx.start = sum(counts[: rank()])
        ctx.length = len(tensor)
        return gather_rows(tensor, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.length], None


def gather_rows_with_grad(tensor: Tensor, counts: list[int] | None = None) -> Tensor:
    """`gather_rows` that lets gradients flow back to the rank that owns each row.

    The backward pass is a collective: every rank must run it. A row's gradient is the sum of what all ranks
    have for it, so a loss whose per-rank values are averaged by DDP (each rank: its own anchors against all
    rows, scaled by ranks / global count) has the gradient of one process with the whole batch.
    """
    if not is_distributed():
        return tensor
    if counts is None:
        counts = row_counts(len(tensor), tensor.device)
    gathered: Tensor = _GatherRowsWithGrad.apply(tensor, counts)
    return gathered
