"""The pair engine: any mining with any weighting over blocks of the similarity matrix, in bounded memory.

Anchors are independent of one another, so a loss needs only a few rows of the similarity matrix S = A R^T at
a time. For each block the engine computes S, mines, asks the weighting for the row losses and for dL/dS, and
multiplies dL/dS straight back into the gradients of anchors and references. Nothing of the size of S outlives
its block, whatever the loss. Where a pair's weight depends on its own similarity alone, a block need not even be
a whole row: it is then a tile that stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_dml.losses.labels import PairLabels
from lightning_dml.losses.mining import Miner
from lightning_dml.losses.weighting.base import Weighting

_CACHE_BYTES = 2**22  # a tile of this size stays in the processor's cache, and is worth the calls that it takes


class PairSums(NamedTuple):
    """Sums over this call's anchors that a loss reduces, as 0-dim tensors.

    Attributes:
        loss: sum of the row losses; carries the gradient.
        active_anchors: how many anchors have a pair with a weight other than zero.
        pairs: how many pairs have a weight other than zero.
    """

    loss: Tensor
    active_anchors: Tensor
    pairs: Tensor


class PairTask(NamedTuple):
    """Labels, mining, weighting and settings that the engine works with, beside the embeddings.

    Attributes:
        labels: decides which pairs exist.
        miner: keeps the informative pairs; None keeps all.
        weighting: row losses and their derivative with respect to S.
        block_bytes: upper limit of one block of S, in bytes; at least one row is taken.
        counting: whether to count active anchors and pairs (one more pass over each block); else both are 0.
        statistics: the weighting's row statistics of all anchors (N,) and of all references (M,), where it has some.
    """

    labels: PairLabels
    miner: Miner | None
    weighting: Weighting
    block_bytes: int
    counting: bool = False
    statistics: tuple[Tensor, Tensor] | None = None

    @property
    def separable(self) -> bool:
        """Tells whether the loss of a pair depends on its own similarity alone, so that any part of a row will do."""
        return self.weighting.separable and (self.miner is None or self.miner.separable)

    def kept_masks(self, similarity: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Masks of the kept positives and negatives of a block."""
        positive, negative = self.labels.masks(rows, columns)
        return (positive, negative) if self.miner is None else self.miner(similarity, positive, negative)


class SweepResult(NamedTuple):
    """Losses, counts and gradients that a sweep over the similarity matrix fills, block by block.

    Attributes:
        losses: (N,) row losses.
        counts: (N,) int64 pairs of each anchor with a weight other than zero; 0 where nobody counts.
        grad_anchors: (N, D) gradient of the summed losses, or None where it is not wanted.
        grad_references: (M, D) the same for the references.
        grad_parameters: the same for the learnable parameters of the weighting.
    """

    losses: Tensor
    counts: Tensor
    grad_anchors: Tensor | None
    grad_references: Tensor | None
    grad_parameters: list[Tensor]

    @classmethod
    def start(cls, anchors: Tensor, parameters: Sequence[Tensor]) -> SweepResult:
        """Zeros, without a gradient of anchors and references."""
        counts = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
        grads = [torch.zeros_like(parameter) for parameter in parameters]
        return cls(anchors.new_zeros(len(anchors)), counts, None, None, grads)

    def weigh(
        self, task: PairTask, similarity: Tensor, rows: slice, columns: slice, parameters: Sequence[Tensor]
    ) -> Tensor:
        """Weights (n, m) of a block of similarities, which it may overwrite; adds losses, counts and parameters."""
        positive, negative = task.kept_masks(similarity, rows, columns)
        if parameters:
            losses, weights, grads = task.weighting.with_parameters(similarity, positive, negative, parameters)
            for total, grad in zip(self.grad_parameters, grads, strict=True):
                total += grad
        elif task.statistics is not None:
            own, all_rows = task.statistics
            losses, weights = task.weighting(similarity, positive, negative, (own[rows], all_rows))
        else:
            losses, weights = task.weighting(similarity, positive, negative)
        self.losses[rows] += losses
        if task.counting:
            self.counts[rows] += torch.count_nonzero(weights, dim=1)
        return weights


Sweep = Callable[[Tensor, Tensor, PairTask, Sequence[Tensor], bool, bool], SweepResult]
"""Called with anchors, references, task, learnable parameters, and whether to give the gradients of the first two.

References may be of half precision where they have no gradient.
"""


def pair_sums(anchors: Tensor, references: Tensor, task: PairTask, sweep: Sweep | None = None) -> PairSums:
    """Runs a sweep (None: `sweep_blocks`) on anchors (N, D) and references (M, D), which may be the same tensor."""
    parameters = [parameter for parameter in task.weighting.parameters() if parameter.requires_grad]
    return PairSums(*_PairSums.apply(anchors, references, task, sweep or sweep_blocks, *parameters))


def sweep_blocks(
    left: Tensor,
    right: Tensor,
    task: PairTask,
    parameters: Sequence[Tensor],
    wants_anchors: bool,
    wants_references: bool,
) -> SweepResult:
    """All anchors (N, D) against all references (M, D) of this process.

    Anchors are of the dtype of the mathematics; references without gradient may be of a narrower one.
    """
    result = SweepResult.start(left, parameters)._replace(
        grad_anchors=torch.zeros_like(left) if wants_anchors else None,
        grad_references=torch.zeros_like(right) if wants_references else None,
    )
    buffer: list[Tensor] = []
    for rows, columns in _blocks(len(left), right, task, left.element_size()):
        similarity = _product(left[rows], right[columns], buffer)
        weights = result.weigh(task, similarity, rows, columns, parameters)
        if result.grad_anchors is not None:
            for part, columns_part in _parts_in_dtype(right[columns], left.dtype):
                result.grad_anchors[rows].addmm_(weights[:, part], columns_part)
        if result.grad_references is not None:
            result.grad_references[columns].addmm_(weights.T, left[rows])
    return result


@torch.no_grad()
def row_statistics(anchors: Tensor, references: Tensor, task: PairTask) -> Tensor | None:
    """The weighting's statistic of each anchor, (N,), in a sweep of its own; None if it has none."""
    if type(task.weighting).row_statistics is Weighting.row_statistics:
        return None
    left, right = _in_mathematics_dtype(anchors, references)
    parts = []
    with drawing_again(task.miner), torch.autocast(left.device.type, enabled=False):
        for rows, columns in _blocks(len(left), right, task, left.element_size(), whole_rows=True):
            similarity = left[rows] @ right.T
            part = task.weighting.row_statistics(similarity, *task.kept_masks(similarity, rows, columns))
            assert part is not None
            parts.append(part)
    return torch.cat(parts) if parts else left.new_zeros(0)


@contextmanager
def drawing_again(module: nn.Module | None) -> Iterator[None]:
    """Puts every miner in a module that draws back afterwards, so that the next sweep draws the same pairs."""
    state = {} if module is None else module.state_dict()
    try:
        yield
    finally:
        if module is not None:
            module.load_state_dict(state)


class _PairSums(torch.autograd.Function):
    """Value and gradients in one sweep over the blocks; the backward only scales what the forward kept."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, references: Tensor, task: PairTask, sweep: Sweep, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        left, right = _in_mathematics_dtype(anchors, references, narrow=not ctx.needs_input_grad[1])
        with torch.autocast(left.device.type, enabled=False):
            result = sweep(left, right, task, parameters, *ctx.needs_input_grad[:2])
        active, pairs = torch.count_nonzero(result.counts), result.counts.sum()
        # Kept as computed: in half precision a sum may overflow before the reduction has scaled it.
        ctx.gradients = result.grad_anchors, result.grad_references, None, None, *result.grad_parameters
        ctx.dtypes = anchors.dtype, references.dtype, None, None, *(parameter.dtype for parameter in parameters)
        ctx.mark_non_differentiable(active, pairs)
        return result.losses.sum(), active, pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.gradients, ctx.dtypes, strict=True)
        return tuple(None if gradient is None else (gradient * grad_loss).to(dtype) for gradient, dtype in pairs)


def _in_mathematics_dtype(anchors: Tensor, references: Tensor, narrow: bool = False) -> tuple[Tensor, Tensor]:
    """Anchors and references in the dtype of the mathematics, which is float32 at least.

    In half precision exponentials of 50 S overflow. With `narrow`, references in half precision stay so: a large bank
    is converted a part at a time, not copied whole.
    """
    dtype = torch.promote_types(torch.promote_types(anchors.dtype, references.dtype), torch.float32)
    narrow = narrow and references.dtype in (torch.float16, torch.bfloat16)
    return anchors.detach().to(dtype), references.detach() if narrow else references.detach().to(dtype)


def _product(rows: Tensor, columns: Tensor, buffer: list[Tensor]) -> Tensor:
    """Products (n, m) of rows and columns, in the memory of the last block of this size: fresh memory is slower."""
    if not buffer or buffer[0].shape != (len(rows), len(columns)):
        buffer[:] = [rows.new_empty(len(rows), len(columns))]
    if columns.dtype == rows.dtype:
        return torch.mm(rows, columns.T, out=buffer[0])
    for part, columns_part in _parts_in_dtype(columns, rows.dtype):
        buffer[0][:, part] = rows @ columns_part.T
    return buffer[0]


def _parts_in_dtype(rows: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows in `dtype`: all at once where they are in it already, else a part that stays in the cache at a time."""
    if rows.dtype == dtype:
        yield slice(0, len(rows)), rows
        return
    height = max(1, _CACHE_BYTES // max(1, rows.shape[1] * dtype.itemsize))
    for start in range(0, len(rows), height):
        part = slice(start, min(start + height, len(rows)))
        yield part, rows[part].to(dtype)


def _blocks(
    count: int, right: Tensor, task: PairTask, itemsize: int, whole_rows: bool = False
) -> Iterator[tuple[slice, slice]]:
    """Row and column ranges that cover the similarity matrix, of `itemsize` bytes an entry, row after row."""
    entries = max(1, task.block_bytes // itemsize)
    tiled = not whole_rows and task.separable
    if tiled and right.device.type == "cpu":
        entries = min(entries, _CACHE_BYTES // itemsize)
    height = max(1, min(count, 256, entries)) if tiled else max(1, entries // max(1, len(right)))
    width = max(1, entries // height) if tiled else max(1, len(right))
    for top in range(0, count, height):
        for start in range(0, max(1, len(right)), width):
            yield slice(top, min(top + height, count)), slice(start, min(start + width, len(right)))
