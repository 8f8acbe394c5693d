"""iNaturalist 2018: photographs of plants and animals, in the split by species of the Smooth-AP authors."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lightning_dml.datamodules.arrays import IntArray
from lightning_dml.datamodules.official.base import OfficialDataModule
from lightning_dml.datamodules.official.reading import Official, check_rows, number_classes, read_lines
from lightning_dml.datamodules.tables.checks import Source
from lightning_dml.datamodules.tables.rows import ImageTable, Texts
from lightning_dml.datamodules.tables.splits import Splits
from lightning_dml.errors import InputError

# Images: tests/datasets/test_inaturalist2018.py of pytorch-metric-learning counts the authors' lists. Classes: Brown et
# al., arXiv 2007.12163; together they are the 8,142 species of the competition.
TRAIN, TEST = (325_846, 5_690), (136_093, 2_452)
INATURALIST = Official(
    name="iNaturalist 2018",
    folders=("iNaturalist2018", "INaturalist", "Inaturalist", "inaturalist"),
    layout="the folders train_val2018 and Inat_dataset_splits, in that Inaturalist_train_set1.txt and "
    "Inaturalist_test_set1.txt",
    origin="the images are on the page of the iNaturalist 2018 competition, the lists on the Smooth-AP project page",
)
# The authors' own code (src/datasets.py of Smooth_AP) looks into the folder; other projects unpack the lists.
_TRAIN_FILE, _TEST_FILE = (
    (f"Inat_dataset_splits/Inaturalist_{split}_set1.txt", f"Inaturalist_{split}_set1.txt")
    for split in ("train", "test")
)


class INaturalistDataModule(OfficialDataModule):
    """iNaturalist 2018 as Smooth-AP splits it (Brown et al., arXiv 2007.12163): 5,690 species train, 2,452 evaluate.

    Each image is searched among all others of the test set; recall at 1, 4, 16 and 32 is what papers report. The
    fourteen groups, such as Aves and Fungi, are the super-labels, and their names the column `category`.

    Args:
        root: the folder that holds `train_val2018` and the authors' lists in `Inat_dataset_splits`, or its parent.
        check_counts: whether there must be as many images and classes as the split has; False for a part of your own.
        options: of `ImagesDataModule`.

    Raises:
        InputError: from `setup`, for what `read_inaturalist` finds wrong.
    """

    def read(self) -> Splits:
        """Reads the tables from the authors' lists."""
        return read_inaturalist(self.root, check_counts=self.check_counts)


def read_inaturalist(root: Path, *, check_counts: bool = True) -> Splits:
    """Reads `Inaturalist_train_set1.txt` and `Inaturalist_test_set1.txt`.

    A line is the path of an image, `train_val2018/<group>/<class number>/<image>`.

    Args:
        root: the folder of the set, or the one that holds it.
        check_counts: whether there must be as many images and classes as the split has.

    Returns:
        The splits, with `super_labels` and their names as the column `category`; a class is called by group and
        number, as in `Aves/2761`. Paths start from the set's folder.

    Raises:
        InputError: for a file that is missing or malformed, a class in both files, an image that is listed twice, a
            path that leaves the folder, or other counts.
    """
    folder = INATURALIST.folder(Path(root), *_TRAIN_FILE, *_TEST_FILE)
    files = [INATURALIST.file(folder, *names) for names in (_TRAIN_FILE, _TEST_FILE)]
    lines = [[line.strip() for line in read_lines(file)] for file in files]
    species: dict[tuple[int, str], int] = {}
    codes = [_codes(part, file, species) for part, file in zip(lines, files, strict=True)]
    # Classes in the order of their official numbers; the codes count them as they come.
    rank = np.empty(len(species), np.int64)
    ordered = sorted(species)
    rank[[species[name] for name in ordered]] = np.arange(len(species))
    numbers, labels = number_classes(*(rank[part] for part in codes))
    classes = [ordered[number] for number in numbers]
    groups = sorted({group for _, group in classes})
    group_of = np.array([groups.index(group) for _, group in classes], np.int64)
    tables = [
        ImageTable(
            folder,
            Texts(part),
            label,
            super_labels=group_of[label],
            extra={"category": Texts(groups).take(group_of[label])},
        )
        for part, label in zip(lines, labels, strict=True)
    ]
    for file, table in zip(files, tables, strict=True):
        check_rows(table, Source(str(file), unit="line"))
    train, test = tables
    names = [f"{group}/{number}" for number, group in classes]
    INATURALIST.check_unseen(train, test, names, f"{files[0]} and {files[1]}")
    if check_counts:
        INATURALIST.check_counts("training set", train, *TRAIN)
        INATURALIST.check_counts("test set", test, *TEST)
    return Splits(train, test, names)


def _codes(lines: list[str], file: Path, species: dict[tuple[int, str], int]) -> IntArray:
    """Codes of the classes of all lines, (N,), as `species` has them; new classes are added to it."""
    by_folder: dict[str, int] = {}
    codes = np.empty(len(lines), np.int64)
    for row, line in enumerate(lines):
        folder = line.rpartition("/")[0]
        if folder not in by_folder:
            parts = folder.split("/")
            if len(parts) != 3 or not parts[2].isdecimal():
                raise InputError(
                    f"{file}, line {row + 1} must be 'train_val2018/<group>/<class number>/<image>', got {line!r}: get "
                    "the file anew, or mend the line"
                )
            by_folder[folder] = species.setdefault((int(parts[2]), parts[1]), len(species))
        codes[row] = by_folder[folder]
    return codes
