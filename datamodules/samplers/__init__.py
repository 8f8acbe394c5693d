"""Samplers: which samples make a batch, P classes x K images planned for all ranks, and evaluation without padding."""

from lightning_dml.datamodules.samplers.class_batches import ClassBatchSampler
from lightning_dml.datamodules.samplers.evaluation import UnpaddedDistributedSampler
from lightning_dml.datamodules.samplers.hierarchical import HierarchicalPKBatchSampler
from lightning_dml.datamodules.samplers.pk import PKBatchSampler

__all__ = ["ClassBatchSampler", "HierarchicalPKBatchSampler", "PKBatchSampler", "UnpaddedDistributedSampler"]
