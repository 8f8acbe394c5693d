"""Stanford Online Products: photographs of what an online market sold, half of the products train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lightning_dml.datamodules.arrays import IntArray
from lightning_dml.datamodules.downloads import STANFORD_ONLINE_PRODUCTS, obtain
from lightning_dml.datamodules.official.base import OfficialDataModule
from lightning_dml.datamodules.official.reading import Columns, Official, check_rows, number_classes, read_columns
from lightning_dml.datamodules.tables.rows import ImageTable, Texts
from lightning_dml.datamodules.tables.splits import Splits

# Images and classes: pipelines/datasets_converters/README.md of open-metric-learning; the images are also what
# tests/datasets/test_sop.py of pytorch-metric-learning counts.
TRAIN, TEST = (59_551, 11_318), (60_502, 11_316)
SOP = Official(
    name="Stanford Online Products",
    folders=("Stanford_Online_Products",),
    layout="Ebay_train.txt, Ebay_test.txt and the folders bicycle_final, cabinet_final and so on",
    origin="download=true fetches it",
)
_TRAIN_FILE, _TEST_FILE = "Ebay_train.txt", "Ebay_test.txt"


class SOPDataModule(OfficialDataModule):
    """Stanford Online Products (Oh Song et al., arXiv 1511.06452): 11,318 products train, 11,316 others evaluate.

    Each image is searched among all others of the test set; recall at 1, 10, 100 and 1,000 is what papers report. The
    twelve kinds of products are the super-labels, and their names the column `category`.

    Args:
        root: the folder `Stanford_Online_Products`, or the one that holds it.
        download: fetch the set into `root` where it is not there yet, 3.1 GB.
        options: of `OfficialDataModule`.

    Raises:
        InputError: from `setup`, for what `read_sop` finds wrong.
    """

    def __init__(self, root: str | Path, *, download: bool = False, **options: Any) -> None:
        """Keeps the options; see the class."""
        super().__init__(root, **options)
        self.download = download

    def read(self) -> Splits:
        """Reads the tables from the official files."""
        return read_sop(self.root, check_counts=self.check_counts)

    def fetch(self) -> None:
        """Downloads the set with `download=true`, where it is not there."""
        if self.download and SOP.find(self.root, _TRAIN_FILE, _TEST_FILE) is None:
            obtain(STANFORD_ONLINE_PRODUCTS, self.root, SOP.folders[0])


def read_sop(root: Path, *, check_counts: bool = True) -> Splits:
    """Reads `Ebay_train.txt` and `Ebay_test.txt`.

    Args:
        root: the folder of the set, or the one that holds it.
        check_counts: whether there must be as many images and classes as the set has.

    Returns:
        The splits, with `super_labels` and their names as the column `category`; paths start from the set's folder.

    Raises:
        InputError: for a file that is missing or malformed, a product in both files, an image that is listed twice, a
            path that leaves the folder, or other counts.
    """
    folder = SOP.folder(Path(root), _TRAIN_FILE, _TEST_FILE)
    files = [SOP.file(folder, name) for name in (_TRAIN_FILE, _TEST_FILE)]
    columns = [read_columns(file, "image_id class_id super_class_id path", header=True) for file in files]
    numbers, labels = number_classes(*(part.numbers(1) for part in columns))
    kinds = [part.numbers(2) for part in columns]
    kind_numbers = np.unique(np.concatenate(kinds))
    tables = [
        _table(folder, part, label, np.searchsorted(kind_numbers, kind).astype(np.int64))
        for part, label, kind in zip(columns, labels, kinds, strict=True)
    ]
    for part, table in zip(columns, tables, strict=True):
        check_rows(table, part.source)
    train, test = tables
    names = [str(number) for number in numbers]
    SOP.check_unseen(train, test, names, f"{files[0]} and {files[1]}")
    if check_counts:
        SOP.check_counts("training set", train, *TRAIN)
        SOP.check_counts("test set", test, *TEST)
    return Splits(train, test, names)


def _table(folder: Path, columns: Columns, labels: IntArray, kinds: IntArray) -> ImageTable:
    paths = columns.texts[3]
    categories = Texts(path.split("/")[0].removesuffix("_final") for path in paths)
    return ImageTable(folder, Texts(paths), labels, super_labels=kinds, extra={"category": categories})
