"""Named pair losses, each a miner and a weighting by its usual name."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from lightning_dml import distributed
from lightning_dml.errors import InputError
from lightning_dml.losses.base import PairWeightingLoss, Reduction
from lightning_dml.losses.engine import PairTask
from lightning_dml.losses.halves import Side, direct_weighting, with_statistics
from lightning_dml.losses.mining import Miner
from lightning_dml.losses.weighting.contrastive import ContrastiveWeighting
from lightning_dml.losses.weighting.direct import DirectWeighting
from lightning_dml.losses.weighting.distance import DistanceContrastiveWeighting, HadsellWeighting
from lightning_dml.losses.weighting.halves import MeasuredWeights
from lightning_dml.losses.weighting.multi_similarity import MultiSimilarityWeighting
from lightning_dml.losses.weighting.triplet import Measure


class ContrastiveLoss(PairWeightingLoss):
    r"""Contrastive loss on similarity, as in the released code of XBM (arXiv 1912.06798), or on distance.

    On similarity

    .. math::
        L_i = \sum_{j \in P_i} (1 - S_{ij}) + \sum_{k \in N_i} [S_{ik} - \lambda]_+

    the weight is 1 on positives and 1 on negatives above the margin :math:`\lambda`: easy negatives are discarded. The
    released code sums S itself above the margin, without the offset: the value differs, the gradient is the same.
    With `pos_margin` the positive term is :math:`[m - S_{ij}]_+` instead.

    On distances :math:`d = \sqrt{2 - 2S}` it is :math:`[d_{ij} - m]_+` and :math:`[\lambda - d_{ik}]_+`
    (`DistanceContrastiveWeighting`, the form of pytorch-metric-learning), on squared distances
    :math:`\frac12 d_{ij}^2` and :math:`\frac12 [\lambda - d_{ik}]_+^2` (`HadsellWeighting`).

    Args:
        margin: similarity above which, or distance below which, a negative counts. None means 0.5 for similarity, as
            in XBM, and 1 for distances.
        pos_margin: similarity above which, or distance below which, a positive no longer counts; None pulls all, as
            XBM does.
        measure: similarity, distance or squared_distance.
        miner: see `PairWeightingLoss`.
        reduction: see `PairWeightingLoss`; XBM divides by the anchors.
        gather: see `PairWeightingLoss`.
        block_bytes: see `PairWeightingLoss`.

    Raises:
        InputError: for a margin out of range, an unknown measure, or a positive margin on squared distances, which
            have none.
    """

    def __init__(
        self,
        margin: float | None = None,
        pos_margin: float | None = None,
        measure: Measure = "similarity",
        miner: Miner | None = None,
        reduction: Reduction = "anchors",
        gather: bool = True,
        block_bytes: int = 16 * 2**20,
    ) -> None:
        weighting: ContrastiveWeighting | DistanceContrastiveWeighting | HadsellWeighting
        if measure == "similarity":
            weighting = ContrastiveWeighting(0.5 if margin is None else margin, pos_margin)
        elif measure == "distance":
            weighting = DistanceContrastiveWeighting(1.0 if margin is None else margin, pos_margin or 0.0)
        elif measure == "squared_distance":
            if pos_margin is not None:
                raise InputError(f"pos_margin is no part of the squared form, got {pos_margin}; use measure='distance'")
            weighting = HadsellWeighting(1.0 if margin is None else margin)
        else:
            raise InputError(f"measure must be one of {', '.join(get_args(Measure))}, got {measure!r}")
        super().__init__(weighting, miner, reduction, gather, block_bytes)


class MultiSimilarityLoss(PairWeightingLoss):
    r"""Multi-similarity loss (arXiv 1904.06627).

    .. math::
        L_i = \frac{1}{\alpha} \log\Big[1 + \sum_{j \in P_i} e^{-\alpha (S_{ij} - \lambda)}\Big]
            + \frac{1}{\beta} \log\Big[1 + \sum_{k \in N_i} e^{\beta (S_{ik} - \lambda)}\Big]

    The weights of each side are softmax weights with a one in the denominator; they sum to at most 1 per anchor, so a
    larger memory does not push harder. The official code has alpha 2, beta 40, base 0.5 and mines with epsilon 0.1
    (`MultiSimilarityMiner`); ports that cite the paper have beta 50 and base 1.

    Args:
        alpha: sharpness on positives.
        beta: sharpness on negatives.
        base: the similarity :math:`\lambda` that both sides are measured from.
        miner: None keeps all pairs; `MultiSimilarityMiner()` for the mining of the paper.
        reduction: see `PairWeightingLoss`; the official code divides by the anchors.
        gather: see `PairWeightingLoss`.
        block_bytes: see `PairWeightingLoss`.

    Raises:
        InputError: for a sharpness that is not positive.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        miner: Miner | None = None,
        reduction: Reduction = "anchors",
        gather: bool = True,
        block_bytes: int = 16 * 2**20,
    ) -> None:
        super().__init__(MultiSimilarityWeighting(alpha, beta, base), miner, reduction, gather, block_bytes)


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
        miner: see `PairWeightingLoss`.
        reduction: see `PairWeightingLoss`.
        gather: see `PairWeightingLoss`.
        block_bytes: see `PairWeightingLoss`.

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
        miner: Miner | None = None,
        reduction: Reduction = "anchors",
        gather: bool = True,
        block_bytes: int = 16 * 2**20,
    ) -> None:
        super().__init__(direct_weighting(positive, negative), miner, reduction, gather, block_bytes)

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
        """What the engine is to do; see `PairWeightingLoss.prepare`. The weights that must be measured are here."""
        references, task = super().prepare(embeddings, labels, ref_emb, ref_labels, indices, ref_indices, together)
        assert isinstance(task.weighting, DirectWeighting)
        return references, with_statistics(task, task.weighting, embeddings, references, together)

    def _check_sharded(self, ref_emb: Tensor | None) -> None:
        super()._check_sharded(ref_emb)
        assert isinstance(self.weighting, DirectWeighting)
        if distributed.is_distributed() and any(isinstance(each, MeasuredWeights) for each in self.weighting.rows()):
            raise InputError(
                "ref_sharded=True needs weights that come row by row, and those of another library's loss are measured "
                "on all references at once: hold them on every rank, or take the side from a loss of this library"
            )
