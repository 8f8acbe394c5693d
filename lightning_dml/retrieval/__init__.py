"""Retrieval evaluation: nearest neighbours, one function per metric, and the object that collects and computes all."""

from lightning_dml.retrieval.averaging import PerClass
from lightning_dml.retrieval.clustering import adjusted_mutual_information, normalized_mutual_information
from lightning_dml.retrieval.functional import map_at_r, ndcg_at_k, precision_at_k, r_precision, recall_at_k
from lightning_dml.retrieval.index.approximate import ApproximateIndex
from lightning_dml.retrieval.knn import knn
from lightning_dml.retrieval.metrics import RetrievalMetrics
from lightning_dml.retrieval.ranks import average_precision, reciprocal_rank
from lightning_dml.retrieval.reranking.expansion import DatabaseAugmentation, QueryExpansion
from lightning_dml.retrieval.reranking.k_reciprocal import KReciprocal, k_reciprocal_nearest
from lightning_dml.retrieval.results import RetrievalResult
from lightning_dml.retrieval.ties import Ties, tie_runs

__all__ = [
    "ApproximateIndex",
    "DatabaseAugmentation",
    "KReciprocal",
    "PerClass",
    "QueryExpansion",
    "RetrievalMetrics",
    "RetrievalResult",
    "Ties",
    "adjusted_mutual_information",
    "average_precision",
    "k_reciprocal_nearest",
    "knn",
    "map_at_r",
    "ndcg_at_k",
    "normalized_mutual_information",
    "precision_at_k",
    "r_precision",
    "recall_at_k",
    "reciprocal_rank",
    "tie_runs",
]
