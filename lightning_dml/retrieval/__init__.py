"""Exact retrieval: nearest neighbours, one function per metric, and the metric that collects and computes them all."""

from lightning_dml.retrieval.functional import map_at_r, precision_at_k, r_precision, recall_at_k
from lightning_dml.retrieval.knn import knn
from lightning_dml.retrieval.metrics import RetrievalMetrics

__all__ = ["RetrievalMetrics", "knn", "map_at_r", "precision_at_k", "r_precision", "recall_at_k"]
