"""Pair-weighting losses: samples mining x pairs weighting, in one engine."""

from lightning_dml.losses import curves, mining, weighting
from lightning_dml.losses.base import PairWeightingLoss
from lightning_dml.losses.direct_loss import DirectWeightingLoss, FromLoss
from lightning_dml.losses.general_loss import GeneralPairWeightingLoss
from lightning_dml.losses.inspection.observed import ObservedWeights, observed_weights
from lightning_dml.losses.inspection.pair_weights import pair_weights
from lightning_dml.losses.inspection.weight_curves import Context, context_free, weight_curve
from lightning_dml.losses.logistic_losses import (
    BinomialDevianceLoss,
    CircleLoss,
    LiftedStructureLoss,
    MultiSimilarityLoss,
)
from lightning_dml.losses.mining import (
    AllPairs,
    BatchHardMiner,
    DistanceWeightedMiner,
    MultiSimilarityMiner,
    RankedListMiner,
    SemiHardMiner,
    ThresholdMiner,
    TopKMiner,
    TripletViolationMiner,
)
from lightning_dml.losses.pairwise_losses import ContrastiveLoss, MarginLoss
from lightning_dml.losses.ranking_losses import FastAPLoss, RankedListLoss
from lightning_dml.losses.softmax_losses import NCALoss, NPairLoss, NTXentLoss, SupConLoss, TupletMarginLoss
from lightning_dml.losses.triplet_losses import TripletLoss

__all__ = [
    "AllPairs",
    "BatchHardMiner",
    "BinomialDevianceLoss",
    "CircleLoss",
    "Context",
    "ContrastiveLoss",
    "DirectWeightingLoss",
    "DistanceWeightedMiner",
    "FastAPLoss",
    "FromLoss",
    "GeneralPairWeightingLoss",
    "LiftedStructureLoss",
    "MarginLoss",
    "MultiSimilarityLoss",
    "MultiSimilarityMiner",
    "NCALoss",
    "NPairLoss",
    "NTXentLoss",
    "ObservedWeights",
    "PairWeightingLoss",
    "RankedListLoss",
    "RankedListMiner",
    "SemiHardMiner",
    "SupConLoss",
    "ThresholdMiner",
    "TopKMiner",
    "TripletLoss",
    "TripletViolationMiner",
    "TupletMarginLoss",
    "context_free",
    "curves",
    "mining",
    "observed_weights",
    "pair_weights",
    "weight_curve",
    "weighting",
]
