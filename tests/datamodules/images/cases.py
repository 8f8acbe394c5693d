"""The settings of the cache tests, and what a cached picture must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms import v2

from lightning_dml.datamodules.images.cache import ImageCache
from lightning_dml.datamodules.tables.rows import ImageTable

RESIZE = 24


def picture_of_file(
    table: ImageTable, row: int, resize: int = RESIZE, interpolation: str = "bilinear"
) -> np.ndarray[Any, Any]:
    """The picture that the loader would see without a cache, by plain PIL and torchvision."""
    with Image.open(table.path(row)) as image:
        cut = image.convert("RGB")
    if table.boxes is not None:
        cut = cut.crop(tuple(table.boxes[row].tolist()))
    return np.asarray(v2.Resize(resize, v2.InterpolationMode(interpolation))(cut))


def build(table: ImageTable, folder: Path, **options: Any) -> ImageCache:
    """A cache with the settings of most tests, whose names a test may override."""
    defaults: dict[str, Any] = {"resize": RESIZE, "interpolation": "bilinear", "progress": False}
    return ImageCache.build(table, folder, **(defaults | options))


def files(folder: Path) -> list[str]:
    """Names of the files in the folder of the caches, less the lock files."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))
