"""Pairs weighting: the signed weight dL/dS of each kept pair (second half of arXiv 1905.12837).

Weights are signed as derivatives are: positive on pairs that the loss pushes apart, negative on pairs that it
pulls together. Some losses change the sign within a set, so nothing here takes absolute values.
"""

from lightning_dml.losses.weighting.base import ChunkedWeighting, Weighting
from lightning_dml.losses.weighting.binomial import BinomialWeighting
from lightning_dml.losses.weighting.circle import CircleWeighting
from lightning_dml.losses.weighting.contrastive import ContrastiveWeighting
from lightning_dml.losses.weighting.direct import DirectWeighting
from lightning_dml.losses.weighting.distance import DistanceContrastiveWeighting, HadsellWeighting, MarginWeighting
from lightning_dml.losses.weighting.general import GeneralWeighting, Shape
from lightning_dml.losses.weighting.lifted import LiftedWeighting, OriginalLiftedWeighting
from lightning_dml.losses.weighting.multi_similarity import MultiSimilarityWeighting
from lightning_dml.losses.weighting.ranking import FastAPWeighting, RankedListWeighting
from lightning_dml.losses.weighting.softmax import NCAWeighting, NPairWeighting, SupConWeighting, TupletMarginWeighting
from lightning_dml.losses.weighting.triplet import SoftTripletWeighting, TripletWeighting

__all__ = [
    "BinomialWeighting",
    "ChunkedWeighting",
    "CircleWeighting",
    "ContrastiveWeighting",
    "DirectWeighting",
    "DistanceContrastiveWeighting",
    "FastAPWeighting",
    "GeneralWeighting",
    "HadsellWeighting",
    "LiftedWeighting",
    "MarginWeighting",
    "MultiSimilarityWeighting",
    "NCAWeighting",
    "NPairWeighting",
    "OriginalLiftedWeighting",
    "RankedListWeighting",
    "Shape",
    "SoftTripletWeighting",
    "SupConWeighting",
    "TripletWeighting",
    "TupletMarginWeighting",
    "Weighting",
]
