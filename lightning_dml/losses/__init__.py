"""Pair-weighting losses: samples mining x pairs weighting, in one engine."""

from lightning_dml.losses import curves, mining, weighting
from lightning_dml.losses.base import PairWeightingLoss
from lightning_dml.losses.general import GeneralPairWeightingLoss
from lightning_dml.losses.halves import FromLoss
from lightning_dml.losses.inspection import pair_weights
from lightning_dml.losses.logistic_losses import BinomialDevianceLoss, CircleLoss, LiftedStructureLoss
from lightning_dml.losses.metric_losses import MarginLoss
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
from lightning_dml.losses.named import ContrastiveLoss, DirectWeightingLoss, MultiSimilarityLoss
from lightning_dml.losses.observed import ObservedWeights, observed_weights
from lightning_dml.losses.ranking_losses import FastAPLoss, RankedListLoss
from lightning_dml.losses.softmax_losses import NCALoss, NPairLoss, NTXentLoss, SupConLoss, TupletMarginLoss
from lightning_dml.losses.triplet_losses import TripletLoss
from lightning_dml.losses.weight_curves import Context, context_free, weight_curve

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
