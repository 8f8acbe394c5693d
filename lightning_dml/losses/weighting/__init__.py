"""Pairs weighting: the signed weight dL/dS of each kept pair (second half of arXiv 1905.12837).

Weights are signed as derivatives are: positive on pairs that the loss pushes apart, negative on pairs that it
pulls together. Some losses change the sign within a set, so nothing here takes absolute values.
"""

from lightning_dml.losses.weighting.base import Weighting
from lightning_dml.losses.weighting.contrastive import ContrastiveWeighting
from lightning_dml.losses.weighting.direct import DirectWeighting
from lightning_dml.losses.weighting.multi_similarity import MultiSimilarityWeighting

__all__ = ["ContrastiveWeighting", "DirectWeighting", "MultiSimilarityWeighting", "Weighting"]
