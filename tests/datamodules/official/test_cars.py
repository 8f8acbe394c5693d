"""Cars-196 in both of its layouts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.recfunctions import repack_fields
from scipy.io import loadmat, savemat

from lightning_dml.datamodules.images.datasets import LabelledImages
from lightning_dml.datamodules.official import cars
from lightning_dml.datamodules.official.cars import Cars196DataModule, read_cars
from lightning_dml.datamodules.tables.rows import ImageTable
from lightning_dml.errors import InputError
from tests.datamodules.replicas import make_cars, make_cars_devkit, rows_of, spread


def test_the_first_layout(tmp_path: Path) -> None:
    """Classes decide the split; the file's own `test` flags are for classification and would mix them."""
    folder = make_cars(tmp_path, classes=(196, 1, 99, 98), images=[2, 3, 1, 4])
    splits = read_cars(tmp_path, check_counts=False)
    train, test = _by_hand(folder, {"cars_annos.mat": ""})
    assert isinstance(splits.test, ImageTable)
    assert rows_of(splits.train, splits.class_names) == train and len(train) == 7
    assert rows_of(splits.test, splits.class_names) == test and len(test) == 3
    assert splits.class_names == ["Make Model 1", "Make Model 98", "Make Model 99", "Make Model 196"]
    assert splits.train.boxes is None


@pytest.mark.parametrize("labels", ["cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat"])
def test_the_later_layout(labels: str, tmp_path: Path) -> None:
    """Images of one class lie in both folders, and two images have the same name; both must keep their own."""
    folder = make_cars_devkit(tmp_path, classes=(196, 1, 99, 98), images=[2, 3, 2, 4], labels=labels)
    splits = read_cars(folder, check_counts=False)
    files = {"devkit/cars_train_annos.mat": "cars_train/", labels: "cars_test/"}
    train, test = _by_hand(folder, files)
    assert isinstance(splits.test, ImageTable)
    assert rows_of(splits.train, splits.class_names) == train and len(train) == 7
    assert rows_of(splits.test, splits.class_names) == test and len(test) == 4
    assert all(splits.train.path(row).is_file() for row in range(7))


def test_a_folder_with_both_layouts_is_known_by_its_images(tmp_path: Path) -> None:
    """Mirrors ship both kinds of annotations; those whose images are not there would fail at the first batch."""
    make_cars(tmp_path / "a", pictures=False)
    folder = make_cars_devkit(tmp_path)
    (tmp_path / "a/cars196/cars_annos.mat").rename(folder / "cars_annos.mat")
    assert read_cars(folder, check_counts=False).train.paths[0].startswith("cars_train/")
    (folder / "car_ims").mkdir()
    assert read_cars(folder, check_counts=False).train.paths[0].startswith("car_ims/")


def test_names_without_their_file(tmp_path: Path) -> None:
    """The names are for reports alone, so a copy without cars_meta.mat still trains."""
    folder = make_cars_devkit(tmp_path)
    (folder / "devkit/cars_meta.mat").unlink()
    assert read_cars(folder, check_counts=False).class_names == ["class 1", "class 98", "class 99", "class 196"]


@pytest.mark.parametrize("make", [make_cars, make_cars_devkit])
def test_boxes(make: Callable[..., Path], tmp_path: Path) -> None:
    """MATLAB counts pixels from 1 and means the last one too: 3 to 8 are six pixels, from the third."""
    make(tmp_path)
    splits = read_cars(tmp_path, check_counts=False, crop_boxes=True)
    assert isinstance(splits.test, ImageTable)
    for table in (splits.train, splits.test):
        assert table.boxes is not None and table.boxes.dtype == np.int32
        assert table.boxes.tolist() == [[2, 1, 8, 8]] * len(table)
    small: dict[str, Any] = {"image_size": 16, "resize": 16, "classes_per_batch": 2, "samples_per_class": 2}
    module = Cars196DataModule(
        tmp_path, check_counts=False, crop_boxes=True, num_workers=0, check_images="none", **small
    )
    module.setup("fit")
    assert isinstance(module.train_set, LabelledImages) and module.train_set.picture(0).shape == (7, 6, 3)


def test_one_image(tmp_path: Path) -> None:
    """A MATLAB array of one row reads as no array at all, and a part of a set may have one image."""
    make_cars(tmp_path, classes=(5,), images=1)
    splits = read_cars(tmp_path, check_counts=False)
    assert splits.train.paths[0] == "car_ims/000001.jpg" and splits.class_names == ["Make Model 5"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("class", 0, r"cars_annos\.mat: annotation 2 must have a class from 1, got 0"),
        ("class", "Audi", r"cars_annos\.mat must have one number in each class and box"),
        ("relative_im_path", "car_ims/000001.jpg", r"cars_annos\.mat, annotation 2: .* annotation 1 already"),
        ("relative_im_path", "../../a.jpg", r"cars_annos\.mat, annotation 2: .* root "),
        ("bbox_x2", 2, r"the box of car_ims/000002\.jpg must have an area, got the corners \[3, 2, 2, 8\]"),
        ("class", None, r"cars_annos\.mat must have a struct array 'annotations' .* and 'class' is missing"),
        ("bbox_y1", None, r"and 'bbox_y1' is missing: get the file anew .*_withlabels"),
    ],
)
def test_annotations_that_do_not_fit(field: str, value: Any, message: str, tmp_path: Path) -> None:
    """The test annotations without classes are easily taken for those with them; None leaves the field out."""
    file = make_cars(tmp_path) / "cars_annos.mat"
    rows = loadmat(str(file))["annotations"]
    if value is None:
        rows = repack_fields(rows[[name for name in rows.dtype.names if name != field]])
    else:
        rows[field][0, 1] = value
    savemat(str(file), {"annotations": rows})
    with pytest.raises(InputError, match=message):
        read_cars(tmp_path, check_counts=False, crop_boxes=True)


@pytest.mark.parametrize("content", [b"", b"<html>please log in</html>" * 20, b"MATLAB 7.3 MAT-file".ljust(600)])
def test_a_file_that_is_no_mat_file(content: bytes, tmp_path: Path) -> None:
    """A login page that was saved instead of the file is common, and SciPy's own error does not name the file."""
    file = make_cars(tmp_path) / "cars_annos.mat"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read .*cars_annos\.mat: .*; get the file anew"):
        read_cars(tmp_path)


def test_a_file_without_annotations(tmp_path: Path) -> None:
    """Another .mat file under the name must be told from the right one."""
    savemat(str(make_cars(tmp_path) / "cars_annos.mat"), {"other": np.arange(3)})
    with pytest.raises(InputError, match="'relative_im_path' is missing"):
        read_cars(tmp_path)


def test_without_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SciPy is no dependency of the package; who needs it must read what to install."""
    make_cars(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(InputError, match=r"takes SciPy, which is not installed: pip install 'lightning-dml\[data\]'"):
        read_cars(tmp_path)


def test_the_official_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole set must pass the check, and one image less must not; SciPy takes seconds to write so many rows."""
    folder = make_cars(tmp_path, pictures=False)
    rows = np.repeat(loadmat(str(folder / "cars_annos.mat"), squeeze_me=True)["annotations"][:1], 16_185)
    counts = spread(8_054, 98) + spread(8_131, 98)
    rows["class"] = np.repeat(np.arange(1, 197), counts)
    rows["relative_im_path"] = [f"car_ims/{place:06}.jpg" for place in range(16_185)]
    monkeypatch.setattr(cars, "_load", lambda file: {"annotations": rows})
    splits = read_cars(tmp_path)
    assert (len(splits.train), len(splits.class_names)) == (8_054, 196)
    rows = rows[:-1]
    with pytest.raises(InputError, match=r"Cars-196: the test set must have 8,131 images of 98 classes, and 8,130 "):
        read_cars(tmp_path)
    rows = rows[1:]
    with pytest.raises(InputError, match=r"Cars-196: the training set must have 8,054 images of 98 classes"):
        read_cars(tmp_path)


def _by_hand(folder: Path, files: dict[str, str]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Path and class name of the training and of the test images, in the order of the files."""
    parts: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for file, images in files.items():
        for row in loadmat(str(folder / file))["annotations"][0]:
            number = int(row["class"][0, 0])
            name = str(row["fname" if images else "relative_im_path"][0])
            parts[number > 98].append((f"{folder.as_posix()}/{images}{name}", f"Make Model {number}"))
    return parts
