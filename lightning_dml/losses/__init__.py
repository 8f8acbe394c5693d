"""Pair-weighting losses: samples mining x pairs weighting, in one engine."""

from lightning_dml.losses import curves, mining, weighting
from lightning_dml.losses.base import PairWeightingLoss
from lightning_dml.losses.mining import MultiSimilarityMiner
from lightning_dml.losses.named import ContrastiveLoss, DirectWeightingLoss, MultiSimilarityLoss

__all__ = [
    "ContrastiveLoss",
    "DirectWeightingLoss",
    "MultiSimilarityLoss",
    "MultiSimilarityMiner",
    "PairWeightingLoss",
    "curves",
    "mining",
    "weighting",
]
