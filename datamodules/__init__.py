"""Data modules for retrieval, and the samplers and loaders that they are made of."""

from lightning_dml.datamodules.base import RetrievalDataModule
from lightning_dml.datamodules.cars import Cars196DataModule
from lightning_dml.datamodules.cub import CUB200DataModule
from lightning_dml.datamodules.files import ImagesDataModule
from lightning_dml.datamodules.folder import FolderDataModule
from lightning_dml.datamodules.glyphs import GlyphsDataModule
from lightning_dml.datamodules.hierarchical import HierarchicalPKBatchSampler
from lightning_dml.datamodules.in_shop import InShopDataModule
from lightning_dml.datamodules.inaturalist import INaturalistDataModule
from lightning_dml.datamodules.loading import ResumableLoader
from lightning_dml.datamodules.samplers import PKBatchSampler, UnpaddedDistributedSampler
from lightning_dml.datamodules.sop import SOPDataModule
from lightning_dml.datamodules.table import TableDataModule
from lightning_dml.datamodules.vehicle_id import VehicleIDDataModule

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
