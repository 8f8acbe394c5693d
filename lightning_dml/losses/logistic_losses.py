"""Named losses of logistic functions: lifted structure, binomial deviance, circle and multi-similarity."""

from __future__ import annotations

from typing import Literal, get_args

from lightning_dml.checks import check_choice
from lightning_dml.errors import InputError
from lightning_dml.losses.base import LossOptions, PairWeightingLoss, Unpack
from lightning_dml.losses.measure import UnsquaredMeasure, check_unsquared_measure
from lightning_dml.losses.weighting.binomial import BinomialWeighting
from lightning_dml.losses.weighting.circle import CircleWeighting
from lightning_dml.losses.weighting.lifted import LiftedWeighting, OriginalLiftedWeighting
from lightning_dml.losses.weighting.multi_similarity import MultiSimilarityWeighting

Variant = Literal["generalized", "original"]

DEFAULT_MARGINS: dict[str, float] = {"distance": 1.0, "similarity": 0.0}
"""Margin of each measure where none is given."""

DEFAULT_SHARPNESS: dict[str, tuple[float, float]] = {"distance": (1.0, 1.0), "similarity": (2.0, 40.0)}
"""alpha and beta of each measure where none are given."""


class LiftedStructureLoss(PairWeightingLoss):
    r"""Lifted structure loss, generalized (arXiv 1703.07737) or original.

    With :math:`u = -S`, or :math:`u = d = \sqrt{2 - 2S}`, the generalized loss of an anchor is

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
        measure: `similarity` or `distance`. Both variants were published on distances: set `distance` for that form.
        margin: M. None means 0 for similarities, and 1 for distances, as in pytorch-metric-learning.
        alpha: sharpness on positives, generalized only. None means 2 for similarities, as in Wang's Deep_Metric code
            (which doubles the loss and has no hinge), and 1 for distances, the published form.
        beta: sharpness on negatives, generalized only. None means 40 for similarities, as there, and 1 for distances.
        **options: `miner`, `reduction`, `gather`, `block_bytes` and `validate`, by name; see `PairWeightingLoss`.
            For the original variant the miner should keep a pair in both orders or in none, as one that looks at a
            pair's own similarity does; see `OriginalLiftedWeighting`.

    Raises:
        InputError: for an unknown variant or measure, a sharpness that is not positive, or one for the original
            variant, which has none. The original variant called with references raises it too.
    """

    def __init__(
        self,
        variant: Variant = "generalized",
        *,
        measure: UnsquaredMeasure = "similarity",
        margin: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        **options: Unpack[LossOptions],
    ) -> None:
        check_choice("variant", variant, get_args(Variant))
        check_unsquared_measure(measure)
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
        super().__init__(weighting, **options)


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
        **options: `miner`, `reduction`, `gather`, `block_bytes` and `validate`, by name; see `PairWeightingLoss`.
            With a memory, take a miner that keeps the hard negatives.

    Raises:
        InputError: for a sharpness that is not positive.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 40.0,
        base: float = 0.5,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(BinomialWeighting(alpha, beta, base), **options)


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
        **options: `miner`, `reduction`, `gather`, `block_bytes` and `validate`, by name; see `PairWeightingLoss`.

    Raises:
        InputError: for a margin outside [0, 1] or a gamma that is not positive.
    """

    def __init__(
        self,
        margin: float = 0.4,
        gamma: float = 80.0,
        *,
        detach: bool = True,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(CircleWeighting(margin, gamma, detach=detach), **options)


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
        **options: `miner`, `reduction`, `gather`, `block_bytes` and `validate`, by name; see `PairWeightingLoss`.
            `miner=MultiSimilarityMiner()` is the mining of the paper, None keeps all pairs. The official code divides
            by the anchors.

    Raises:
        InputError: for a sharpness that is not positive.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(MultiSimilarityWeighting(alpha, beta, base), **options)
