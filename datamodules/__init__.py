"""Data modules for retrieval, with their samplers and loaders."""

from lightning_dml.datamodules.base import RetrievalDataModule
from lightning_dml.datamodules.folder import FolderDataModule
from lightning_dml.datamodules.glyphs import GlyphsDataModule
from lightning_dml.datamodules.image_files import ImagesDataModule
from lightning_dml.datamodules.loading import ResumableLoader
from lightning_dml.datamodules.official.cars import Cars196DataModule
from lightning_dml.datamodules.official.cub import CUB200DataModule
from lightning_dml.datamodules.official.in_shop import InShopDataModule
from lightning_dml.datamodules.official.inaturalist import INaturalistDataModule
from lightning_dml.datamodules.official.sop import SOPDataModule
from lightning_dml.datamodules.official.vehicle_id import VehicleIDDataModule
from lightning_dml.datamodules.samplers import (
    HierarchicalPKBatchSampler,
    PKBatchSampler,
    UnpaddedDistributedSampler,
)
from lightning_dml.datamodules.table import TableDataModule

__all__ = [
    "CUB200DataModule",
    "Cars196DataModule",
    "FolderDataModule",
    "GlyphsDataModule",
    "HierarchicalPKBatchSampler",
    "INaturalistDataModule",
    "ImagesDataModule",
    "InShopDataModule",
    "PKBatchSampler",
    "ResumableLoader",
    "RetrievalDataModule",
    "SOPDataModule",
    "TableDataModule",
    "UnpaddedDistributedSampler",
    "VehicleIDDataModule",
]
