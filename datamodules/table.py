"""A data set that a CSV or Parquet table lists."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_dml.datamodules.image_files import ImagesDataModule
from lightning_dml.datamodules.tables.reading import read_table
from lightning_dml.datamodules.tables.splits import Splits
from lightning_dml.errors import InputError


class TableDataModule(ImagesDataModule):
    """Images that a table lists, in the format of open-metric-learning (OML): `path`, `label`, `split` and more.

    A row is an image, or a box of one. `split` says `train`, `validation` or `test`; without validation rows, classes
    are held out on request, or else the test rows validate, and without test rows the validation rows test. `category`
    becomes the super-class, which `super_classes_per_batch` draws by, and `sequence` the group that
    `RetrievalMetrics(ignore=...)` passes over. Other columns are kept in `train_set.table.extra` and so on. See
    `read_table` for the columns.

    Args:
        table: `.csv`, `.tsv`, `.parquet` or `.pq`; the last two take the extra `lightning-dml[data]`.
        root: folder that relative paths start from, and that no path may leave; None means the folder of the table, and
            lets absolute paths lie anywhere.
        columns: what the file calls a column, by OML's name, such as `{label: class_id}`.
        allow_shared_classes: let a class be in training and in another split.
        options: of `ImagesDataModule`.

    Raises:
        InputError: for an option out of range. From `setup`: for what `read_table` finds wrong, a table without
            training rows where it is to train, or anything that `ImagesDataModule` checks.
    """

    def __init__(
        self,
        table: str | Path,
        root: str | Path | None = None,
        *,
        columns: Mapping[str, str] | None = None,
        allow_shared_classes: bool = False,
        **options: Any,
    ) -> None:
        """Keeps the options; see the class."""
        super().__init__(Path(table).parent if root is None else root, **options)
        if root is not None and not Path(root).is_dir():
            raise InputError(f"root {root} is not a folder: give the folder that the paths of the table start from")
        self.table = Path(table)
        self.table_root = None if root is None else Path(root)
        self.columns = columns
        self.allow_shared_classes = allow_shared_classes

    def read(self) -> Splits:
        """Reads the rows of each split; opens no image."""
        read = read_table(
            self.table, self.table_root, columns=self.columns, allow_shared_classes=self.allow_shared_classes
        )
        splits = read.by_split()
        self.super_class_names = read.super_label_names
        return Splits(read.split("train"), splits.get("test"), read.label_names, splits.get("val"))
