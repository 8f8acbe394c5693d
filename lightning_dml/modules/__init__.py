"""The embedder and the LightningModule that trains it."""

from lightning_dml.modules.embedder import Embedder
from lightning_dml.modules.metric_learning import MetricLearningModule

__all__ = ["Embedder", "MetricLearningModule"]
