"""Data sets of image files, which are opened when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_dml.datamodules.arrays import IntArray
from lightning_dml.datamodules.images.datasets import LabelledImages, Sample
from lightning_dml.datamodules.images.opening import open_row
from lightning_dml.datamodules.tables.rows import ImageTable

_COLUMNS = {"is_query": "is_query", "is_gallery": "is_gallery", "group": "groups", "super_label": "super_labels"}


class ImageFileDataset(LabelledImages):
    """Rows of image files, opened in RGB when they are asked for.

    A sample has besides `image`, `label` and `index` what the table knows: `is_query` and `is_gallery` (bool),
    `group` and `super_label` (int).

    Args:
        table: where the images lie, and their labels.
        transform: makes the float image (3, H, W) of a PIL image, which is cropped to the row's box.
        cache: pictures of the table that `table.rows` counts in, scaled already; None opens the files.

    Raises:
        InputError: on access, if a file cannot be read; it names the file and the row.
    """

    def __init__(
        self, table: ImageTable, transform: Callable[[Any], Tensor], cache: Sequence[Image.Image] | None = None
    ) -> None:
        """Keeps the rows; see the class."""
        super().__init__(table.labels, transform)
        self.table = table
        self.cache = cache
        # Names only: the columns themselves go to the workers with the table.
        self._columns = {key: name for key, name in _COLUMNS.items() if getattr(table, name) is not None}

    def __getitem__(self, index: int) -> Sample:
        """The sample of a row; see the class."""
        sample = super().__getitem__(index)
        for key, name in self._columns.items():
            sample[key] = getattr(self.table, name)[index].item()  # type: ignore[literal-required]
        return sample

    @property
    def super_labels(self) -> IntArray | None:
        """Coarser classes, (N,); None where the table has none."""
        return self.table.super_labels

    def load(self, index: int) -> Image.Image:
        """The image in RGB, cropped to its box; scaled, where there is a cache."""
        if self.cache is not None:
            return self.cache[int(index if self.table.rows is None else self.table.rows[index])]
        return self._open(index)

    def picture(self, index: int) -> NDArray[np.uint8]:
        """The image from its file, cropped to its box, uint8 (H, W, 3)."""
        return np.asarray(self._open(index), dtype=np.uint8)

    def _open(self, index: int) -> Image.Image:
        return open_row(self.table, int(index))
