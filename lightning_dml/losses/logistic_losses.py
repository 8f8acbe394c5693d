"""Named losses that compare soft extremes, or each pair by a sigmoid: lifted structure, binomial deviance, circle."""

from __future__ import annotations

from typing import Literal, get_args

from lightning_dml.errors import InputError
from lightning_dml.losses.base import PairWeightingLoss, Reduction
from lightning_dml.losses.mining import Miner
from lightning_dml.losses.weighting.binomial import BinomialWeighting
from lightning_dml.losses.weighting.circle import CircleWeighting
from lightning_dml.losses.weighting.lifted import LiftedWeighting, Measure, OriginalLiftedWeighting

Variant = Literal["generalized", "original"]

DEFAULT_MARGINS: dict[str, float] = {"distance": 1.0, "similarity": 0.0}
"""Margin of each measure where none is given."""

DEFAULT_SHARPNESS: dict[str, tuple[float, float]] = {"distance": (1.0, 1.0), "similarity": (2.0, 40.0)}
"""alpha and beta of each measure where none are given."""


class LiftedStructureLoss(PairWeightingLoss):
    r"""Lifted structure loss, generalized (arXiv 1703.07737) or original.

    With :math:`u = d = \sqrt{2 - 2S}`, or :math:`u = -S`, the generalized loss of an anchor is

    .. math::
        L_i = \Big[\frac1\alpha \log \sum_{j \in P_i} e^{\alpha u_{ij}}
            + \frac1\beta \log \sum_{k \in N_i} e^{-\beta u_{ik}} + M\Big]_+

    Its weights, while the hinge is open, are :math:`\mathrm{softmax}_P(\alpha u)` and
    :math:`\mathrm{softmax}_N(-\beta u)`, for distances times :math:`1 / d` (0 nearer than 2e-3, where d is clamped). A
    threshold from which both sides are measured would cancel, so there is none. An anchor without positives or
    without negatives has no loss; pytorch-metric-learning then counts the empty side as 0.

    The original loss compares each positive pair with the negatives of both its ends, and works in-batch only:

    .. math::
        L = \frac12 \sum_{\{i, j\}} [J_{ij}]_+^2, \quad
        J_{ij} = \log\Big(\sum_{k \in N_i} e^{M - u_{ik}} + \sum_{l \in N_j} e^{M - u_{jl}}\Big) + u_{ij}

    over the unordered positive pairs. The weights are :math:`[J_{ij}]_+` on a positive pair, and on a negative ik the
    sum over the pairs ij of :math:`[J_{ij}]_+` times the share of :math:`e^{M - u_{ik}}` in the sum of J. As published
    the sum is divided by the number of positive pairs; here, as with any loss, by the reduction, so that reduction
    `anchors` gives (number of positive pairs) / (number of anchors) times that: 1.5 times for 4 samples per class.

    Args:
        variant: `generalized` or `original`.
        measure: `distance` or `similarity`.
        margin: M. None means 1 for distances, as in pytorch-metric-learning, and 0 for similarities.
        alpha: sharpness on positives, generalized only. None means 1 for distances, the published form, and 2 for
            similarities, as in Wang's Deep_Metric code (which doubles the loss and has no hinge).
        beta: sharpness on negatives, generalized only. None means 1 for distances and 40 for similarities, as there.
        miner: see `PairWeightingLoss`. For the original variant it should keep a pair in both orders or in none, as one
            that looks at a pair's own similarity does; see `OriginalLiftedWeighting`.
        reduction: see `PairWeightingLoss`.
        gather: see `PairWeightingLoss`.
        block_bytes: see `PairWeightingLoss`.

    Raises:
        InputError: for an unknown variant or measure, a sharpness that is not positive, or one for the original
            variant, which has none. The original variant called with references raises it too.
    """

    def __init__(
        self,
        variant: Variant = "generalized",
        measure: Measure = "distance",
        margin: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        miner: Miner | None = None,
        reduction: Reduction = "anchors",
        gather: bool = True,
        block_bytes: int = 16 * 2**20,
    ) -> None:
        for name, value, known in (
            ("variant", variant, get_args(Variant)),
            ("measure", measure, get_args(Measure)),
        ):
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        margin = DEFAULT_MARGINS[measure] if margin is None else margin
        weighting: LiftedWeighting | OriginalLiftedWeighting
        if variant == "original":
            for name, sharpness in (("alpha", alpha), ("beta", beta)):
                if sharpness is not None:
                    raise InputError(
                        f"{name} has no place in the original loss, got {sharpness}; leave it out or use "
                        "variant='generalized'"
                    )
            weighting = OriginalLiftedWeighting(measure, margin)
        else:
            default_alpha, default_beta = DEFAULT_SHARPNESS[measure]
            weighting = LiftedWeighting(
                measure,
                margin,
                default_alpha if alpha is None else alpha,
                default_beta if beta is None else beta,
            )
        super().__init__(weighting, miner, reduction, gather, block_bytes)


class BinomialDevianceLoss(PairWeightingLoss):
    r"""Binomial deviance loss (formula and constants of Wang's Deep_Metric code).

    .. math::
        L_i = \frac{1}{|P_i|} \sum_{j \in P_i} \log\big[1 + e^{\alpha (\lambda - S_{ij})}\big]
            + \frac{1}{|N_i|} \sum_{k \in N_i} \log\big[1 + e^{\beta (S_{ik} - \lambda)}\big]

    The weights are :math:`\frac{\alpha}{|P_i|} \sigma(\alpha (\lambda - S_{ij}))` and
    :math:`\frac{\beta}{|N_i|} \sigma(\beta (S_{ik} - \lambda))`. The means are over the pairs that the miner keeps:
    against a memory of 55,000 and without a miner, the few hard negatives weigh :math:`\beta / 55000` each, next to
    nothing (that remark is ours). An empty side has no term.

    Args:
        alpha: sharpness on positives.
        beta: sharpness on negatives.
        base: the similarity :math:`\lambda` that both sides are measured from.
        miner: see `PairWeightingLoss`; with a memory, one that keeps the hard negatives.
        reduction: see `PairWeightingLoss`.
        gather: see `PairWeightingLoss`.
        block_bytes: see `PairWeightingLoss`.

    Raises:
        InputError: for a sharpness that is not positive.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 40.0,
        base: float = 0.5,
        miner: Miner | None = None,
        reduction: Reduction = "anchors",
        gather: bool = True,
        block_bytes: int = 16 * 2**20,
    ) -> None:
        super().__init__(BinomialWeighting(alpha, beta, base), miner, reduction, gather, block_bytes)


class CircleLoss(PairWeightingLoss):
    r"""Circle loss on pairs (form of pytorch-metric-learning and of the TinyZeaMays/CircleLoss code).

    .. math::
        L_i = \log\Big[1 + \sum_{k \in N_i} e^{\gamma a_{ik} (S_{ik} - m)}
            \sum_{j \in P_i} e^{-\gamma a_{ij} (S_{ij} - 1 + m)}\Big], \quad
        a_{ik} = [S_{ik} + m]_+, \quad a_{ij} = [1 + m - S_{ij}]_+

    With Z the sigmoid of the two log-sum-exps and q the softmax within each side, the weights are
    :math:`w^-_{ik} = Z q_k \gamma a_{ik}` and :math:`w^+_{ij} = Z q_j \gamma a_{ij}` when a is held constant. An anchor
    without positives or without negatives has no loss, which is what the formula gives and what
    pytorch-metric-learning does.

    Args:
        margin: m; 0.4 for retrieval, 0.25 for faces.
        gamma: 80 for retrieval, 256 for faces.
        detach: holds a constant, as that code does. False differentiates it too: the weights are then
            :math:`Z q_k\, 2 \gamma S_{ik}` on negatives above -m, so that those with -m < S < 0 are pulled together,
            and :math:`Z q_j\, 2 \gamma (1 - S_{ij})`.
        miner: see `PairWeightingLoss`.
        reduction: see `PairWeightingLoss`.
        gather: see `PairWeightingLoss`.
        block_bytes: see `PairWeightingLoss`.

    Raises:
        InputError: for a margin outside [0, 1] or a gamma that is not positive.
    """

    def __init__(
        self,
        margin: float = 0.4,
        gamma: float = 80.0,
        detach: bool = True,
        miner: Miner | None = None,
        reduction: Reduction = "anchors",
        gather: bool = True,
        block_bytes: int = 16 * 2**20,
    ) -> None:
        super().__init__(CircleWeighting(margin, gamma, detach), miner, reduction, gather, block_bytes)
