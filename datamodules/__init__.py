"""Data modules for retrieval, and the samplers and loaders that they are made of."""

from lightning_dml.datamodules.base import RetrievalDataModule
from lightning_dml.datamodules.folder import FolderDataModule
from lightning_dml.datamodules.glyphs import GlyphsDataModule
from lightning_dml.datamodules.loading import ResumableLoader
from lightning_dml.datamodules.samplers import PKBatchSampler, UnpaddedDistributedSampler

__all__ = [
    "FolderDataModule",
    "GlyphsDataModule",
    "PKBatchSampler",
    "ResumableLoader",
    "RetrievalDataModule",
    "UnpaddedDistributedSampler",
]
