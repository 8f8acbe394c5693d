"""CUB-200-2011 as its files say it: which class trains, which picture has which box."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_dml.datamodules.images.datasets import LabelledImages
from lightning_dml.datamodules.official.cub import CUB200DataModule, read_cub
from lightning_dml.datamodules.tables.rows import ImageTable
from lightning_dml.errors import InputError
from tests.datamodules.replicas import edit, make_cub, rows_of, spread


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_image_has_its_class(tmp_path: Path, newline: str) -> None:
    """The files are joined by image_id and not by line; a shift by one line would spoil every label unseen."""
    folder = make_cub(tmp_path, classes=(150, 1, 100, 101, 7), images=[2, 3, 1, 2, 4], newline=newline)
    for name in ("image_class_labels.txt", "bounding_boxes.txt", "classes.txt"):
        lines = (folder / name).read_bytes().splitlines(keepends=True)
        (folder / name).write_bytes(b"".join(reversed(lines)))
    splits = read_cub(tmp_path, check_counts=False)
    train, test = _by_hand(folder)
    assert isinstance(splits.test, ImageTable)
    assert rows_of(splits.train, splits.class_names) == train and len(train) == 8
    assert rows_of(splits.test, splits.class_names) == test and len(test) == 4
    assert splits.class_names == ["001.Bird_1", "007.Bird_7", "100.Bird_100", "101.Bird_101", "150.Bird_150"]
    assert splits.train.boxes is None and splits.val is None


def test_names_without_their_file(tmp_path: Path) -> None:
    """Copies of the set often lack classes.txt; the folders carry the same names."""
    folder = make_cub(tmp_path)
    with_file = read_cub(tmp_path, check_counts=False).class_names
    (folder / "classes.txt").unlink()
    assert read_cub(tmp_path, check_counts=False).class_names == with_file
    (folder / "classes.txt").write_text("1 Albatross\n")
    assert read_cub(tmp_path, check_counts=False).class_names == ["Albatross", *with_file[1:]]


def test_boxes(tmp_path: Path) -> None:
    """The file has a corner and a size; a picture that is cut by another rule is another experiment."""
    folder = make_cub(tmp_path)
    edit(folder / "bounding_boxes.txt", "2 1.0 1.0 6.0 7.0", "2 0.0 2.0 5.0 4.0")
    edit(folder / "bounding_boxes.txt", "3 1.0 1.0 6.0 7.0", "3 1.7 2.2 3.0 4.0")
    splits = read_cub(tmp_path, check_counts=False, crop_boxes=True)
    boxes = splits.train.boxes
    assert boxes is not None and boxes.dtype == np.int32
    assert boxes[:3].tolist() == [[1, 1, 7, 8], [0, 2, 5, 6], [1, 2, 5, 7]]
    module = CUB200DataModule(
        tmp_path, check_counts=False, crop_boxes=True, num_workers=0, check_images="none", **_BATCH
    )
    module.setup("fit")
    assert isinstance(module.train_set, LabelledImages)
    assert module.train_set.picture(1).shape == (4, 5, 3)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("images.txt", "\n2 ", "\n1 ", r"images\.txt, line 2 .* image_id that no line above has, got '1 "),
        ("image_class_labels.txt", "\n2 ", "\n1 ", r"image_class_labels\.txt, line 2 .* no line above has"),
        ("image_class_labels.txt", "\n2 1", "", r"image_id 2 of .*images\.txt has no line in .*class_labels\.txt"),
        ("image_class_labels.txt", "2 1\n", "2 one\n", r"image_class_labels\.txt, line 2 must be .*, got '2 one'"),
        ("image_class_labels.txt", "2 1\n", "2 0\n", r"line 2 must be .* numbers of at least 1, got '2 0'"),
        ("images.txt", "\n2 001.Bird_1/Bird_0002_2", "\n2 001.Bird_1/Bird_0001_1", r"line 2: .* line 1 already"),
        ("images.txt", "/Bird_0001_1.jpg", "/Bird 1.jpg", r"images\.txt, line 1 must be 'image_id path'"),
        ("classes.txt", "2 002", "two 002", r"classes\.txt, line 2 must be 'class_id class_name'"),
        ("bounding_boxes.txt", "2 1.0", "2 1,0", r"bounding_boxes\.txt, line 2 must be"),
        ("bounding_boxes.txt", "2 1.0 1.0 6.0", "2 1.0 1.0 0.0", r"boxes\.txt, line 2 .* box that has an area"),
        ("bounding_boxes.txt", "2 1.0 1.0", "2 1.0 -1.0", r"boxes\.txt, line 2 .* box that has an area"),
        ("bounding_boxes.txt", "\n2 1.0 1.0 6.0 7.0", "", r"image_id 2 .* has no line in .*bounding_boxes\.txt"),
    ],
)
def test_what_does_not_fit(file: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    """A mistake in one of four files must not become a wrong label; the message shows the file and the line."""
    edit(make_cub(tmp_path) / file, old, new)
    with pytest.raises(InputError, match=message):
        read_cub(tmp_path, check_counts=False, crop_boxes=True)


def test_boxes_are_only_needed_when_they_are_used(tmp_path: Path) -> None:
    """Not every copy has them, and most experiments use whole images."""
    folder = make_cub(tmp_path)
    (folder / "bounding_boxes.txt").unlink()
    read_cub(tmp_path, check_counts=False)
    with pytest.raises(InputError, match=r"there is no bounding_boxes\.txt in .*CUB_200_2011"):
        read_cub(tmp_path, check_counts=False, crop_boxes=True)


def test_the_official_counts(tmp_path: Path) -> None:
    """The whole set must pass the check, and one image less must not."""
    folder = make_cub(tmp_path, range(1, 201), spread(5_864, 100) + spread(5_924, 100), pictures=False)
    splits = read_cub(tmp_path)
    assert (len(splits.train), len(splits.class_names)) == (5_864, 200)
    lines = (folder / "images.txt").read_text().splitlines()
    (folder / "images.txt").write_text("\n".join(lines[:-1]))
    wrong = r"test set must have 5,924 images of 100 classes, and 5,923 images of 100 classes .* check_counts=false"
    with pytest.raises(InputError, match=wrong):
        read_cub(tmp_path)
    (folder / "images.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(InputError, match=r"CUB-200-2011: the training set must have 5,864 images .*, and 5,863 "):
        read_cub(tmp_path)


_BATCH: dict[str, Any] = {"image_size": 16, "resize": 16, "classes_per_batch": 2, "samples_per_class": 2}


def _by_hand(folder: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Path and class name of the training and of the test images, in the order of images.txt."""
    label, name = ({}, {})
    for line in (folder / "image_class_labels.txt").read_text().splitlines():
        label[line.split()[0]] = line.split()[1]
    for line in (folder / "classes.txt").read_text().splitlines():
        name[line.split()[0]] = line.split()[1]
    parts: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for line in (folder / "images.txt").read_text().splitlines():
        number, path = line.split()
        parts[int(label[number]) > 100].append((f"{folder.as_posix()}/images/{path}", name[label[number]]))
    return parts
