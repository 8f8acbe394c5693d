"""CUB-200-2011: photographs of 200 species of birds, half of which train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_dml.datamodules.arrays import IntArray
from lightning_dml.datamodules.downloads import CUB_200_2011, obtain
from lightning_dml.datamodules.official.base import OfficialDataModule
from lightning_dml.datamodules.official.reading import Columns, Official, check_rows, number_classes, read_columns
from lightning_dml.datamodules.tables.rows import ImageTable, Texts
from lightning_dml.datamodules.tables.splits import Splits
from lightning_dml.errors import InputError

LAST_TRAINING_CLASS = 100  # classes 1 to 100 train, those above evaluate (Oh Song et al., arXiv 1511.06452)
# Images and classes: tests/datasets/test_cub.py of pytorch-metric-learning counts the same.
TRAIN, TEST = (5_864, 100), (5_924, 100)
CUB = Official(
    name="CUB-200-2011",
    folders=("CUB_200_2011",),
    layout="images.txt, image_class_labels.txt and the folder images",
    origin="download=true fetches it",
)
_IMAGES = "images.txt"


class CUB200DataModule(OfficialDataModule):
    """CUB-200-2011 (Wah et al., 2011): classes 1 to 100 train, 101 to 200 evaluate, each image against all others.

    Recall at 1, 2, 4 and 8 is what papers report. The official files are read as they are; `train_test_split.txt`,
    which is for classification, is not used.

    Args:
        root: the folder `CUB_200_2011`, or the one that holds it.
        download: fetch the set into `root` where it is not there yet, 1.2 GB.
        crop_boxes: cut every image to the box of its bird, which needs `bounding_boxes.txt`.
        options: of `OfficialDataModule`.

    Raises:
        InputError: from `setup`, for what `read_cub` finds wrong.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        download: bool = False,
        crop_boxes: bool = False,
        **options: Any,
    ) -> None:
        """Keeps the options; see the class."""
        super().__init__(root, **options)
        self.download = download
        self.crop_boxes = crop_boxes

    def read(self) -> Splits:
        """Reads the tables from the official files."""
        return read_cub(self.root, check_counts=self.check_counts, crop_boxes=self.crop_boxes)

    def fetch(self) -> None:
        """Downloads the set with `download=true`, where it is not there."""
        if self.download and CUB.find(self.root, _IMAGES) is None:
            obtain(CUB_200_2011, self.root, CUB.folders[0])


def read_cub(root: Path, *, check_counts: bool = True, crop_boxes: bool = False) -> Splits:
    """Reads `images.txt`, `image_class_labels.txt` and, where they are there, the names in `classes.txt`.

    Args:
        root: the folder of the set, or the one that holds it.
        check_counts: whether there must be as many images and classes as the set has.
        crop_boxes: whether to read `bounding_boxes.txt` too. A box that begins or ends within a pixel has all of it.

    Returns:
        The splits; paths start from the folder `images`.

    Raises:
        InputError: for a file that is missing or malformed, an image without a class or box, an image that is listed
            twice, a path that leaves the folder, or other counts.
    """
    folder = CUB.folder(Path(root), _IMAGES)
    images = read_columns(folder / _IMAGES, "image_id path")
    paths = images.texts[1]
    classes = _classes(images, CUB.file(folder, "image_class_labels.txt"))
    trains = classes <= LAST_TRAINING_CLASS
    numbers, (train, test) = number_classes(classes[trains], classes[~trains])
    labels = np.empty(len(images), np.int64)
    labels[trains], labels[~trains] = train, test
    boxes = _boxes(images, CUB.file(folder, "bounding_boxes.txt")) if crop_boxes else None
    table = ImageTable(folder / "images", Texts(paths), labels)
    check_rows(table, images.source)
    table = replace(table, boxes=boxes)
    # Without classes.txt the names are those of the folders, which are the same.
    names = {int(number): path.split("/")[0] for number, path in zip(classes, paths, strict=True)}
    if (folder / "classes.txt").is_file():
        listed = read_columns(folder / "classes.txt", "class_id class_name")
        names.update(zip(listed.numbers(0).tolist(), listed.texts[1], strict=True))
    train_table, test_table = table.take(trains), table.take(~trains)
    if check_counts:
        CUB.check_counts("training set", train_table, *TRAIN)
        CUB.check_counts("test set", test_table, *TEST)
    return Splits(train_table, test_table, [names[int(number)] for number in numbers])


def _classes(images: Columns, file: Path) -> IntArray:
    rows = read_columns(file, "image_id class_id")
    return rows.numbers(1, least=1)[_places(images, rows)]


def _boxes(images: Columns, file: Path) -> NDArray[np.int32]:
    rows = read_columns(file, "image_id x y width height")
    x, y, width, height = (rows.decimals(column) for column in range(1, 5))
    if len(empty := np.flatnonzero((np.minimum(x, y) < 0) | (np.minimum(width, height) <= 0))):
        raise rows.malformed(int(empty[0]), "with a box that has an area")
    boxes = np.stack([np.floor(x), np.floor(y), np.ceil(x + width), np.ceil(y + height)], axis=1)
    return boxes[_places(images, rows)].astype(np.int32)


def _places(images: Columns, rows: Columns) -> IntArray:
    """Rows of the images in another file, (N,), by the image's number."""
    place: dict[int, int] = {}
    for row, number in enumerate(rows.numbers(0).tolist()):
        if place.setdefault(number, row) != row:
            raise rows.malformed(row, "with an image_id that no line above has")
    image_ids = images.numbers(0)
    earlier: set[int] = set()
    for row, number in enumerate(image_ids.tolist()):
        if number in earlier:
            raise images.malformed(row, "with an image_id that no line above has")
        if number not in place:
            raise InputError(
                f"{CUB.name}: image_id {number} of {images.file} has no line in {rows.file}: get both files anew, or "
                f"take the line out of {images.file.name}"
            )
        earlier.add(number)
    return np.array([place[number] for number in image_ids.tolist()], np.int64)
