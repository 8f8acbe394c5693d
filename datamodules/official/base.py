"""The base of the data modules for official data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_dml.datamodules.image_files import ImagesDataModule


class OfficialDataModule(ImagesDataModule):
    """A data set in its authors' files, which are counted as they are read.

    Args:
        root: the folder of the set, or the one that holds it.
        check_counts: whether there must be as many images and classes as the set has; False for a part of your own.
        options: of `ImagesDataModule`.

    Raises:
        InputError: for an option out of range. From `setup`, for files that are missing or not as expected.
    """

    def __init__(self, root: str | Path, *, check_counts: bool = True, **options: Any) -> None:
        """Keeps the options; see the class."""
        super().__init__(root, **options)
        self.check_counts = check_counts
