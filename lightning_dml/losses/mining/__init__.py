"""Samples mining: which of the pairs are informative (first half of arXiv 1905.12837)."""

from lightning_dml.losses.mining.base import Miner
from lightning_dml.losses.mining.hardest import BatchHardMiner, TopKMiner
from lightning_dml.losses.mining.relative import MultiSimilarityMiner, TripletViolationMiner
from lightning_dml.losses.mining.sampled import DistanceWeightedMiner, SampledMiner, SemiHardMiner
from lightning_dml.losses.mining.thresholds import AllPairs, RankedListMiner, ThresholdMiner

__all__ = [
    "AllPairs",
    "BatchHardMiner",
    "DistanceWeightedMiner",
    "Miner",
    "MultiSimilarityMiner",
    "RankedListMiner",
    "SampledMiner",
    "SemiHardMiner",
    "ThresholdMiner",
    "TopKMiner",
    "TripletViolationMiner",
]
