"""Losses against references that are spread over the ranks: each rank works on its share, for the anchors of all.

The references are the large side, so they stay where they are and the anchors travel. Where a pair's weight depends on
its own similarity alone, each rank runs the engine with the anchors of all ranks and its share, and sends every rank
the partial gradients of its anchors. Other losses need whole rows: the ranks put the similarities of a few anchors
at a time together, and the weights go back the way the similarities came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dml import distributed
from lightning_dml.errors import InputError
from lightning_dml.losses.engine import PairSums, PairTask, SweepResult, pair_sums, sweep_blocks
from lightning_dml.losses.labels import PairLabels


def sharded_pair_sums(anchors: Tensor, references: Tensor, task: PairTask) -> PairSums:
    """Runs a task on this rank's anchors and the references of all ranks; every rank must call it.

    Gradients are computed in the forward pass with all the collectives there are, and the backward pass only scales
    them. Those of learnable parameters are of this rank's part of the work: their sum over the ranks is the gradient.

    Args:
        anchors: (N, D) rows of this rank; N may differ between ranks and may be 0.
        references: (m, D), row s of the whole set being row s // ranks of rank s % ranks. They get no gradient.
        task: with the labels of these anchors and references.

    Returns:
        Sums over this rank's anchors.

    Raises:
        InputError: on every rank, if the shares are not round robin or the ranks' calls do not fit together.
    """
    return pair_sums(anchors, references.detach(), task, _sweep)


def bytes_sent(
    anchors: int,
    references: int,
    dim: int,
    ranks: int,
    *,
    separable: bool,
    counting: bool = False,
    indexed: bool = True,
    gradient: bool = True,
    itemsize: int = 4,
) -> int:
    r"""Bytes that a rank sends to the others in one call of a loss with `ref_sharded=True`.

    With N anchors per rank, M references, W ranks and b bytes a number, a separable loss sends, whatever M is,

    .. math:: (W - 1) \big(N D b + 16 N + N (D + 1) b + 48\big)

    (anchors with labels and indices out, gradients and row losses back, six numbers to agree upon), and 8 N more where
    pairs are counted. Any other loss sends

    .. math:: (W - 1) \big(N D b + 16 m + 2 N m b + N D b + 48\big), \quad m = \lceil M / W \rceil

    of which the similarities out and the weights back, 2 N m b, are the most. To gather the references themselves would
    send :math:`(W - 1) m D b`: less from N = D / 2 on, but then each rank must hold them all. A gather is counted as
    each rank sending its part to each other; the two sums that any loss takes over the ranks are left out.

    Args:
        anchors: rows of the rank with the most.
        references: rows of the whole set.
        dim: number of dimensions D of the embeddings.
        ranks: number of ranks W; with one, nothing is sent.
        separable: whether the loss's weighting and miner are both separable.
        counting: whether the reduction is over active anchors or pairs.
        indexed: whether both sides have sample indices.
        gradient: whether anchors of any rank want a gradient.
        itemsize: bytes b of a number in the dtype of the mathematics, 4 for float32.

    Examples:
        >>> bytes_sent(64, 1_000_000, 128, ranks=8, separable=True)
        468048
        >>> bytes_sent(64, 1_000_000, 128, ranks=8, separable=False)
        462459088
    """
    share = -(-references // ranks)
    keys = 16 if indexed else 8
    back = dim if gradient else 0
    if separable:
        sent = anchors * ((dim + back + 1) * itemsize + keys + (8 if counting else 0))
    else:
        ways = 2 if gradient else 1
        sent = anchors * (dim + back + ways * share) * itemsize + share * keys
    return (ranks - 1) * (sent + 8 * len(_Call._fields))


class _Call(NamedTuple):
    """Sizes and wishes of a call, as one rank tells them to the others."""

    anchors: int
    references: int
    dim: int
    itemsize: int
    indexed: int
    gradient: int


class _Layout(NamedTuple):
    """Layout of the call over the ranks, which all know after the first exchange.

    Attributes:
        anchors: how many each rank has, in rank order.
        references: how many each rank has.
        gradient: whether anchors of any rank want a gradient; then all take part in it.
    """

    anchors: list[int]
    references: list[int]
    gradient: bool

    @classmethod
    def of(cls, left: Tensor, right: Tensor, labels: PairLabels, wants_gradient: bool) -> _Layout:
        """Exchanges the calls, and raises on every rank where they do not fit, as some would wait for others."""
        indexed = labels.anchor_indices is not None and labels.ref_indices is not None
        call = _Call(len(left), len(right), right.shape[1], left.element_size(), indexed, wants_gradient)
        calls = [_Call(*numbers) for numbers in distributed.gather_numbers(call, left.device)]
        same = [(call.dim, call.itemsize, call.indexed) for call in calls]
        if len(set(same)) > 1:
            raise InputError(
                "embeddings, ref_emb and the two indices must have the same dimension, dtype and presence on every "
                f"rank, got (dimension, bytes per number, indexed) {same} in rank order"
            )
        references = [call.references for call in calls]
        if references != [len(range(rank, sum(references), len(calls))) for rank in range(len(calls))]:
            raise InputError(
                "ref_emb must hold this rank's share of a set that is spread round robin, row s on rank s % ranks, "
                f"so that lengths differ by one at most and the first ranks have more; got {references} in rank order"
            )
        return cls([call.anchors for call in calls], references, any(call.gradient for call in calls))


def _sweep(
    left: Tensor,
    right: Tensor,
    task: PairTask,
    parameters: Sequence[Tensor],
    wants_anchors: bool,
    wants_references: bool,
) -> SweepResult:
    """Anchors (N, D) of this rank against the references of all, of which `right` (m, D) is the share."""
    layout = _Layout.of(left, right, task.labels, wants_anchors)
    return (_sweep_shares if task.separable else _sweep_rows)(left, right, task, parameters, layout)


def _sweep_shares(
    left: Tensor, right: Tensor, task: PairTask, parameters: Sequence[Tensor], layout: _Layout
) -> SweepResult:
    """The engine on all anchors and this share; the sums of each row then go to the rank that owns it."""
    own = task.labels
    everyone = distributed.gather_rows(left, layout.anchors)
    labels = distributed.gather_rows(own.anchors.long(), layout.anchors)
    indices = None
    if own.anchor_indices is not None and own.ref_indices is not None:
        indices = distributed.gather_rows(own.anchor_indices.long(), layout.anchors)
    pairs = PairLabels(labels, own.references, indices, own.ref_indices)
    partial = sweep_blocks(everyone, right, task._replace(labels=pairs), parameters, layout.gradient, False)

    columns = [partial.losses[:, None]]
    if partial.grad_anchors is not None:
        columns.append(partial.grad_anchors)
    sums = distributed.reduce_rows(torch.cat(columns, dim=1), layout.anchors)
    counts = torch.zeros(len(left), dtype=torch.int64, device=left.device)
    if task.counting:  # not beside the gradient: a float32 holds no whole number beyond 2^24
        counts = distributed.reduce_rows(partial.counts, layout.anchors)
    return SweepResult(sums[:, 0], counts, sums[:, 1:] if layout.gradient else None, None, partial.grad_parameters)


def _sweep_rows(
    left: Tensor, right: Tensor, task: PairTask, parameters: Sequence[Tensor], layout: _Layout
) -> SweepResult:
    """A few anchors of each rank at a time, against all references: whole rows, in the order of the whole set."""
    task, right = task._replace(labels=_pairs_of_whole_rows(task.labels, layout.references)), right.to(left.dtype)
    ranks, longest, total = len(layout.references), max(layout.references), sum(layout.references)
    everyone = distributed.gather_padded(left, max(layout.anchors))
    # The same on every rank, so that all take part in equally many exchanges.
    height = max(1, min(everyone.shape[1], task.block_bytes // (left.element_size() * max(1, total))))
    outgoing, incoming = left.new_empty(2, ranks * height * longest)
    table = left.new_empty(height, total)
    gradients = torch.zeros_like(everyone)
    result = SweepResult.start(left, parameters)

    for top in range(0, everyone.shape[1], height):
        anchors = everyone[:, top : top + height]
        shape = ranks, anchors.shape[1], longest
        sent, received = (memory[: shape[0] * shape[1] * shape[2]].view(shape) for memory in (outgoing, incoming))
        torch.mm(anchors.flatten(0, 1), right.T, out=sent.flatten(0, 1)[:, : len(right)])
        distributed.exchange(sent, out=received)
        rows = slice(min(top, len(left)), min(top + height, len(left)))
        if rows.start < rows.stop:
            similarity = table[: rows.stop - rows.start]
            for rank, length in enumerate(layout.references):
                similarity[:, rank::ranks] = received[rank, : len(similarity), :length]
            weights = result.weigh(task, similarity, rows, slice(0, total), parameters)
            for rank, length in enumerate(layout.references):
                received[rank, : len(weights), :length] = weights[:, rank::ranks]
        if layout.gradient:
            # Rows beyond a rank's anchors hold leftovers here; their gradient is cut off below.
            distributed.exchange(received, out=sent)
            partial = sent.flatten(0, 1)[:, : len(right)] @ right
            gradients[:, top : top + height] = partial.view(anchors.shape)
    if not layout.gradient:
        return result
    return result._replace(grad_anchors=distributed.exchange(gradients).sum(dim=0)[: len(left)])


def _pairs_of_whole_rows(own: PairLabels, counts: list[int]) -> PairLabels:
    """This rank's anchors against all references: labels and indices of 8 bytes each are the least of a reference."""
    labels = distributed.gather_round_robin(own.references.long(), counts)
    if own.anchor_indices is None or own.ref_indices is None:
        return PairLabels(own.anchors, labels)
    return PairLabels(
        own.anchors, labels, own.anchor_indices, distributed.gather_round_robin(own.ref_indices.long(), counts)
    )
