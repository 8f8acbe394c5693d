"""VehicleID: cars and vans under road cameras, from the front and from behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_warn

from lightning_dml import checks
from lightning_dml.datamodules.arrays import IntArray
from lightning_dml.datamodules.official.base import OfficialDataModule
from lightning_dml.datamodules.official.reading import Columns, Official, check_rows, number_classes, read_columns
from lightning_dml.datamodules.tables.rows import ImageTable, Texts
from lightning_dml.datamodules.tables.splits import Splits
from lightning_dml.errors import InputError

# Images of each test list, which is called after its vehicles: fastreid/data/datasets/vehicleid.py of fast-reid. The
# training list is not counted: papers print other numbers than fast-reid finds.
TEST_IMAGES = {800: 6_493, 1_600: 13_377, 2_400: 19_777}
SET_NAMES = {800: "small", 1_600: "medium", 2_400: "large"}
VEHICLE_ID = Official(
    name="VehicleID",
    folders=("VehicleID_V1.0", "VehicleID", "vehicleid"),
    layout="train_test_split/train_list.txt, train_test_split/test_list_800.txt and so on, and the folder image",
    origin="request it from the PKU VehicleID project page",
)
_TRAIN_FILE = "train_test_split/train_list.txt"


class VehicleIDDataModule(OfficialDataModule):
    """VehicleID (Liu et al., CVPR 2016): vehicles that are to be found again among others of the same make.

    The test sets are called `small`, `medium` and `large`. One random image of each vehicle is the gallery and the
    others are queries, so evaluate with `RetrievalMetrics(gallery_draws=10)`: it draws ten times, and the values are
    the means. Recall at 1 and 5 is what papers report. All three are validated as well; `test_sizes: [800]` is faster.
    Only the test sets are counted.

    Args:
        root: the folder `VehicleID_V1.0`, or the one that holds it.
        test_sizes: vehicles of the test sets that are evaluated, each with its own `test_list_<size>.txt`; those whose
            file is not there are left out with a warning. A size that has no name is called by its number.
        options: of `OfficialDataModule`.

    Raises:
        InputError: if `test_sizes` is empty or has one twice. From `setup`, for what `read_vehicle_id` finds wrong.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        test_sizes: Sequence[int] = (800, 1600, 2400),
        **options: Any,
    ) -> None:
        """Checks the options; see the class."""
        super().__init__(root, **options)
        _check_sizes(test_sizes)
        self.test_sizes = tuple(test_sizes)

    def read(self) -> Splits:
        """Reads the tables from the official files."""
        return read_vehicle_id(self.root, check_counts=self.check_counts, test_sizes=self.test_sizes)


def read_vehicle_id(root: Path, *, check_counts: bool = True, test_sizes: Sequence[int] = (800, 1600, 2400)) -> Splits:
    """Reads `train_list.txt` and the test lists of some sizes.

    A vehicle has one label, in however many of the test lists it is.

    Args:
        root: the folder of the set, or the one that holds it.
        check_counts: whether the test sets must have as many vehicles and images as they are known to have.
        test_sizes: vehicles of the test sets to read.

    Returns:
        The splits, with the test sets by name; paths start from the folder `image`.

    Raises:
        InputError: for sizes that are none, not positive or repeated, a file that is missing or malformed, a vehicle
            that trains and evaluates, an image that is listed twice in one file, a path that leaves the folder, or
            other counts.
    """
    _check_sizes(test_sizes)
    folder = VEHICLE_ID.folder(Path(root), _TRAIN_FILE)
    tests = {size: f"train_test_split/test_list_{size}.txt" for size in test_sizes}
    VEHICLE_ID.file(folder, *tests.values())
    missing = sorted(size for size, name in tests.items() if not (folder / name).is_file())
    if missing:
        rank_zero_warn(
            f"VehicleID: there is no {tests[missing[0]]} in {folder}, so its test set is left out; get the file, or "
            f"take {missing[0]} out of test_sizes"
        )
    sizes = [size for size in test_sizes if size not in missing]
    files = [folder / _TRAIN_FILE, *(folder / tests[size] for size in sizes)]
    columns = [read_columns(file, "image vehicle") for file in files]
    numbers, labels = number_classes(*(part.numbers(1) for part in columns))
    tables = [_table(folder / "image", part, label) for part, label in zip(columns, labels, strict=True)]
    names = [str(number) for number in numbers]
    for part, table in zip(columns, tables, strict=True):
        check_rows(table, part.source)
    for file, table in zip(files[1:], tables[1:], strict=True):
        VEHICLE_ID.check_unseen(tables[0], table, names, f"{files[0]} and {file}")
    named = {SET_NAMES.get(size, str(size)): table for size, table in zip(sizes, tables[1:], strict=True)}
    if check_counts:
        for size, (name, table) in zip(sizes, named.items(), strict=True):
            VEHICLE_ID.check_counts(f"test set {name!r}", table, TEST_IMAGES.get(size), size)
    return Splits(tables[0], named, names)


def _check_sizes(test_sizes: Sequence[int]) -> None:
    checks.check_counts("test_sizes", test_sizes, hint="the set has 800, 1600, 2400 and 13164")
    if len(set(test_sizes)) < len(test_sizes):
        raise InputError(f"test_sizes must have each size once, got {list(test_sizes)}: take one of the two out")


def _table(folder: Path, columns: Columns, labels: IntArray) -> ImageTable:
    return ImageTable(folder, Texts(f"{name}.jpg" for name in columns.texts[0]), labels)
