"""In-Shop Clothes Retrieval of DeepFashion: garments, photographed by the shop from several sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lightning_dml.datamodules.official.base import OfficialDataModule
from lightning_dml.datamodules.official.reading import (
    Columns,
    Official,
    check_rows,
    number_classes,
    read_columns,
    read_lines,
)
from lightning_dml.datamodules.tables.rows import ImageTable, Texts
from lightning_dml.datamodules.tables.splits import Splits
from lightning_dml.errors import InputError

# Images and items: Liu et al., DeepFashion, CVPR 2016, as the metric learning papers count them. The converter of
# open-metric-learning (pipelines/datasets_converters/convert_inshop.py) asserts their sums, 52,712 and 7,982.
TRAIN, QUERY, GALLERY = (25_882, 3_997), (14_218, 3_985), (12_612, 3_985)
IN_SHOP = Official(
    name="In-Shop Clothes Retrieval",
    folders=("In-shop Clothes Retrieval Benchmark", "In-shop", "DeepFashion_InShop"),
    layout="list_eval_partition.txt (there, in Eval or in Anno) and the folder img (there or in Img)",
    origin="request it from the DeepFashion project page, In-shop Clothes Retrieval Benchmark",
)
_PARTITION = tuple(f"{folder}list_eval_partition.txt" for folder in ("", "Eval/", "Anno/"))
_STATUSES = ("train", "query", "gallery")


class InShopDataModule(OfficialDataModule):
    """In-Shop Clothes Retrieval (Liu et al., CVPR 2016): 3,997 items train, 3,985 others evaluate.

    Each query image is searched in the gallery, which holds other images of the same items; recall at 1, 10, 20 and
    30 is what papers report. Items that have one training image are left out with `drop_small_classes=true`.

    Args:
        root: the folder of the set, with `list_eval_partition.txt` in it, in `Eval` or in `Anno`, and the images in
            `img` or `Img/img`; or the one that holds it as `In-shop Clothes Retrieval Benchmark`.
        check_counts: whether there must be as many images and items as the set has; False for a part of your own.
        options: of `ImagesDataModule`.

    Raises:
        InputError: from `setup`, for what `read_in_shop` finds wrong.
    """

    def read(self) -> Splits:
        """Reads the tables from the official file."""
        return read_in_shop(self.root, check_counts=self.check_counts)


def read_in_shop(root: Path, *, check_counts: bool = True) -> Splits:
    """Reads `list_eval_partition.txt`.

    Args:
        root: the folder of the set, or the one that holds it.
        check_counts: whether there must be as many images and items as the set has, and as the first line says.

    Returns:
        The splits; a row of the test set is a query or in the gallery. Paths start from the folder that has `img`.

    Raises:
        InputError: for a file that is missing or malformed, a status that is not train, query or gallery, an item that
            trains and evaluates, an image that is listed twice, a path that leaves the folder, or other counts.
    """
    folder = IN_SHOP.folder(Path(root), *_PARTITION)
    file = IN_SHOP.file(folder, *_PARTITION)
    columns = read_columns(file, "image_name item_id evaluation_status", header=True, skip=1)
    _check_first_line(file, columns, check_counts)
    images = folder / "Img" if (folder / "Img/img").is_dir() and not (folder / "img").is_dir() else folder
    statuses = columns.texts[2]
    if (wrong := next((row for row, word in enumerate(statuses) if word not in _STATUSES), None)) is not None:
        raise columns.malformed(wrong, f"with a status out of {', '.join(_STATUSES)}")
    status = np.array([_STATUSES.index(word) for word in statuses], np.int64)
    items, item_names = Texts(columns.texts[1]).codes()
    trains = status == 0
    order, (train_labels, test_labels) = number_classes(items[trains], items[~trains])
    paths = Texts(columns.texts[0])
    names = [item_names[item] for item in order]
    train = ImageTable(images, paths.take(trains), train_labels)
    role = status[~trains]
    test = ImageTable(images, paths.take(~trains), test_labels, is_query=role == 1, is_gallery=role == 2)
    check_rows(ImageTable(images, paths, items), columns.source)
    IN_SHOP.check_unseen(train, test, names, str(file))
    if check_counts:
        IN_SHOP.check_counts("training set", train, *TRAIN)
        IN_SHOP.check_counts("queries of the test set", test.take(role == 1), *QUERY)
        IN_SHOP.check_counts("gallery of the test set", test.take(role == 2), *GALLERY)
    return Splits(train, test, names)


def _check_first_line(file: Path, columns: Columns, check_counts: bool) -> None:
    """Compares the first line, which holds the number of rows, with the rows."""
    first = read_lines(file)[0].strip()
    if not first.isdecimal():
        raise InputError(f"{file}, line 1 must be the number of images, got {first!r}: get the file anew")
    if check_counts and int(first) != len(columns):
        raise InputError(
            f"{file} has {len(columns):,} images, and its first line says {int(first):,}: get the file anew, or set "
            "check_counts=false for a part of your own"
        )
