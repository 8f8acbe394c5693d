"""Collectives over rows: gathers in rank order, with or without gradient, exchanges, and work shared among ranks.

Every function is the identity when no process group is up, so callers need no branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Result = TypeVar("Result")


def is_distributed() -> bool:
    """True while a process group of more than one rank is up."""
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
    """The row counts of all ranks, in rank order; `count` is this rank's."""
    return [rows for (rows,) in gather_numbers([count], device)]


def gather_numbers(numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """The whole numbers of each rank, in rank order; every rank must have equally many."""
    if not is_distributed():
        return [[int(number) for number in numbers]]
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    of_all_ranks: list[list[int]] = torch.stack(parts).tolist()
    return of_all_ranks


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
    parts = gather_padded(tensor, max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_padded(tensor: Tensor, most: int) -> Tensor:
    """Rows of each rank, filled up with zeros to equal length, without gradient.

    Args:
        tensor: (n, ...) with at most `most` rows; see `gather_rows`.
        most: the length that every rank's rows are filled up to, the same on every rank.

    Returns:
        (ranks, most, ...) on the device of `tensor`, the same on every rank.
    """
    padded = tensor.new_zeros((most, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor.detach()
    parts = tensor.new_empty((world_size(), *padded.shape))
    if not is_distributed():
        parts[0] = padded
    elif parts.numel():
        dist.all_gather(list(parts.unbind()), padded)
    return parts


def gather_round_robin(share: Tensor, counts: list[int]) -> Tensor:
    """Rows of a set that is spread over the ranks round robin, in the order of the set, without gradient.

    Args:
        share: (m, ...) rows of this rank: those whose number in the set is its rank modulo the ranks, in order.
        counts: how many rows each rank has, in rank order.

    Returns:
        (sum of m, ...) on the device of `share`, the same on every rank.
    """
    parts = gather_padded(share, max(counts))
    # A rank that has a row less lacks the last place, behind which the cut then falls.
    return parts.transpose(0, 1).flatten(0, 1)[: sum(counts)]


def exchange(blocks: Tensor, out: Tensor | None = None) -> Tensor:
    """Sends a block to each rank and returns the blocks that the ranks sent to this one, without gradient.

    `all_to_all_single` with equal splits: both gloo and NCCL have it in every torch from 2.6 on, while gloo's
    reduce-scatter is newer and a loop of whole sums.

    Args:
        blocks: (ranks, ...) contiguous; the r-th goes to rank r. The shape and dtype must be the same on every rank.
        out: contiguous memory of that shape for the result, apart from `blocks`; None allocates it.

    Returns:
        (ranks, ...); the r-th is from rank r.
    """
    if out is None:
        out = torch.empty_like(blocks)
    if not is_distributed():
        out.copy_(blocks.detach())
    elif blocks.numel():
        dist.all_to_all_single(out, blocks.detach())
    return out


def reduce_rows(tensor: Tensor, counts: list[int]) -> Tensor:
    """Sum over the ranks of the rows that are this rank's: the way back of `gather_rows`, without gradient.

    Args:
        tensor: (sum of counts, ...) in rank order, what this rank adds to every rank's rows.
        counts: how many rows are each rank's, in rank order.

    Returns:
        (counts[rank], ...) on the device of `tensor`.
    """
    padded = tensor.new_zeros((len(counts), max(counts), *tensor.shape[1:]))
    start = 0
    for block, count in zip(padded, counts, strict=True):
        block[:count] = tensor[start : start + count].detach()
        start += count
    return exchange(padded).sum(dim=0)[: counts[rank()]]


def collective_device() -> torch.device:
    """The device on which the process group can carry tensors: with NCCL the current CUDA device, else the CPU."""
    if is_distributed() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def map_rows(count: int, function: Callable[[Tensor], tuple[Tensor, ...]], block: int) -> tuple[Tensor, ...]:
    """The results of `function` for all of `count` rows, of which every rank computes a share.

    The ranks work block by block and wait for each other after every block, so that none waits for longer than a block
    takes: a process group's time-out is for one collective, and a share may take many times as long. Where
    `function` raises on one rank, all ranks raise at the end of that block.

    Args:
        count: how many rows there are, the same on every rank.
        function: gets row numbers (m,) int64, perhaps none, and returns tensors on the CPU; where it has none to
            work on, they must still have the dtype and the trailing shape of the others.
        block: the most rows that it is given at a time.

    Returns:
        Each tensor of `function` concatenated over all blocks of all ranks, on the CPU; blocks and ranks are in the
        order of the rows, so ragged results are possible.

    Raises:
        RuntimeError: where `function` raised on another rank only.
    """
    shares = torch.arange(count).tensor_split(world_size())
    steps = max(1, -(-len(shares[0]) // block))  # the first share is the longest
    blocks = []
    for step in range(steps):
        mine = shares[rank()][step * block : (step + 1) * block]
        blocks.append(together(partial(function, mine)))
    device = collective_device()
    columns = [torch.cat(column).to(device) for column in zip(*blocks, strict=True)]
    return tuple(gather_rows(column).cpu() for column in columns)


def on_first_rank(function: Callable[[Callable[[], None]], Tensor]) -> Tensor:
    """The result of `function` on every rank; rank 0 alone runs it.

    Args:
        function: gets a callback to call every now and then, well within the time-out of the process group: the other
            ranks wait from one call to the next. Returns a tensor on the CPU.

    Raises:
        RuntimeError: on the other ranks, where `function` raised on rank 0.
    """
    if not is_distributed():
        return function(lambda: None)
    device = collective_device()
    result = torch.empty(0)
    failure: Exception | None = None

    def beat() -> None:
        dist.broadcast(torch.ones((), device=device), 0)

    if rank() == 0:
        try:
            result = function(beat)
        except Exception as error:
            failure = error
        dist.broadcast(torch.zeros((), device=device), 0)
    else:
        going_on = torch.ones((), device=device)
        while going_on:
            dist.broadcast(going_on, 0)
    _fail_together(failure)
    parts: list[Any] = [result]
    dist.broadcast_object_list(parts, 0, device=device)
    shared: Tensor = parts[0]
    return shared


def together(function: Callable[[], Result]) -> Result:
    """The result of `function`; where it raises on one rank, all ranks raise, and none is left waiting for another.

    Args:
        function: work of each rank without collectives in it.

    Raises:
        RuntimeError: where `function` raised on another rank only.
    """
    failure: Exception | None = None
    try:
        result = function()
    except Exception as error:
        failure = error
    _fail_together(failure)
    return result


def _fail_together(failure: Exception | None) -> None:
    """Raises `failure` where there is one, and an error on all ranks where any has one."""
    failed = [] if not is_distributed() else gather_numbers([failure is not None], collective_device())
    if failure is not None:
        raise failure
    if [1] in failed:
        raise RuntimeError(f"rank {failed.index([1])} failed at this point; its own error says why")


class _GatherRowsWithGrad(torch.autograd.Function):
    """Rows of all ranks; the backward pass sums the gradients that all ranks have for this rank's rows."""

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
