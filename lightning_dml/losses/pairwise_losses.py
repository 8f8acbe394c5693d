"""Named losses that weigh each pair by its own similarity or distance: contrastive and margin."""

from __future__ import annotations

from lightning_dml.errors import InputError
from lightning_dml.losses.base import LossOptions, PairWeightingLoss, Unpack
from lightning_dml.losses.measure import Measure, check_measure
from lightning_dml.losses.weighting.contrastive import ContrastiveWeighting
from lightning_dml.losses.weighting.distance import DistanceContrastiveWeighting, HadsellWeighting, MarginWeighting


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
        measure: `similarity`, `distance` or `squared_distance`. Hadsell, Chopra and LeCun (2006) have the squared
            form: set `squared_distance` for it.
        **options: `miner`, `reduction`, `gather`, `block_bytes` and `validate`, by name; see `PairWeightingLoss`.
            XBM divides by the anchors.

    Raises:
        InputError: for a margin out of range, an unknown measure, or a positive margin on squared distances, which
            have none.
    """

    def __init__(
        self,
        margin: float | None = None,
        pos_margin: float | None = None,
        *,
        measure: Measure = "similarity",
        **options: Unpack[LossOptions],
    ) -> None:
        check_measure(measure)
        weighting: ContrastiveWeighting | DistanceContrastiveWeighting | HadsellWeighting
        if measure == "similarity":
            weighting = ContrastiveWeighting(0.5 if margin is None else margin, pos_margin)
        elif measure == "distance":
            weighting = DistanceContrastiveWeighting(1.0 if margin is None else margin, pos_margin or 0.0)
        else:
            if pos_margin is not None:
                raise InputError(f"pos_margin is no part of the squared form, got {pos_margin}; use measure='distance'")
            weighting = HadsellWeighting(1.0 if margin is None else margin)
        super().__init__(weighting, **options)


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
        **options: `miner`, `reduction`, `gather`, `block_bytes` and `validate`, by name; see `PairWeightingLoss`.

    Raises:
        InputError: for a negative margin, or a boundary that is not positive.
    """

    def __init__(
        self,
        margin: float = 0.2,
        beta: float = 1.2,
        *,
        learn_beta: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(MarginWeighting(margin, beta, learn_beta=learn_beta), **options)
