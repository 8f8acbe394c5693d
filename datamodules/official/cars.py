"""Cars-196: photographs of 196 models of cars, half of which train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_dml.datamodules.arrays import IntArray
from lightning_dml.datamodules.official.base import OfficialDataModule
from lightning_dml.datamodules.official.reading import Official, check_rows, number_classes
from lightning_dml.datamodules.tables.checks import Source
from lightning_dml.datamodules.tables.rows import ImageTable, Texts
from lightning_dml.datamodules.tables.splits import Splits
from lightning_dml.errors import InputError

LAST_TRAINING_CLASS = 98  # classes 1 to 98 train, those above evaluate (Oh Song et al., arXiv 1511.06452)
# Images and classes: tests/datasets/test_cars196.py of pytorch-metric-learning counts the same.
TRAIN, TEST = (8_054, 98), (8_131, 98)
CARS = Official(
    name="Cars-196",
    folders=("cars196", "CARS196", "stanford_cars"),
    layout="cars_annos.mat and the folder car_ims, or devkit/cars_train_annos.mat, cars_test_annos_withlabels.mat and "
    "the folders cars_train and cars_test",
    origin="request it from the Stanford Cars project page, or take a mirror that you trust",
)
_WHOLE = "cars_annos.mat"
_TRAIN_FILE = ("devkit/cars_train_annos.mat", "cars_train_annos.mat")
_TEST_FILE = ("cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat")
_META_FILE = ("devkit/cars_meta.mat", "cars_meta.mat")
_BOX = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


class Cars196DataModule(OfficialDataModule):
    """Cars-196 (Krause et al., 2013): classes 1 to 98 train, 99 to 196 evaluate, each image against all others.

    Recall at 1, 2, 4 and 8 is what papers report. Both layouts in which the set was published are read, whichever is
    there: `cars_annos.mat` with `car_ims`, or the later one with `devkit`, `cars_train` and `cars_test`; their split,
    which is for classification, is not used. Reading `.mat` files takes SciPy, in the extra `lightning-dml[data]`.

    Args:
        root: the folder of the set, or the one that holds it as `cars196` or `stanford_cars`.
        crop_boxes: cut every image to the box of its car.
        options: of `OfficialDataModule`.

    Raises:
        InputError: from `setup`, for what `read_cars` finds wrong.
    """

    def __init__(self, root: str | Path, *, crop_boxes: bool = False, **options: Any) -> None:
        """Keeps the options; see the class."""
        super().__init__(root, **options)
        self.crop_boxes = crop_boxes

    def read(self) -> Splits:
        """Reads the tables from the official files."""
        return read_cars(self.root, check_counts=self.check_counts, crop_boxes=self.crop_boxes)


def read_cars(root: Path, *, check_counts: bool = True, crop_boxes: bool = False) -> Splits:
    """Reads `cars_annos.mat`, or else the annotations of both parts of the later layout.

    Args:
        root: the folder of the set, or the one that holds it.
        check_counts: whether there must be as many images and classes as the set has.
        crop_boxes: whether to keep the boxes, whose pixels the files count from 1 and with the last one.

    Returns:
        The splits; paths start from the set's folder.

    Raises:
        InputError: without SciPy, for a file that is missing or not as expected, a box without an area, an image that
            is listed twice, a path that leaves the folder, or other counts.
    """
    folder = CARS.folder(Path(root), _WHOLE, *_TRAIN_FILE)
    annotations = _whole(folder) if _is_whole(folder) else _parts(folder)
    trains = annotations.classes <= LAST_TRAINING_CLASS
    numbers, (train, test) = number_classes(annotations.classes[trains], annotations.classes[~trains])
    labels = np.empty(len(annotations.paths), np.int64)
    labels[trains], labels[~trains] = train, test
    table = ImageTable(folder, Texts(annotations.paths), labels, _boxes(annotations) if crop_boxes else None)
    names = [
        annotations.names[number - 1] if number <= len(annotations.names) else f"class {number}" for number in numbers
    ]
    train_table, test_table = table.take(trains), table.take(~trains)
    if check_counts:
        CARS.check_counts("training set", train_table, *TRAIN)
        CARS.check_counts("test set", test_table, *TEST)
    return Splits(train_table, test_table, names)


@dataclass(frozen=True)
class _Annotations:
    """Contents of the annotations, in either layout."""

    source: str
    paths: list[str]
    classes: IntArray
    corners: IntArray
    names: list[str]


def _is_whole(folder: Path) -> bool:
    """True to read `cars_annos.mat`; in a folder that has the files of both layouts, the images tell."""
    if not (folder / _WHOLE).is_file() or not any((folder / name).is_file() for name in _TRAIN_FILE):
        return (folder / _WHOLE).is_file()
    return (folder / "car_ims").is_dir() or not (folder / "cars_train").is_dir()


def _whole(folder: Path) -> _Annotations:
    file = folder / _WHOLE
    variables = _load(file)
    return _Annotations(str(file), *_columns(folder, file, variables, "relative_im_path"), _names(variables))


def _parts(folder: Path) -> _Annotations:
    files = [CARS.file(folder, *names) for names in (_TRAIN_FILE, _TEST_FILE)]
    (paths, classes, corners), (others, more, further) = (
        _columns(folder, file, _load(file), "fname", images)
        for file, images in zip(files, ("cars_train/", "cars_test/"), strict=True)
    )
    meta = next((folder / name for name in _META_FILE if (folder / name).is_file()), None)
    return _Annotations(
        source=" and ".join(map(str, files)),
        paths=paths + others,
        classes=np.concatenate([classes, more]),
        corners=np.concatenate([corners, further]),
        names=_names(_load(meta)) if meta else [],
    )


def _columns(
    folder: Path, file: Path, variables: dict[str, Any], path_field: str, images: str = ""
) -> tuple[list[str], IntArray, IntArray]:
    """Paths, classes (N,) and corners (N, 4) of the struct array `annotations`."""
    fields = (path_field, "class", *_BOX)
    rows = np.atleast_1d(variables.get("annotations", 0))
    if missing := [name for name in fields if name not in (rows.dtype.names or ())]:
        raise InputError(
            f"{file} must have a struct array 'annotations' with the fields {', '.join(fields)}, and {missing[0]!r} is "
            "missing: get the file anew (for the later layout's test images, the one that ends in _withlabels)"
        )
    try:
        classes, *corners = (np.array([int(value) for value in rows[name]], np.int64) for name in fields[1:])
    except (TypeError, ValueError) as error:
        raise InputError(f"{file} must have one number in each class and box: {error}; get the file anew") from error
    if len(wrong := np.flatnonzero(classes < 1)):
        raise InputError(
            f"{file}: annotation {wrong[0] + 1} must have a class from 1, got {classes[wrong[0]]}: get the file anew"
        )
    paths = [f"{images}{path}" for path in rows[path_field]]
    check_rows(ImageTable(folder, Texts(paths), classes), Source(str(file), unit="annotation"))
    return paths, classes, np.stack(corners, axis=1)


def _boxes(annotations: _Annotations) -> NDArray[np.int32]:
    """Boxes with pixels counted from 0 and the far corner past the edge, (N, 4)."""
    boxes = annotations.corners.copy()
    boxes[:, :2] = np.maximum(boxes[:, :2] - 1, 0)
    wrong = np.flatnonzero((boxes[:, 2:] <= boxes[:, :2]).any(axis=1))
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"{annotations.source}: the box of {annotations.paths[row]} must have an area, got the corners "
            f"{annotations.corners[row].tolist()}: get the file anew, or set crop_boxes=false"
        )
    return boxes.astype(np.int32)


def _names(variables: dict[str, Any]) -> list[str]:
    """Names of the classes from 1; none where the file has none."""
    return [str(name) for name in np.atleast_1d(variables.get("class_names", []))]


def _load(file: Path) -> dict[str, Any]:
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise InputError(
            f"{CARS.name}: reading {file.name} takes SciPy, which is not installed: pip install 'lightning-dml[data]'"
        ) from error
    try:
        variables: dict[str, Any] = loadmat(str(file), squeeze_me=True)
    except (OSError, ValueError, TypeError, NotImplementedError, MatReadError) as error:
        raise InputError(f"cannot read {file}: {error}; get the file anew") from error
    return variables
