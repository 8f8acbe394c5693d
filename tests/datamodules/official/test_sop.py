"""Stanford Online Products as its two lists say it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_dml.datamodules.official import sop
from lightning_dml.datamodules.official.sop import read_sop
from lightning_dml.datamodules.tables.rows import ImageTable
from lightning_dml.errors import InputError
from tests.datamodules.replicas import KINDS, edit, make_sop, rows_of, spread


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_both_lists(tmp_path: Path, newline: str) -> None:
    """Products keep the order of their numbers, so that a label means the same product in every run and paper."""
    folder = make_sop(tmp_path, (700, 3, 15), (11_330, 11_319), images=[2, 3, 4], test_images=[3, 2], newline=newline)
    splits = read_sop(tmp_path, check_counts=False)
    assert splits.class_names == ["3", "15", "700", "11319", "11330"]
    assert isinstance(splits.test, ImageTable)
    for table, name in ((splits.train, "Ebay_train.txt"), (splits.test, "Ebay_test.txt")):
        expected, kinds = [], []
        for line in (folder / name).read_text().splitlines()[1:]:
            _, number, kind, path = line.split()
            expected.append((f"{folder.as_posix()}/{path}", number))
            kinds.append(int(kind))
        assert rows_of(table, splits.class_names) == expected
        assert table.super_labels is not None and table.super_labels.dtype == np.int64
        # Kinds 4, 5 and 3 are there: 3, 15 and 700 modulo 12, plus 1; and 4 and 3 in the test list.
        order = sorted({number % 12 + 1 for number in (700, 3, 15, 11_330, 11_319)})
        assert table.super_labels.tolist() == [order.index(kind) for kind in kinds]
        assert list(table.extra["category"]) == [KINDS[kind - 1] for kind in kinds]
        assert table.is_query is None and table.boxes is None


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("Ebay_train.txt", "super_class_id path", "path", r"Ebay_train\.txt, line 1 must be the header 'image_id cl"),
        ("Ebay_test.txt", "image_id class_id super_class_id path\n", "", r"Ebay_test\.txt, line 1 must be the header"),
        ("Ebay_train.txt", "\n3 2 3 ", "\n3 2 ", r"Ebay_train\.txt, line 4 must be 'image_id class_id super_class_id"),
        ("Ebay_train.txt", "\n3 2 3 ", "\n3 two 3 ", r"Ebay_train\.txt, line 4 must be .*, got '3 two 3 chair"),
        ("Ebay_train.txt", "\n3 2 3 ", "\n3 2 x ", r"Ebay_train\.txt, line 4 must be"),
    ],
)
def test_what_does_not_fit(file: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    """Lists of other data sets come in the same form with other columns; they must not be read as these."""
    edit(make_sop(tmp_path) / file, old, new)
    with pytest.raises(InputError, match=message):
        read_sop(tmp_path, check_counts=False)


def test_the_official_counts(tmp_path: Path) -> None:
    """The whole set must pass the check, or nobody could use it."""
    classes = range(1, 11_319), range(11_319, 22_635)
    make_sop(tmp_path, *classes, spread(59_551, 11_318), spread(60_502, 11_316), pictures=False)
    splits = read_sop(tmp_path)
    assert (len(splits.train), len(splits.class_names)) == (59_551, 22_634)
    assert splits.train.super_labels is not None and splits.train.super_labels.max() == 11


@pytest.mark.parametrize(
    ("part", "count", "message"),
    [
        ("TRAIN", (7, 3), r"the training set must have 7 images of 3 classes, and 6 images of 3 classes are listed"),
        ("TEST", (4, 1), r"the test set must have 4 images of 1 classes, and 4 images of 2 classes are listed"),
    ],
)
def test_other_counts(
    part: str, count: tuple[int, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image or product more or less is another benchmark, in either split."""
    monkeypatch.setattr(sop, "TRAIN", (6, 3))
    monkeypatch.setattr(sop, "TEST", (4, 2))
    make_sop(tmp_path)
    read_sop(tmp_path)
    monkeypatch.setattr(sop, part, count)
    with pytest.raises(InputError, match=message):
        read_sop(tmp_path)
