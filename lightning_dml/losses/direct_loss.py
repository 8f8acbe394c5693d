"""`DirectWeightingLoss`: weights by curves, or the pull of one loss and the push of another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from lightning_dml import distributed
from lightning_dml.errors import InputError
from lightning_dml.labels import UNLABELLED
from lightning_dml.losses.base import LossOptions, PairWeightingLoss, Unpack
from lightning_dml.losses.curves import Curve, WeightCurve
from lightning_dml.losses.engine import PairTask, row_statistics
from lightning_dml.losses.inspection.measured import MEASURED_REFERENCES, measured_weights
from lightning_dml.losses.mining import Miner
from lightning_dml.losses.weighting.direct import DirectWeighting
from lightning_dml.losses.weighting.row_weights import LossWeights, MeasuredWeights, RowWeights, check_frozen


class FromLoss(nn.Module):
    """One side of a loss, for `DirectWeightingLoss`: its pull on positives as `positive`, its push as `negative`.

    Both sides of one loss give back its gradient. Of one of our losses, the weights are those per anchor, over the
    pairs that its own miner keeps out of those that the direct loss's miner keeps; its reduction, gather and
    block_bytes do not matter, for the direct loss has its own. Memory is bounded as for any loss.

    Any other module on inner products, cosines or distances of unit rows is measured in every call (see
    `measured_weights`): its own reduction is part of its weights, which are then multiplied by the number of anchors,
    so that reduction `anchors` gives back the loss. It is measured over all
    pairs, takes N x M weights and at most 8,192 references, and must be
    called as `loss(embeddings, labels[, ref_emb=..., ref_labels=...])`. It knows no sample indices: it counts a
    sample's own copy in a memory, whose weight is then left out. On several ranks its in-batch weights are those of
    the batches together, and each rank measures its own anchors against a memory.

    Args:
        from_loss: the loss. The gradient does not reach its parameters, so it may have none that require one.

    Raises:
        InputError: for something that is no loss module.

    Examples:
        The positives of the multi-similarity loss with the negatives of the contrastive loss.

        >>> from lightning_dml.losses import ContrastiveLoss, DirectWeightingLoss, MultiSimilarityLoss
        >>> loss = DirectWeightingLoss(FromLoss(MultiSimilarityLoss()), FromLoss(ContrastiveLoss(margin=0.5)))
    """

    def __init__(self, from_loss: nn.Module) -> None:
        super().__init__()
        if not isinstance(from_loss, nn.Module) or isinstance(from_loss, FromLoss):
            raise InputError(f"from_loss must be a loss module such as MultiSimilarityLoss(), got {from_loss!r}")
        self.from_loss = from_loss

    def forward(self, similarity: Tensor) -> Tensor:
        """Refuses the call: it is no curve, as the weights of a loss may depend on the whole row."""
        raise InputError("FromLoss is a side of DirectWeightingLoss and has no weights of its own; see weight_curve")


class FromLossConfig(TypedDict):
    """`FromLoss` in short, for a config: `positive: {from_loss: {class_path: ...}}`."""

    from_loss: nn.Module


Side = Curve | FromLoss | FromLossConfig | Callable[[Tensor], Any]
"""A side of `DirectWeightingLoss`; callables come last, so that a config may name the others."""


class DirectWeightingLoss(PairWeightingLoss):
    r"""Direct weight assignment with weight curves (arXiv 2103.14003, after its abstract).

    .. math::
        F_i = \sum_{k \in N_i} \mathrm{sg}(w^-(S_{ik}))\, S_{ik} - \sum_{j \in P_i} \mathrm{sg}(w^+(S_{ij}))\, S_{ij}

    The derivative with respect to S is exactly :math:`+w^-` on negatives and :math:`-w^+` on positives, whatever the
    curves are. The value is no measure of progress, only its gradient has a meaning. The formula is this library's
    reconstruction: the paper's own could not be read.

    A side may also be taken from another loss, ours or another library's, by `FromLoss`: its weights then depend on the
    whole row, by the formula with :math:`w_{ij}` for :math:`w(S_{ij})`. In a config, {from_loss: {class_path: ...}}
    does the same. Both sides of one loss have its gradient.

    Args:
        positive: weight curve of positives, a callable from similarities to weights of the same shape; or `FromLoss`.
        negative: weight curve of negatives; or `FromLoss`.
        **options: `miner`, `reduction`, `gather`, `block_bytes` and `validate`, by name; see `PairWeightingLoss`.

    Raises:
        InputError: for a side that is neither a curve nor from a loss, or has parameters to train. A call raises it too
            where a side's loss works in-batch only, or is measured and the references are too many or sharded.

    Examples:
        >>> from lightning_dml.losses import curves
        >>> loss = DirectWeightingLoss(positive=curves.Constant(), negative=curves.Step(0.5))  # contrastive's gradient
    """

    def __init__(
        self,
        positive: Side,
        negative: Side,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(direct_weighting(positive, negative), **options)

    def prepare(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        indices: Tensor | None,
        ref_indices: Tensor | None,
        together: bool,
    ) -> tuple[Tensor, PairTask]:
        """Checks the arguments and says what the engine is to do, measured weights included; see the base."""
        references, task = super().prepare(embeddings, labels, ref_emb, ref_labels, indices, ref_indices, together)
        assert isinstance(task.weighting, DirectWeighting)
        return references, with_statistics(task, task.weighting, embeddings, references, together)

    def _check_sharded(self, ref_emb: Tensor | None) -> None:
        super()._check_sharded(ref_emb)
        assert isinstance(self.weighting, DirectWeighting)
        if distributed.is_distributed() and any(isinstance(side, MeasuredWeights) for side in self.weighting.rows()):
            raise InputError(
                "ref_sharded=True needs weights that come row by row, and those of another library's loss are measured "
                "on all references at once: hold them on every rank, or take the side from a loss of this library"
            )


def direct_weighting(positive: Side, negative: Side) -> DirectWeighting:
    """The weighting of two sides. A loss that is on both is asked once for each block.

    Raises:
        InputError: naming the side that is neither a curve nor from a loss, or that has parameters to train.
    """
    pull, push = _side_of("positive", positive), _side_of("negative", negative)
    weights = _weights("positive", pull)
    if isinstance(pull, FromLoss) and isinstance(push, FromLoss) and pull.from_loss is push.from_loss:
        return DirectWeighting(weights, weights)
    return DirectWeighting(weights, _weights("negative", push))


def with_statistics(
    task: PairTask, weighting: DirectWeighting, embeddings: Tensor, references: Tensor, together: bool
) -> PairTask:
    """The task, with what the weighting's sides need beside the rows: statistics of rows, or measured weights.

    Args:
        task: of this call.
        weighting: the task's.
        embeddings: (N, D) anchors.
        references: (M, D), in-batch those of all ranks.
        together: whether the ranks work on one batch; every rank must then call.

    Raises:
        InputError: for a loss that works in-batch only and gets references, or too many references to measure.
    """
    sides = weighting.rows()
    if not any(any(side.columns(len(references))) for side in sides):
        return task
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    own, everyone = [embeddings.new_empty(len(embeddings), 0, dtype=dtype)], [references.new_empty(len(references), 0)]
    for side in sides:
        if isinstance(side, MeasuredWeights):
            own.append(_weights_of_other(side.loss, embeddings, references, task).to(dtype))
        elif isinstance(side, LossWeights) and side.coupled:
            statistics = _row_statistics(side, embeddings, references, task)
            own.append(statistics[:, None])
            everyone.append((distributed.gather_rows(statistics) if together else statistics)[:, None])
    return task._replace(statistics=(torch.cat(own, dim=1), torch.cat(everyone, dim=1)))


class _InTurn(Miner):
    """Keeps what both miners keep, the second out of what the first leaves."""

    def __init__(self, first: Miner | None, second: Miner | None) -> None:
        super().__init__()
        self.miners = nn.ModuleList(miner for miner in (first, second) if miner is not None)

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Mines a block of rows; see `Miner.forward`."""
        for miner in self.miners:
            positive, negative = miner(similarity, positive, negative)
        return positive, negative


def _side_of(name: str, side: Side) -> FromLoss | WeightCurve:
    if isinstance(side, PairWeightingLoss):
        raise InputError(f"{name} must be a weight curve, got a loss: wrap it as FromLoss({type(side).__name__}(...))")
    if not isinstance(side, Mapping):
        return side
    if side.keys() != {"from_loss"}:
        raise InputError(f"{name} must be a weight curve or {{from_loss: a loss}}, got the keys {list(side)}")
    return FromLoss(side["from_loss"])


def _weights(name: str, side: FromLoss | WeightCurve) -> RowWeights | WeightCurve:
    if not isinstance(side, FromLoss):
        return side
    loss = side.from_loss
    check_frozen(name, loss)
    if not isinstance(loss, PairWeightingLoss):
        return MeasuredWeights(loss)
    if isinstance(loss.weighting, DirectWeighting) and any(any(inner.columns(1)) for inner in loss.weighting.rows()):
        raise InputError(
            f"{name} is from a DirectWeightingLoss whose own sides look beyond their row, got {loss.weighting}: "
            "take the side from the loss that it came from"
        )
    return LossWeights(loss.weighting, loss.miner)


def _row_statistics(side: LossWeights, embeddings: Tensor, references: Tensor, task: PairTask) -> Tensor:
    if task.labels.own_column is None:
        raise InputError(
            f"{type(side.weighting).__name__} couples the rows of anchors and positives and works in-batch only: "
            "leave ref_emb out, or take the side from a variant or loss whose anchors are independent"
        )
    mined = task._replace(weighting=side.weighting, miner=_InTurn(task.miner, side.miner))
    statistics = row_statistics(embeddings, references, mined)
    assert statistics is not None
    return statistics


def _weights_of_other(loss: nn.Module, embeddings: Tensor, references: Tensor, task: PairTask) -> Tensor:
    """Weights (N, M) of another library's loss, times the number of anchors that a reduction divides by."""
    if len(references) > MEASURED_REFERENCES:
        raise InputError(
            f"ref_emb has {len(references)} rows, and the weights of {type(loss).__name__} can be measured against at "
            f"most {MEASURED_REFERENCES}: use a smaller memory, or the loss of lightning_dml.losses in its place"
        )
    labels = task.labels
    rows, columns = ((classes != UNLABELLED).nonzero()[:, 0] for classes in (labels.anchors, labels.references))
    weights = embeddings.new_zeros(len(embeddings), len(references), dtype=torch.float64)
    if labels.own_column is None:
        if len(rows) and len(columns):
            measured = measured_weights(
                loss, embeddings[rows], labels.anchors[rows], references[columns], labels.references[columns]
            )
            weights[rows[:, None], columns] = measured * len(embeddings)
        return weights
    whole = weights.new_zeros(len(references), len(references))
    if len(columns):
        measured = measured_weights(loss, references[columns], labels.references[columns])
        whole[columns[:, None], columns] = measured * len(references)
    return whole[labels.own_column : labels.own_column + len(embeddings)]
