"""`GeneralPairWeightingLoss`: any mining with any weighting, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from lightning_dml.checks import check_choice
from lightning_dml.errors import InputError
from lightning_dml.losses import mining as miners
from lightning_dml.losses.base import EngineOptions, PairWeightingLoss, Unpack
from lightning_dml.losses.measure import UnsquaredMeasure
from lightning_dml.losses.mining import Miner
from lightning_dml.losses.weighting.general import GeneralWeighting, Normalization, ShapeName, shape

MiningName = Literal[
    "none",
    "threshold",
    "multi_similarity",
    "semi_hard",
    "batch_hard",
    "top_k",
    "distance_weighted",
    "ranked_list",
    "triplet_violation",
]


class GeneralPairWeightingLoss(PairWeightingLoss):
    r"""Samples mining by name x pairs weighting by name (arXiv 1905.12837, after its abstract).

    On similarity, with detached weights over the mined sets :math:`P'_i` and :math:`N'_i`:

    .. math::
        L_i = \sum_{k \in N'_i} \mathrm{sg}(w^-_{ik})\, S_{ik} - \sum_{j \in P'_i} \mathrm{sg}(w^+_{ij})\, S_{ij}

    and on distance :math:`d = \sqrt{2 - 2S}`

    .. math::
        L_i = \sum_{j \in P'_i} \mathrm{sg}(w^+_{ij})\, d_{ij} - \sum_{k \in N'_i} \mathrm{sg}(w^-_{ik})\, d_{ik}.

    The two differ by the Jacobian :math:`dd/dS = -1/d`: the same weight on distance pulls and pushes close pairs harder
    by :math:`1/d` (in the embedding, before normalisation, by :math:`\sqrt{(1+S)/2}` in place of
    :math:`\sqrt{1-S^2}`). The value is no measure of progress, only its gradient has a meaning. The formulas
    are this library's reconstruction: the paper's own options and names could not be read.

    A weight is a function of the pair's violation :math:`v`: on similarity :math:`S - \lambda` for negatives and
    :math:`\lambda - S` for positives; on distance :math:`\lambda - d` and :math:`d - \lambda`.

    ==================  =============================================================
    name                weight
    ==================  =============================================================
    constant            1
    linear              :math:`[v]_+`
    power               :math:`[v]_+^p` with `exponent` p
    exponential         :math:`e^{bv}` with `rate` b
    sigmoid             :math:`1 / (1 + e^{-bv})`, the binomial deviance
    softmax             :math:`e^{bv} / \sum e^{bv}`, the lifted structure and N-pair losses
    softmax_with_one    :math:`e^{bv} / (1 + \sum e^{bv})`, the multi-similarity loss
    ==================  =============================================================

    Args:
        mining: none, threshold, multi_similarity, semi_hard, batch_hard, top_k, distance_weighted, ranked_list or
            triplet_violation.
        positive: name of the weighting of positives.
        negative: name of the weighting of negatives.
        normalization: of the weights of each anchor's positives and negatives: none; mean, over the mined pairs; sum,
            to one; nonzero, by the number of pairs whose weight is not zero.
        measure: `similarity` or `distance`.
        mining_args: settings of the miner, by the names of its own arguments.
        positive_args: `threshold` (1 on similarity, 0 on distance), `rate` (10), `exponent` (2).
        negative_args: `threshold` (0.5 on similarity, 1 on distance), `rate` (10), `exponent` (2).
        **options: `reduction`, `gather`, `block_bytes` and `validate`, by name; see `PairWeightingLoss`.

    Raises:
        InputError: for an unknown name, or a setting that is unknown or out of range.

    Examples:
        >>> contrastive = GeneralPairWeightingLoss("none", "constant", "constant")  # pulls and pushes every pair alike
        >>> hard = GeneralPairWeightingLoss("threshold", "constant", "exponential", mining_args={"negative_above": 0.3})
    """

    def __init__(
        self,
        mining: MiningName = "multi_similarity",
        positive: ShapeName = "constant",
        negative: ShapeName = "softmax_with_one",
        *,
        normalization: Normalization = "none",
        measure: UnsquaredMeasure = "similarity",
        mining_args: dict[str, Any] | None = None,
        positive_args: dict[str, float] | None = None,
        negative_args: dict[str, float] | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        on_similarity = measure == "similarity"
        weighting = GeneralWeighting(
            shape("positive", positive, 1.0 if on_similarity else 0.0, positive_args),
            shape("negative", negative, 0.5 if on_similarity else 1.0, negative_args),
            normalization=normalization,
            measure=measure,
        )
        super().__init__(weighting, _miner(mining, mining_args), **options)


def _miner(name: MiningName, settings: Mapping[str, Any] | None) -> Miner | None:
    classes: dict[str, Callable[..., Miner]] = {
        "none": miners.AllPairs,
        "threshold": miners.ThresholdMiner,
        "multi_similarity": miners.MultiSimilarityMiner,
        "semi_hard": miners.SemiHardMiner,
        "batch_hard": miners.BatchHardMiner,
        "top_k": miners.TopKMiner,
        "distance_weighted": miners.DistanceWeightedMiner,
        "ranked_list": miners.RankedListMiner,
        "triplet_violation": miners.TripletViolationMiner,
    }
    check_choice("mining", name, get_args(MiningName))
    try:
        return classes[name](**(settings or {}))
    except TypeError as error:
        raise InputError(f"mining_args do not fit {classes[name].__name__}: {error}") from error
