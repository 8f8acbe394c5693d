"""Named losses on the distance of unit vectors, each pair by itself."""

from __future__ import annotations

from lightning_dml.losses.base import PairWeightingLoss, Reduction
from lightning_dml.losses.mining import Miner
from lightning_dml.losses.weighting.distance import MarginWeighting


class MarginLoss(PairWeightingLoss):
    r"""Margin loss, in sum form (formula of pytorch-metric-learning's documentation).

    .. math::
        L_i = \sum_{j \in P_i} [\alpha + d_{ij} - \beta]_+ + \sum_{k \in N_i} [\alpha + \beta - d_{ik}]_+,
        \quad d = \sqrt{2 - 2 S}

    The weight is :math:`1 / d` on positives with :math:`d > \beta - \alpha` and on negatives with
    :math:`d < \beta + \alpha`; nearer than 2e-3 d is 2e-3 and has no slope. The loss is meant for
    distance-weighted sampling of negatives: `miner=DistanceWeightedMiner(dim)`. Without it all pairs count.
    pytorch-metric-learning lists triplets, so there a positive counts once for each negative of its anchor.

    Args:
        margin: half the width :math:`\alpha` of the band around the boundary; 0.2 in the code of Revisiting DML.
        beta: the boundary between positive and negative distances; 1.2 there.
        learn_beta: makes `weighting.beta` a parameter that starts at `beta`. It needs a place in the optimizer; its
            learning rate is 5e-4 in the code of Revisiting DML.
        miner: see `PairWeightingLoss`.
        reduction: see `PairWeightingLoss`.
        gather: see `PairWeightingLoss`.
        block_bytes: see `PairWeightingLoss`.

    Raises:
        InputError: for a negative margin, or a boundary that is not positive.
    """

    def __init__(
        self,
        margin: float = 0.2,
        beta: float = 1.2,
        learn_beta: bool = False,
        miner: Miner | None = None,
        reduction: Reduction = "anchors",
        gather: bool = True,
        block_bytes: int = 16 * 2**20,
    ) -> None:
        super().__init__(MarginWeighting(margin, beta, learn_beta), miner, reduction, gather, block_bytes)
